"""What is compared: parts, each a few rows, each row trained from several seeds.

Rows of the same name are the same runs in all parts, so they are trained once in an output folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2)
IMAGES = 90_000
"""images that a run sees, the same one counted as often as it is seen: about five minutes on two cores; a
part of 20 runs trains for two hours, and measures its encoders for nearly half an hour"""
RATES = (5e-4, 1e-3)
"""learning rates that are tried for every row, with the first seed; a run of a fifth of the length chose badly, as its
encoder was still below one that was not trained"""
WARMUP = 0.1
"""share of the steps in which the learning rate rises"""

INTERLEAVED = {"emoji-labels": 1.0, "emoji-contexts": 1.0}
PAIRS = {"emoji-pairs": 1.0}
BLEND = {**INTERLEAVED, "emoji-pairs": 2.0}


@dataclass(frozen=True)
class Row:
    """A way to train that is compared with others."""

    name: str
    about: str
    overrides: Mapping[str, str]
    """dotted fields of the config"""
    shares: Mapping[str, float] = field(default_factory=lambda: INTERLEAVED)
    """corpora, and how many of the images come from each, relative to each other"""
    early: tuple[tuple[float, Mapping[str, Any]], ...] = ()
    """phases that the run begins with: share of its images, and what is otherwise in them, as in `schedule.phases`"""
    cooldown: float = 0.0
    """share of the steps in which the learning rate falls, see `schedule.cooldown`"""
    average: str | None = None
    """name of the average of the weights that is measured in their place"""
    beside: str | None = None
    """row that it is compared with; the part's first, if none is named"""

    @property
    def sets(self) -> set[str]:
        """Dotted fields that are the row's own, whatever the config says."""
        return {*self.overrides, *["schedule.cooldown"] * bool(self.cooldown)}


@dataclass(frozen=True)
class Part:
    """Rows that are compared; the others with the first one, unless they name another (`Row.beside`)."""

    name: str
    title: str
    rows: tuple[Row, ...]


LCL = Row("lcl", "contrast, weight 0.1, and generation, on interleaved documents", {"objective.name": "lcl"})
GENERATION = Row("generation", "generation on interleaved documents", {"objective.name": "generation"})


def _weight(value: str) -> Row:
    about = f"contrast, weight {value}, and generation, on interleaved documents"
    return Row(f"lcl-{value}", about, {"objective.name": "lcl", "objective.contrastive_weight": value})


WSD = {"objective.name": "lcl", "schedule.learning_rate": "constant", "average.ema": "[0.95]"}
MUON = {"objective.name": "lcl", "optimizer.name": "muon"}
SMALL, MASKED = {"image_size": 32}, {"patch_dropout": 0.5}
_EMA = "ema_0.95"

_ALL = (
    Part(
        "objectives",
        "Objectives, on the same documents",
        (
            LCL,
            Row("clip", "contrast on pairs of the same documents", {"objective.name": "clip"}),
            Row("coca", "contrast and captioning on pairs of the same documents", {"objective.name": "coca"}),
            GENERATION,
            Row("emu", "generation and regression of latents on interleaved documents", {"objective.name": "emu"}),
        ),
    ),
    Part(
        "data",
        "Documents, with the same number of images",
        (
            LCL,
            Row("lcl-pairs", "lcl on pairs only", {"objective.name": "lcl"}, PAIRS),
            Row("lcl-blend", "lcl on both, half of the images each", {"objective.name": "lcl"}, BLEND),
            Row("clip-pairs", "clip on pairs only", {"objective.name": "clip"}, PAIRS),
        ),
    ),
    Part(
        "weight",
        "The weight of the contrast",
        (LCL, GENERATION, *(_weight(value) for value in ("0.03", "0.3", "1"))),  # lcl with weight 0 is generation
    ),
    Part(
        "recipe",
        "The recipe, on the same documents",
        (
            LCL,
            Row("small-first", "lcl, images of half the side for 8 of 10", LCL.overrides, early=((0.8, SMALL),)),
            Row("patch-dropout", "lcl, half of the patches for 9 of 10 images", LCL.overrides, early=((0.9, MASKED),)),
            Row("wsd-ema", "lcl, constant rate with a cooldown, moving average", WSD, cooldown=0.2, average=_EMA),
            Row("muon", "lcl, Muon for matrices", MUON),
            Row(
                "combined",
                "small-first, then patch-dropout, with wsd-ema and muon",
                {**WSD, **MUON},
                early=((0.85, SMALL), (0.1, MASKED)),  # 0.49 of lcl's operations
                cooldown=0.2,
                average=_EMA,
            ),
            Row("clip", "contrast on pairs of the same documents", {"objective.name": "clip"}),
            Row(
                "siglip", "sigmoid contrast on pairs of the same documents", {"objective.name": "siglip"}, beside="clip"
            ),
        ),
    ),
)
PARTS = {part.name: part for part in _ALL}
