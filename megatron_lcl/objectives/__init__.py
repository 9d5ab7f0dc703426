"""What a run minimizes, one object an objective; `create` finds the one that `objective.name` names.

An objective says which sequences it reads, what it wants of the forward, its loss over the global batch as a sum of
terms, its metrics and what it costs. The steppers, the pipeline's schedule and the traffic formula ask it. Begin with
base.py; contrast.py and generation.py are the two terms there are, built_in.py the objectives made of them. May import
config, data, parallel, losses and model, never train.

Another package adds an objective with an entry point in the group `megatron_lcl.objectives`, whose name is the
objective's and whose object is an `Objective` class.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from megatron_lcl.config import Config
from megatron_lcl.errors import UserError
from megatron_lcl.objectives.base import Objective

ENTRY_POINTS = "megatron_lcl.objectives"
_BUILT_IN = {
    "lcl": "built_in:LatentCompression",
    "clip": "built_in:Clip",
    "generation": "built_in:GenerationOnly",
}


def names() -> list[str]:
    """Names of all objectives, those of other packages included."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def objective_class(name: str) -> type[Objective]:
    """The objective of this name. UserError names those there are and the nearest."""
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.load()
    near = difflib.get_close_matches(name, names(), 1, 0)
    raise UserError(
        f"config key `objective.name` = {name!r}: there is no such objective; there are {', '.join(names())}, the "
        f"nearest is {near[0]}"
    )


def create(config: Config) -> Objective:
    """The objective of a run. UserError where there is none of this name, or its settings leave nothing to train."""
    return objective_class(config.objective.name)(config)
