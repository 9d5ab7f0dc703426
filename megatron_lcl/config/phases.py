"""A run's phases: stretches of steps, each with a config of its own, in which nothing changes but learning rate and λ.

The sections `schedule` and `model.vision` say where something changes. Whatever reads data, estimates or weights losses
takes a phase's config as if it were a run's; only what is built once, the model above all, has that of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_lcl.config import Config
from megatron_lcl.config.schedule import LEFT, EarlyPhase
from megatron_lcl.errors import UserError


@dataclass(frozen=True)
class Change:
    """The weight of the contrast goes from `start`, which step `first` has, to `end`, which step `stop` would have."""

    first: int
    stop: int
    start: float
    end: float
    shape: str
    """of `LEFT`"""

    def at(self, step: int) -> float:
        """The weight in a step, first … stop."""
        return self.start + (self.end - self.start) * (
            1 - LEFT[self.shape]((step - self.first) / (self.stop - self.first))
        )


@dataclass(frozen=True)
class Phase:
    """Steps first … stop - 1 of a run, counted from 0."""

    number: int
    """counted from 0"""
    first: int
    stop: int
    config: Config
    """the run's, as it is in this phase: with its image size, context length, patch dropout, packs, global batch,
    micro-batch and weight of the contrast, and no phases. Its model is the run's at another image size and context
    length: it is never built. A weight that changes is the one with which it begins to (`config_at` has a step's)"""
    change: Change | None = None
    """of the weight of the contrast; it may have begun before the phase, and go on behind it"""
    names: Mapping[str, str] = field(default_factory=dict, compare=False)
    """of fields of `config` that have their values from elsewhere than the run's: what they are called there"""

    def config_at(self, step: int) -> Config:
        """The config of a step of the phase: `config`, with the weight of the contrast that the step has."""
        if self.change is None:
            return self.config
        objective = dataclasses.replace(self.config.objective, contrastive_weight=self.change.at(step))
        return dataclasses.replace(self.config, objective=objective)

    @contextlib.contextmanager
    def naming_fields(self) -> Iterator[None]:
        """A UserError from inside, of `config`, names the fields of the run's config that are to be changed."""
        try:
            yield
        except UserError as error:
            error.args = (
                re.sub(r"\b[a-z_]+(\.[a-z_]+)+", lambda found: self.names.get(found[0], found[0]), error.args[0]),
            )
            raise

    def describe(self, step: int = 0) -> str:
        """One line for the person who watches. step: from which on the steps are so, where earlier ones were not."""
        first = max(self.first, min(step, self.stop - 1))
        vision, train, data = self.config.model.vision, self.config.train, self.config.data
        kept = f", {vision.num_kept} of {vision.num_patches} patches kept" if vision.patch_dropout else ""
        weight, change = self.config.objective.contrastive_weight, self.change
        said = "" if weight is None else f", contrastive weight {weight:g}"
        if change is not None:
            said = f", contrastive weight {change.at(first):g} to {change.at(self.stop):g} ({change.shape})"
        return (
            f"steps {first + 1:,} to {self.stop:,}: images of {vision.image_size} px{kept}, sequences of up to "
            f"{min(self.config.model.language.context_length, data.tokens_per_pack):,} tokens, {train.global_batch:,} "
            f"packs of {data.tokens_per_pack:,} tokens a step in micro-batches of {train.micro_batch}{said}"
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
    dropping = ["model.vision.patch_dropout"] * bool(vision.patch_dropout)
    dropping += [
        f"schedule.phases[{n}].patch_dropout" for n, phase in enumerate(schedule.phases) if phase.patch_dropout
    ]
    unmasked = steps - vision.unmasked_steps if dropping else steps
    if unmasked <= 0:
        raise UserError(
            f"model.vision.unmasked_steps = {vision.unmasked_steps} leave none of train.steps = {steps} for patch "
            f"dropout; lower it, or set {' and '.join(dropping)} to 0"
        )
    bounds = sorted({0, *ends, *schedule.batch_doublings, *({unmasked} - {steps}), steps})
    found: list[Phase] = []
    for first, stop in itertools.pairwise(bounds):
        early = next((n for n, end in enumerate(ends) if first < end), None)
        here = Phase(
            len(found),
            first,
            stop,
            _config_of(config, early, first, masked=first < unmasked),
            _change(config, early, ends),
            _names(config, early, first),
        )
        if found and (found[-1].config, found[-1].change) == (here.config, here.change):
            found[-1] = dataclasses.replace(found[-1], stop=stop)
        else:
            found.append(here)
    return tuple(found)


def phase_at(config: Config, step: int) -> Phase:
    """The phase of a step (counted from 0); behind the end the last one."""
    phases = phases_of(config)
    return next((phase for phase in phases if step < phase.stop), phases[-1])


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
        objective=dataclasses.replace(config.objective, contrastive_weight=_weight(config, early)),
        train=dataclasses.replace(
            config.train,
            global_batch=phase.global_batch or _doubled(config, step),
            micro_batch=phase.micro_batch or config.train.micro_batch,
        ),
        schedule=dataclasses.replace(config.schedule, phases=(), batch_doublings=()),
    )


_NAMES = {
    "image_size": "model.vision",
    "patch_dropout": "model.vision",
    "context_length": "model.language",
    "tokens_per_pack": "data",
    "images_per_pack": "data",
    "global_batch": "train",
    "micro_batch": "train",
    "contrastive_weight": "objective",
}
"""the section of the run's config that has each field of an entry of schedule.phases"""


def _names(config: Config, early: int | None, step: int) -> dict[str, str]:
    """`Phase.names` in steps from `step` on, in which an entry of schedule.phases holds, or (None) none."""
    names, divisor = {}, config.train.global_batch // _doubled(config, step)
    if divisor > 1:
        names["train.global_batch"] = f"train.global_batch / {divisor} (schedule.batch_doublings)"
    phase = EarlyPhase(steps=1) if early is None else config.schedule.phases[early]
    own = (name for name in _NAMES if getattr(phase, name) is not None)
    return names | {f"{_NAMES[name]}.{name}": f"schedule.phases[{early}].{name}" for name in own}


def _weight(config: Config, early: int | None) -> float | None:
    """The weight of the contrast that an entry of schedule.phases says, or (None) the rest of the config."""
    own = None if early is None else config.schedule.phases[early].contrastive_weight
    return config.objective.contrastive_weight if own is None else own


def _change(config: Config, early: int | None, ends: list[int]) -> Change | None:
    """How the weight of the contrast changes over an entry of schedule.phases; ends: the first step behind each."""
    phases = config.schedule.phases
    if early is None or (shape := phases[early].contrastive_weight_change) is None:
        return None
    start, end = (_weight(config, n if n < len(phases) else None) for n in (early, early + 1))
    if start is None or end is None:
        raise UserError(
            f"schedule.phases[{early}].contrastive_weight_change = {shape} goes from one number to another, and "
            "objective.contrastive_weight is null; give it one"
        )
    return Change(ends[early] - phases[early].steps, ends[early], start, end, shape)


def _doubled(config: Config, step: int) -> int:
    """The global batch at a step, by `schedule.batch_doublings`."""
    doublings, batch = config.schedule.batch_doublings, config.train.global_batch
    if batch % 2 ** len(doublings):
        raise UserError(
            f"schedule.batch_doublings has {len(doublings)} steps, and train.global_batch = {batch} is no multiple of "
            f"2^{len(doublings)} = {2 ** len(doublings)}"
        )
    return batch // 2 ** sum(step < doubling for doubling in doublings)
