"""Precision of a run: `train.dtype` and torch's dtypes."""

from __future__ import annotations

import torch

from megatron_lcl.config import Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(config: Config) -> str:
    """`train.dtype` with `auto` decided."""
    if config.train.dtype != "auto":
        return config.train.dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"
