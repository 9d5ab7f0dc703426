"""A run's phases: stretches of steps in which nothing changes but the learning rate, each with a config of its own.

The sections `schedule` and `model.vision` say where something changes. Whatever reads data, estimates or weights losses
takes a phase's config as if it were a run's; only what is built once, the model above all, has that of the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

from megatron_lcl.config import Config
from megatron_lcl.config.schedule import EarlyPhase
from megatron_lcl.errors import UserError


@dataclass(frozen=True)
class Phase:
    """Steps first … stop - 1 of a run, counted from 0."""

    number: int
    """counted from 0"""
    first: int
    stop: int
    config: Config
    """the run's, as it is in this phase: with its image size, context length, patch dropout, packs, global batch and
    weight of the contrast, and no phases. Its model is the run's at another image size and context length: it is never
    built"""

    def describe(self) -> str:
        """One line for the person who watches."""
        vision, train, data = self.config.model.vision, self.config.train, self.config.data
        kept = f", {vision.num_kept} of {vision.num_patches} patches kept" if vision.patch_dropout else ""
        weight = self.config.objective.contrastive_weight
        return (
            f"steps {self.first + 1:,} to {self.stop:,}: images of {vision.image_size} px{kept}, sequences of up to "
            f"{min(self.config.model.language.context_length, data.tokens_per_pack):,} tokens, {train.global_batch:,} "
            f"packs of {data.tokens_per_pack:,} tokens a step"
            + (f", contrastive weight {weight:g}" if weight is not None else "")
        )


def phases_of(config: Config) -> tuple[Phase, ...]:
    """The phases of a run, in order; one where nothing changes. UserError where they do not fit the run or the model.

    A batch that a phase cannot divide among the processes is the layout's business (`train.layout.check_layout`).
    """
    steps, schedule, vision = config.train.steps, config.schedule, config.model.vision
    ends = list(itertools.accumulate(phase.steps for phase in schedule.phases))
    if ends and ends[-1] >= steps:
        raise UserError(
            f"schedule.phases take {ends[-1]} of train.steps = {steps} steps; they must leave at least one, in which "
            "all is as the rest of the config says"
        )
    late = [step for step in schedule.batch_doublings if step >= steps]
    if late:
        raise UserError(f"schedule.batch_doublings: step {late[0]} is not before the end, train.steps = {steps}")
    if schedule.cooldown > steps:
        raise UserError(f"schedule.cooldown = {schedule.cooldown} is more than train.steps = {steps}")
    unmasked = steps
    if vision.patch_dropout or any(phase.patch_dropout for phase in schedule.phases):
        unmasked = steps - vision.unmasked_steps
    if unmasked <= 0:
        raise UserError(
            f"model.vision.unmasked_steps = {vision.unmasked_steps} leave none of train.steps = {steps} for patch "
            "dropout; lower it, or set model.vision.patch_dropout to 0"
        )
    bounds = sorted({0, *ends, *schedule.batch_doublings, *({unmasked} - {steps}), steps})
    found: list[Phase] = []
    for first, stop in itertools.pairwise(bounds):
        early = next((n for n, end in enumerate(ends) if first < end), None)
        here = _config_of(config, early, first, masked=first < unmasked)
        if found and found[-1].config == here:
            found[-1] = dataclasses.replace(found[-1], stop=stop)
        else:
            found.append(Phase(len(found), first, stop, here))
    return tuple(found)


def phase_at(config: Config, step: int) -> Phase:
    """The phase of a step (counted from 0); behind the end the last one."""
    phases = phases_of(config)
    return next((phase for phase in phases if step < phase.stop), phases[-1])


def common_batch(config: Config) -> int:
    """The largest number that divides the global batch of every phase."""
    return math.gcd(*(phase.config.train.global_batch for phase in phases_of(config)))


def _config_of(config: Config, early: int | None, step: int, masked: bool) -> Config:
    """The config in steps from `step` on. early: number of the entry of schedule.phases; None: behind all."""
    phase = EarlyPhase(steps=1) if early is None else config.schedule.phases[early]
    name, model, data = f"schedule.phases[{early}]", config.model, config.data
    size, context = phase.image_size or model.vision.image_size, phase.context_length
    patch = model.vision.patch_size
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"{name}.image_size = {size} is no multiple of model.vision.patch_size = {patch}; the nearest are {nearest}"
        )
    if context is not None and context > model.language.context_length:
        raise UserError(
            f"{name}.context_length = {context} is over model.language.context_length = "
            f"{model.language.context_length}, up to which positions are learned"
        )
    dropout = model.vision.patch_dropout if phase.patch_dropout is None else phase.patch_dropout
    weight = config.objective.contrastive_weight if phase.contrastive_weight is None else phase.contrastive_weight
    vision = dataclasses.replace(
        model.vision, image_size=size, patch_dropout=dropout if masked else 0.0, unmasked_steps=0
    )
    language = dataclasses.replace(model.language, context_length=context or model.language.context_length)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, vision=vision, language=language),
        data=dataclasses.replace(
            data,
            tokens_per_pack=phase.tokens_per_pack or data.tokens_per_pack,
            images_per_pack=phase.images_per_pack or data.images_per_pack,
        ),
        objective=dataclasses.replace(config.objective, contrastive_weight=weight),
        train=dataclasses.replace(config.train, global_batch=phase.global_batch or _doubled(config, step)),
        schedule=dataclasses.replace(config.schedule, phases=(), batch_doublings=()),
    )


def _doubled(config: Config, step: int) -> int:
    """The global batch at a step, by `schedule.batch_doublings`."""
    doublings, batch = config.schedule.batch_doublings, config.train.global_batch
    if batch % 2 ** len(doublings):
        raise UserError(
            f"schedule.batch_doublings has {len(doublings)} steps, and train.global_batch = {batch} is no multiple of "
            f"2^{len(doublings)} = {2 ** len(doublings)}"
        )
    return batch // 2 ** sum(step < doubling for doubling in doublings)
