"""Section `schedule`: what changes over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT, Count, Positive, Weight
from megatron_lcl.errors import UserError

LEFT: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - math.sqrt(t),
    "square": lambda t: 1 - t * t,
}
"""part of a height that is left after a part t of the way down, by shape"""


@dataclass(frozen=True, config=STRICT)
class EarlyPhase:
    """Some steps at the beginning of a run, and what is otherwise in them; null: as the rest of the config says."""

    steps: Positive = Field(description="optimizer steps of the phase")
    image_size: Positive | None = Field(
        default=None, description="side of the input image, pixels; a multiple of model.vision.patch_size"
    )
    context_length: Positive | None = Field(
        default=None, description="longest sequence, tokens; at most model.language.context_length"
    )
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="see model.vision.patch_dropout"
    )
    tokens_per_pack: Positive | None = Field(default=None, description="token slots of a pack")
    images_per_pack: Positive | None = Field(
        default=None,
        description="image slots of a pack; null: data.images_per_pack, and where that is null too, chosen for the "
        "phase",
    )
    global_batch: Positive | None = Field(default=None, description="packs per optimizer step")
    micro_batch: Positive | None = Field(
        default=None, description="packs per forward pass of one data-parallel replica"
    )
    contrastive_weight: Weight | None = Field(default=None, description="weight of the contrastive loss")
    contrastive_weight_change: Literal["linear", "cosine"] | None = Field(
        default=None,
        description="how contrastive_weight changes, from its own value in the first step of the phase to the value "
        "that follows the phase, in the first step after it: linear, or half a cosine; null: it is constant in the "
        "phase",
    )


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """What changes over a run; without it everything stays but the learning rate, which follows a cosine."""

    phases: tuple[EarlyPhase, ...] = Field(
        default=(),
        description="early phases of the run: a list of {steps, image_size, context_length, patch_dropout, "
        "tokens_per_pack, images_per_pack, global_batch, micro_batch, contrastive_weight, contrastive_weight_change}, "
        "one after another, each with its number of steps and the settings that differ in it; with "
        "contrastive_weight_change, linear or cosine, that weight changes over the phase to the value that follows it; "
        "after the last phase the rest of the config holds, to the end of the run (small images first: CLIPA, arXiv "
        "2305.07017)",
    )
    batch_doublings: tuple[Positive, ...] = Field(
        default=(),
        description="steps after which the global batch doubles, ascending; with n of them the run begins with "
        "train.global_batch / 2^n (larger batches in place of a smaller learning rate: arXiv 1711.00489; here the "
        "learning rate follows its own schedule)",
    )
    learning_rate: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="after optimizer.warmup: cosine or linear decay from optimizer.lr to optimizer.min_lr, or "
        "constant, which with schedule.cooldown is WSD (warmup, stable, decay)",
    )
    decay_steps: Positive | None = Field(
        default=None,
        description="step at which a cosine or linear decay would reach optimizer.min_lr; null: train.steps. For a "
        "cooldown from a checkpoint of a longer run: that run's train.steps",
    )
    cooldown: Count = Field(
        default=0,
        description="number of last steps in which the learning rate falls to optimizer.min_lr, from its value at "
        "their beginning (with WSD typically 10-20 % of the steps, arXiv 2405.18392; 2508.01483); 0: no cooldown",
    )
    cooldown_shape: Literal["sqrt", "linear", "cosine", "square"] = Field(
        default="sqrt",
        description="fraction that is left, after a fraction t of the cooldown, of the learning rate above "
        "optimizer.min_lr: sqrt 1 - sqrt(t) (arXiv 2405.18392), linear 1 - t, cosine (1 + cos(pi t)) / 2, square "
        "1 - t^2 (shapes compared: arXiv 2508.01483)",
    )

    def __post_init__(self) -> None:
        if list(self.batch_doublings) != sorted(set(self.batch_doublings)):
            raise UserError(f"schedule.batch_doublings = {list(self.batch_doublings)}: give ascending steps, each once")
        if self.batch_doublings and any(phase.global_batch for phase in self.phases):
            raise UserError(
                "schedule.batch_doublings and a global_batch in schedule.phases both say the global batch; give one of "
                "the two"
            )
