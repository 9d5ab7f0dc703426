"""AdamW with the reference's decay groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatron_lcl.config import Optimizer
from megatron_lcl.train.apex import fused_adam


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: parameters of two or more dimensions decay; biases, norms, the class token, the log scale do not."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    decayed = [p for _, p in named if len(_shape(p)) >= 2]
    others = [p for _, p in named if len(_shape(p)) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty shard in its place


def build_optimizer(groups: list[dict[str, Any]], config: Optimizer) -> torch.optim.Optimizer:
    """AdamW over parameter groups. ValueError where NVIDIA's apex is asked for and absent."""
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "apex_fused_adam":
        return fused_adam()(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)


def learning_rate(step: int, config: Optimizer, total_steps: int) -> float:
    """Learning rate of a step (counted from 0): linear warmup, then half a cosine from lr down towards min_lr.

    As in the reference (open_clip's cosine_lr): step s of the warmup has lr·(s+1)/warmup, and min_lr would be reached
    by step `total_steps`, the first that is not made. Of 10 steps without warmup the last has 0.024·lr, not 0.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, total_steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
