"""Precision of a run: `train.dtype` and torch's dtypes."""

from __future__ import annotations

import os
from typing import Any

import torch

from megatron_lcl.config import Config
from megatron_lcl.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def lowerable_scale(optimizer: Any) -> float | None:
    """The loss scale of one of DeepSpeed's optimizers, if a gradient that overflows can lower it; None: it is fixed, or
    at its minimum, or there is none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic or scaler.cur_scale <= scaler.min_scale:
        return None
    return float(scaler.cur_scale)


def loss_scale(engine: Any) -> float | None:
    """The scale of float16's loss, which the host knows; None with other dtypes."""
    return float(engine.optimizer.loss_scaler.cur_scale) if engine.fp16_enabled() else None


def resolve_dtype(config: Config) -> str:
    """`train.dtype` with `auto` decided."""
    if config.train.dtype != "auto":
        return config.train.dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"


def check_dtype(config: Config) -> None:
    """UserError for float16 on a CPU that cannot compute in it, which DeepSpeed refuses after the start."""
    if config.train.dtype != "float16" or torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says that it finds no GPU
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise UserError("train.dtype = float16, which this CPU cannot train in; set it to bfloat16 or float32")
