"""What the tests of plans give in place of a simulation, of devices and of a run's config."""

from __future__ import annotations

from typing import Any

from plan.test_predict import CONTEXT, IMAGES, config_of, rates_of

from megatron_lcl.config import Config
from megatron_lcl.plan.layouts import Target
from megatron_lcl.train.simulate import Peaks, Usage


def needs(peak: float, **more: float) -> Usage:
    before, after = Peaks(peak, 0.0, peak, 0.0), Peaks(0.0, 0.0, 0.0, 0.0)
    numbers: dict[str, Any] = dict.fromkeys(Usage.__dataclass_fields__, 0.0)
    return Usage(**numbers | {"before": before, "after": after} | more)


def target_of(processes: int = 4, room: float = 1e12, **rates: Any) -> Target:
    text = CONTEXT / IMAGES - config_of().model.vision.num_placeholders
    return Target(processes, processes, rates_of(matmul=1e9, attention=1e9, **rates), room, text, on_host=True)


def long_vision(**changes: Any) -> Config:
    """Four stages of four layers, of which the second and the third are vision blocks."""
    layers = {"model__vision__layers": 11, "model__language__layers": 2}
    return config_of(**layers, **{"parallel__pipeline": 4, "train__global_batch": 16, **changes})
