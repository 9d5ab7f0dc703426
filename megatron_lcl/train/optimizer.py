"""The optimizer with the reference's decay groups, and the learning-rate schedule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from megatron_lcl.config import Config, Model, Optimizer
from megatron_lcl.config.schedule import LEFT
from megatron_lcl.errors import UserError
from megatron_lcl.train.apex import fused_adam
from megatron_lcl.train.optimizers.pieces import ELSEWHERE, Tensor
from megatron_lcl.train.optimizers.tensorwise import Rule, Tensorwise
from megatron_lcl.train.parts import called, rates_of
from megatron_lcl.train.settings import offloaded, zero_options
from megatron_lcl.train.uncompiled import uncompiled

_MATRICES = re.compile(r"(vision|language)\.blocks\..*\.weight|pool\.(q|k|v|out)\.weight")
"""what Muon steps, where it has two dimensions: neither embeddings nor what the outputs are read from"""
_BY_HEADS = re.compile(r".*\.(q|k|v)\.weight")
SMALLEST_EPS = 1e-18
"""above 1.1e-19, whose square is the smallest float32 number in full precision"""
SCHEDULE = (
    *("optimizer.lr", "optimizer.min_lr", "optimizer.warmup", "train.steps"),
    *("schedule.learning_rate", "schedule.decay_steps", "schedule.cooldown", "schedule.cooldown_shape"),
)
"""the settings on which `learning_rate` depends"""


@uncompiled
class _AdamW(torch.optim.AdamW):
    """torch's."""


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: parameters of two or more dimensions decay; biases, norms, the class token, the log scale do not."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    decayed = [p for _, p in named if len(_shape(p)) >= 2]
    others = [p for _, p in named if len(_shape(p)) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty shard in its place


def build_optimizer(
    groups: list[dict[str, Any]], config: Optimizer, rules: Mapping[str, Rule] | None = None
) -> torch.optim.Optimizer:
    """The config's optimizer over parameter groups. ValueError where NVIDIA's apex is asked for and absent.

    rules: by parameter, where not all are stepped alike (see `rules_of`); such an optimizer is to be attached to what
    DeepSpeed makes of it.
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    optimizer: torch.optim.Optimizer
    if rules is not None:
        optimizer = Tensorwise(groups, config, rules)
    elif config.name == "apex_fused_adam":
        optimizer = steps_beside_moments(fused_adam()(groups, adam_w_mode=True, **settings))
    else:
        # in one pass over the numbers; torch's other ways write a tensor for each term
        optimizer = _AdamW(groups, fused=True, **settings)
    optimizer.register_load_state_dict_pre_hook(_of_earlier_versions)
    return optimizer


def rules_of(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Rule] | None:
    """How each tensor is stepped; None where all are by AdamW at the same rates."""
    rules = {name: _rule(name, tensor, config) for name, tensor in tensors.items()}
    alike = all(rule == Rule(rule.tensor) for rule in rules.values())
    return None if alike else rules


def _rule(name: str, tensor: Tensor, config: Config) -> Rule:
    rates, optimizer = rates_of(name, config), config.optimizer
    if optimizer.name == "stable_adamw":
        return Rule(tensor, "stable_adamw", rates.lr, rates.weight_decay)
    if optimizer.name == "muon" and (parts := muon_parts(name, tensor.shape, config.model, optimizer.muon.per_head)):
        return Rule(tensor, "muon", rates.lr, rates.weight_decay, parts)
    return Rule(tensor, "adamw", rates.lr, rates.weight_decay)


def muon_parts(name: str, shape: torch.Size, model: Model, per_head: bool) -> int:
    """Into how many equal parts of its rows Muon takes a parameter `{index}.name`, each orthogonalized by itself; 0:
    Muon does not step it. shape: whole; per_head: as `optimizer.muon` says."""
    own = called(name, model)
    if len(shape) != 2 or not _MATRICES.fullmatch(own):
        return 0
    if not (per_head and _BY_HEADS.fullmatch(own)):
        return 1
    heads = {"vision": model.vision.heads, "language": model.language.heads, "pool": model.pool_heads}
    return heads[own.partition(".")[0]]


def check_optimizer(config: Config) -> None:
    """UserError for what the optimizer cannot do with the rest of the config."""
    optimizer, zero = config.optimizer, zero_options(config)
    if optimizer.min_lr > optimizer.lr:  # not in the section itself: checkpoints of earlier versions may have it
        raise UserError(
            f"optimizer.min_lr = {optimizer.min_lr:g} is above optimizer.lr = {optimizer.lr:g}, from which the "
            "learning rate decays to it; lower optimizer.min_lr"
        )
    if optimizer.eps < SMALLEST_EPS:  # nor this
        raise UserError(
            f"optimizer.eps = {optimizer.eps:g}: it, or its square, is too small for float32, so that a gradient of 0 "
            f"would be divided by 0; raise it to {SMALLEST_EPS:g} or more"
        )
    _check_schedule(config)
    parts = optimizer.parts != type(optimizer.parts)()
    if optimizer.name == "apex_fused_adam" and parts:
        raise UserError("optimizer.parts has no effect on apex_fused_adam; set optimizer.name to adamw")
    if optimizer.name == "apex_fused_adam" and "optimizer" in offloaded(config):
        raise UserError(
            "optimizer.name = apex_fused_adam and deepspeed.zero_optimization.offload_optimizer: apex steps on the "
            "GPU alone; set optimizer.name to adamw, or remove the offload"
        )
    if not parts and optimizer.name not in ("stable_adamw", "muon"):
        return
    what = "optimizer.parts" if optimizer.name == "adamw" else f"optimizer.name = {optimizer.name}"
    if "optimizer" in offloaded(config):
        raise UserError(
            f"{what} and deepspeed.zero_optimization.offload_optimizer: tensors are stepped on the device where their "
            "pieces meet; remove the offload, ZeRO shards the states over data-parallel processes"
        )
    if zero.get(ELSEWHERE):
        raise UserError(
            f"{what} and deepspeed.zero_optimization.{ELSEWHERE}: tensors would lie elsewhere in DeepSpeed's "
            "partitions than is known here; remove it"
        )


def _check_schedule(config: Config) -> None:
    """UserError where the learning rate would be 0 for whole steps, or fall in one step after the warmup."""
    steps, warmup, min_lr = config.train.steps, config.optimizer.warmup, config.optimizer.min_lr
    cooldown, end = config.schedule.cooldown, config.schedule.decay_steps
    if end is None or config.schedule.learning_rate == "constant":
        return
    if end <= warmup:
        raise UserError(
            f"schedule.decay_steps = {end} is not above optimizer.warmup = {warmup}, after which the decay begins; "
            "raise schedule.decay_steps, or lower optimizer.warmup"
        )
    if min_lr == 0 and end < steps - cooldown + (cooldown > 0):  # a cooldown begins with what is there
        raise UserError(
            f"schedule.decay_steps = {end} with optimizer.min_lr = 0: the learning rate is 0 from step {end + 1} on, "
            f"of train.steps = {steps}; raise schedule.decay_steps, or optimizer.min_lr"
        )


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


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of a step (counted from 0): linear warmup, then by `config.schedule`, by default half a cosine to
    min_lr.

    As in the reference (open_clip's cosine_lr): step s of the warmup has lr·(s+1)/warmup, and min_lr would be reached
    by step `train.steps`, the first that is not made. Of 10 steps without warmup the last has 0.024·lr, not 0. A
    cooldown goes from what the step before which it begins would have (its first step has that, undiminished) to
    min_lr in the same way (Hägele et al. 2024, arXiv 2405.18392; Dremov et al. 2025, arXiv 2508.01483).
    """
    schedule, optimizer, steps = config.schedule, config.optimizer, config.train.steps
    begin = steps - schedule.cooldown
    value = _before_cooldown(min(step, begin), optimizer, schedule.decay_steps or steps, schedule.learning_rate)
    if step < begin or not schedule.cooldown:
        return value
    left = LEFT[schedule.cooldown_shape](min(1.0, (step - begin) / schedule.cooldown))
    return optimizer.min_lr + (value - optimizer.min_lr) * left


def unfinished_warmup(config: Config) -> str | None:
    """One line where the steps end, or a cooldown begins, before the warmup is over; None where they do not."""
    steps, warmup, schedule = config.train.steps, config.optimizer.warmup, config.schedule
    cooldown, decays = schedule.cooldown, schedule.learning_rate != "constant" and not schedule.cooldown
    rising = steps - cooldown + (cooldown > 0)  # a cooldown's first step has what it falls from
    if rising > warmup or (rising == warmup and not decays):
        return None
    end = f"schedule.cooldown = {cooldown} begins in step {rising}" if cooldown else f"the end, train.steps = {steps}"
    return (
        f"optimizer.warmup = {warmup} is not over before {end}: the learning rate reaches {rising / warmup:.2g} of "
        f"optimizer.lr{' and does not decay' if decays else ''}; but for a trial, lower optimizer.warmup"
    )


def _before_cooldown(step: int, config: Optimizer, end: int, shape: str) -> float:
    """The learning rate as if there were no cooldown; end: the step that would have min_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, end - config.warmup)
    if shape == "constant":
        return config.lr
    return config.min_lr + (config.lr - config.min_lr) * LEFT[shape](min(1.0, progress))
