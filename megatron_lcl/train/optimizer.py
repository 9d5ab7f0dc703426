"""AdamW with the reference's decay groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from megatron_lcl.config import Config, Optimizer, Schedule
from megatron_lcl.train.apex import fused_adam

SCHEDULE = (
    *("optimizer.lr", "optimizer.min_lr", "optimizer.warmup", "train.steps"),
    *("schedule.learning_rate", "schedule.decay_steps", "schedule.cooldown", "schedule.cooldown_shape"),
)
"""the settings on which `scheduled` depends"""
_COSINE = Schedule()


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
        optimizer = steps_beside_moments(fused_adam()(groups, adam_w_mode=True, **settings))
    else:
        optimizer = torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)
    optimizer.register_load_state_dict_pre_hook(_of_earlier_versions)
    return optimizer


def _of_earlier_versions(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A state in which apex has kept the count of steps, with the count where `steps_beside_moments` keeps it."""
    counts = [group["step"] for group in saved["param_groups"] if "step" in group]
    if not counts:
        return saved
    count = torch.tensor(float(counts[0]))
    return {**saved, "state": {key: {"step": count.clone(), **state} for key, state in saved["state"].items()}}


def steps_beside_moments(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Apex's optimizer, its count of steps kept where torch keeps it: with each parameter's moments, as a tensor.

    Apex keeps one whole number in the parameter group. Checkpoints would then depend on the optimizer, and
    ZeRO-3, which steps a group piece by piece, would be counted once for every piece.
    """

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
            counts = {int(state["step"]) for state in states if "step" in state}
            assert len(counts) <= 1, f"the parameters of a group have made {counts} steps"
            group.pop("step", None)  # apex then begins at 1
            if counts:
                group["step"] = counts.pop()

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if state := optimizer.state.get(parameter):
                    state["step"] = torch.tensor(float(group["step"]))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def scheduled(step: int, config: Config) -> dict[str, float]:
    """What changes from step to step by the config alone, by its name in words, at a step (counted from 0)."""
    return {"learning rate": learning_rate(step, config.optimizer, config.train.steps, config.schedule)}


def learning_rate(step: int, config: Optimizer, total_steps: int, schedule: Schedule = _COSINE) -> float:
    """Learning rate of a step (counted from 0): linear warmup, then by `schedule`, by default half a cosine to min_lr.

    As in the reference (open_clip's cosine_lr): step s of the warmup has lr·(s+1)/warmup, and min_lr would be reached
    by step `total_steps`, the first that is not made. Of 10 steps without warmup the last has 0.024·lr, not 0. A
    cooldown goes from what the step before which it begins would have (its first step has that, undiminished) to
    min_lr in the same way (Hägele et al. 2024, arXiv 2405.18392; Dremov et al. 2025, arXiv 2508.01483).
    """
    begin = total_steps - schedule.cooldown
    value = _before_cooldown(min(step, begin), config, schedule.decay_steps or total_steps, schedule.learning_rate)
    if step < begin or not schedule.cooldown:
        return value
    left = _LEFT[schedule.cooldown_shape](min(1.0, (step - begin) / schedule.cooldown))
    return config.min_lr + (value - config.min_lr) * left


def _before_cooldown(step: int, config: Optimizer, end: int, shape: str) -> float:
    """The learning rate as if there were no cooldown; end: the step that would have min_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, end - config.warmup)
    if shape == "constant":
        return config.lr
    return config.min_lr + (config.lr - config.min_lr) * _LEFT[shape](min(1.0, progress))


_LEFT: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - math.sqrt(t),
    "square": lambda t: 1 - t * t,
}
"""part of a height that is left after a part t of the way down"""
