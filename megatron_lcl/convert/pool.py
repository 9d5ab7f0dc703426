"""The attention pool's files beside an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megatron_lcl.convert import attention_pool
from megatron_lcl.convert.weights import save_parts
from megatron_lcl.model.lcl import LCL

POOL = "lcl/attention_pool.safetensors"
"""in a folder of its own: timm before 1.0.26 fails on a second .safetensors file beside the weights"""


def save_pool(model: LCL, folder: Path, dtype: torch.dtype) -> None:
    """`lcl/attention_pool.safetensors`: query, norm_{q,k,v}, q, k, v, out; the number of heads in its metadata.

    And `lcl/attention_pool.py`, which reads and applies it.
    """
    parts = ("query", "norm_q.", "norm_k.", "norm_v.", "q.", "k.", "v.", "out.")
    tensors = {name: p for name, p in model.pool.named_parameters() if name.startswith(parts)}
    (folder / POOL).parent.mkdir(exist_ok=True)
    save_parts(tensors, folder / POOL, dtype, {"heads": str(model.config.pool_heads)})
    shutil.copyfile(attention_pool.__file__, (folder / POOL).with_suffix(".py"))
