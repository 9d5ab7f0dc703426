"""LCL's attention pool by itself. A copy of this file lies in every export: it needs torch and safetensors, no more."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from safetensors import safe_open


def read_pool(file: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of attention_pool.safetensors, in float32, and the number of heads."""
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        return {name: opened.get_tensor(name).float() for name in names}, int(opened.metadata()["heads"])


def attention_pool(patches: torch.Tensor, w: dict[str, torch.Tensor], heads: int) -> torch.Tensor:
    """Normed patches [N, P, V] -> image latents z [N, D], not scaled, in the patches' dtype and on their device.

    w: the tensors of attention_pool.safetensors.
    """
    w = {name: tensor.to(patches) for name, tensor in w.items()}
    num_images = patches.shape[0]  # not by `len`, which is a constant to torch.export, ONNX and torch.jit.trace
    q, k, v = (
        F.linear(
            F.layer_norm(x, x.shape[-1:], w[f"norm_{n}.weight"], w[f"norm_{n}.bias"]), w[f"{n}.weight"], w[f"{n}.bias"]
        )
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for n, x in (("q", w["query"].expand(num_images, 1, -1)), ("k", patches), ("v", patches))
    )
    return F.linear(F.scaled_dot_product_attention(q, k, v).flatten(1), w["out.weight"])
