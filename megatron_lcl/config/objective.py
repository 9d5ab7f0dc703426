"""Sections `objective` and `contrast`: what is minimized."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT, Weight


@dataclass(frozen=True, config=STRICT)
class Objective:
    """What is minimized."""

    name: str = Field(
        default="lcl",
        description="lcl: contrast and generation; clip: contrast only, on pairs; siglip: with a sigmoid loss; "
        "coca: contrast and captioning, on pairs; genlip: captioning only, on pairs; generation: no contrast; emu: "
        "generation and regression of image latents; or one that another package adds",
    )
    contrastive_weight: Weight | None = Field(
        default=None,
        description="weight of the contrastive loss; null: as published, in `lcl` 0.1, in `coca` 1; in `clip` and "
        "`siglip` it is always 1",
    )
    generation_weight: Weight | None = Field(
        default=None,
        description="weight of the generation loss, in `coca` of the captioning loss; null: as published, in `lcl` and "
        "`emu` 1, in `coca` 2; in `generation` and `genlip` it is always 1",
    )
    regression_weight: Weight | None = Field(
        default=None, description="weight of the regression of image latents in `emu`; null: as published, 1"
    )


@dataclass(frozen=True, config=STRICT)
class Contrast:
    """How the contrast over the global batch is computed."""

    initial_log_scale: Annotated[float, Field(ge=0, le=math.log(100))] | None = Field(
        default=None,
        description="initial log scale of the contrast; null: as published, ln(1/0.07) (CLIP), in `siglip` ln 10; it "
        "is learned and clamped to [0, ln 100]",
    )
    strategy: Literal["retain", "recompute", "auto"] = Field(
        default="retain",
        description="retain: keep the graphs of all micro-batches until the loss; recompute: run the forwards twice, "
        "which needs less memory (required with ZeRO-3); auto: retain where that fits into the memory there is, else "
        "recompute, chosen at the start and kept while layout and settings are the same",
    )
