"""What a run minimizes, one object an objective; `create` finds the one that `objective.name` names.

An objective says which sequences it reads, what it wants of the forward, its loss over the global batch as a sum of
terms, its metrics and what it costs. The steppers, the pipeline's schedule and the traffic formula ask it.

Imports config, data.loading, losses, model and parallel. Begin with base.py; contrast.py, generation.py and
regression.py are the terms there are, built_in.py the objectives made of them.

Another package adds an objective with an entry point in the group `megatron_lcl.objectives`, whose name is the
objective's and whose object is an `Objective` class.
"""

from __future__ import annotations

import difflib

from megatron_lcl.config import Config, EvaluationTask
from megatron_lcl.config.phases import phases_of
from megatron_lcl.errors import UserError
from megatron_lcl.objectives.base import Objective
from megatron_lcl.plugins import Plugins

ENTRY_POINTS = "megatron_lcl.objectives"
_PLUGINS = Plugins(
    ENTRY_POINTS,
    __name__,
    {
        "lcl": "built_in:LatentCompression",
        "clip": "built_in:Clip",
        "coca": "built_in:CoCa",
        "emu": "built_in:Emu",
        "generation": "built_in:GenerationOnly",
        "genlip": "built_in:GenLip",
        "siglip": "built_in:SigLip",
    },
)


def names() -> list[str]:
    """Names of all objectives, those of other packages included."""
    return _PLUGINS.names()


def objective_class(name: str) -> type[Objective]:
    """The objective of this name. UserError names those there are and the nearest."""
    if (found := _PLUGINS.find(name)) is not None:
        return found
    near = difflib.get_close_matches(name, names(), 1, 0)
    raise UserError(
        f"config key `objective.name` = {name!r}: there is no such objective; there are {', '.join(names())}, the "
        f"nearest is {near[0]}"
    )


def trained_by(config: Config) -> tuple[EvaluationTask, ...]:
    """What of the model a run trains, in whatever phase; as `Objective.trains`."""
    trained = [create(phase.config).trains for phase in phases_of(config)]
    return tuple(task for task in objective_class(config.objective.name).tasks if any(task in one for one in trained))


def has_triton(config: Config) -> bool:
    """Whether a loss of a run has Triton kernels, in whatever phase; as `Objective.has_triton`."""
    return any(create(phase.config).has_triton for phase in phases_of(config))


def create(config: Config) -> Objective:
    """The objective of a run. UserError where there is none of this name, or its settings leave nothing to train."""
    return objective_class(config.objective.name)(config)
