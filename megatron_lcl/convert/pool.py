"""The attention pool outside our model: its file beside an export, and the function that applies it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from megatron_lcl.convert.weights import save_parts
from megatron_lcl.model.lcl import LCL

POOL = "lcl/attention_pool.safetensors"
"""in a folder of its own: timm before 1.0.26 stumbles over a second .safetensors file beside the weights"""


def save_pool(model: LCL, folder: Path, dtype: torch.dtype) -> None:
    """`lcl/attention_pool.safetensors`: query, norm_{q,k,v}, q, k, v, out; the number of heads in its metadata."""
    parts = ("query", "norm_q.", "norm_k.", "norm_v.", "q.", "k.", "v.", "out.")
    tensors = {name: p for name, p in model.pool.named_parameters() if name.startswith(parts)}
    (folder / POOL).parent.mkdir(exist_ok=True)
    save_parts(tensors, folder / POOL, dtype, {"heads": str(model.config.pool_heads)})


def read_pool(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The file's tensors in float32, and the number of heads."""
    with safe_open(folder / POOL, "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}, int(file.metadata()["heads"])  # noqa: SIM118


# Model cards quote this function: it uses nothing but torch, and its words must stand alone.
def attention_pool(patches, w, heads):  # type: ignore[no-untyped-def]
    """Normed patches [N, P, V] -> image latents z [N, D]; w: the tensors of attention_pool.safetensors."""
    q, k, v = (
        F.linear(
            F.layer_norm(x, x.shape[-1:], w[f"norm_{n}.weight"], w[f"norm_{n}.bias"]), w[f"{n}.weight"], w[f"{n}.bias"]
        )
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for n, x in (("q", w["query"].expand(len(patches), 1, -1)), ("k", patches), ("v", patches))
    )
    return F.linear(F.scaled_dot_product_attention(q, k, v).flatten(1), w["out.weight"])
