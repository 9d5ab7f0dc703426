"""What a run minimizes, one object an objective; `create` finds the one that `objective.name` names.

An objective says which sequences it reads, what it wants of the forward, its loss over the global batch as a sum of
terms, its metrics and what it costs. The steppers, the pipeline's schedule and the traffic formula ask it.

Imports config, data.loading, losses, model and parallel. Begin with base.py; contrast.py, generation.py and
regression.py are the terms there are, built_in.py the objectives made of them.

Another package adds an objective with an entry point in the group `megatron_lcl.objectives`, whose name is the
objective's and whose object is an `Objective` class.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from numbers import Real
from typing import Any, get_args

import torch

from megatron_lcl.config import Config, EvaluationTask
from megatron_lcl.config.objective import Objective as Section
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.loading import rules
from megatron_lcl.errors import UserError
from megatron_lcl.objectives.base import Objective, Term, is_of_the_run
from megatron_lcl.plugins import Plugins

ENTRY_POINTS = "megatron_lcl.objectives"
WEIGHTS = tuple(field.name for field in dataclasses.fields(Section) if field.name.endswith("_weight"))
"""fields of the config's `objective` that weight its terms"""
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
    """The objective of this name. UserError names those there are and the nearest, or what its class lacks."""
    if (found := _PLUGINS.find(name)) is not None:
        if faults := "; ".join(_faults(found)):
            raise UserError(f"config key `objective.name` = {name!r}: {faults} (`megatron_lcl.objectives.base`)")
        return found
    near = difflib.get_close_matches(name, names(), 1, 0)
    raise UserError(
        f"config key `objective.name` = {name!r}: there is no such objective; there are {', '.join(names())}, the "
        f"nearest is {near[0]}; name one of these, or install the package that adds it"
    )


def _faults(found: object) -> Iterator[str]:
    """What the class of an objective does not declare, or declares of a config that has no such field."""
    if not (isinstance(found, type) and issubclass(found, Objective)):
        yield f"its entry point names {found!r}, which is no class made of `Objective`"
        return
    own = found.__name__
    if missing := [name for name in ("sequences", "tasks", "metrics") if not hasattr(found, name)]:
        yield f"the class {own} does not declare its {', '.join(missing)}"
        return
    if not isinstance(found.sequences, rules.Sequences):
        yield f"{own}.sequences is {found.sequences!r}; it has to be made of `Sequences` (`data.loading.rules`)"
    names: dict[str, Sequence[str]] = {"tasks": (), "metrics": ()}
    for name in names:
        value: Any = getattr(found, name)
        if isinstance(value, property):  # of the config, which is not known here
            continue
        if isinstance(value, tuple | list) and all(isinstance(one, str) for one in value):
            names[name] = value
        else:
            yield f"{own}.{name} is {value!r}; it has to be a tuple of names, of one as ('NAME',)"
    if taken := [name for name in names["metrics"] if is_of_the_run(name)]:
        yield f"{own}.metrics names {', '.join(taken)}, as which a run writes numbers of its own; give other names"
    tasks = {own: names["tasks"]}
    if not found.parts and found.terms is Objective.terms:
        yield f"the class {own} declares neither `parts` nor `terms` of its own, and has nothing to train"
    parts: Any = found.parts
    for part in parts if isinstance(parts, tuple | list) else [parts]:
        if not _is_part(part, found.published):
            weight = " or ".join(["a number", *map(repr, found.published)])
            yield f"{own}.parts has {part!r}; it has to be a pair of a class made of `Term` and its weight, {weight}"
            continue
        term = part[0]
        if missing := [*sorted(term.__abstractmethods__), *(["task"] if not hasattr(term, "task") else [])]:
            yield f"the class {term.__name__} does not declare its {', '.join(missing)}"
        else:
            tasks[term.__name__] = (term.task,)
    there_are = get_args(EvaluationTask)
    for name, given in tasks.items():
        if others := [task for task in given if task not in there_are]:
            yield f"{name} names the task {', '.join(map(repr, others))}; there are {', '.join(there_are)}"
    if unknown := [name for name in found.published if name not in WEIGHTS]:
        yield f"{own}.published names {', '.join(unknown)}; the config's `objective` has {', '.join(WEIGHTS)}"


def _is_part(value: object, published: Collection[str]) -> bool:
    """Whether it is a term's class and its weight, or the name of one that is published."""
    match value:
        case (type() as term, (str() | Real()) as weight):
            return issubclass(term, Term) and (not isinstance(weight, str) or weight in published)
    return False


def package_of(config: Config) -> dict[str, str]:
    """The version of the other package that the objective of a run is of, by its name; {} of one of ours."""
    return _PLUGINS.distribution(config.objective.name)


def parts_of(config: Config) -> dict[str, float]:
    """What the terms of another package's objective weigh, by their class, the second of a name as `Name 2`; {} of
    ours, whose weights are the version's and the config's, and where it is not installed here."""
    weights: dict[str, float] = {}
    seen = Counter[str]()
    for term, weight in create(config)._weighted() if package_of(config) else ():
        name, number = term.__name__, seen[term.__name__]
        weights[f"{name} {number + 1}" if number else name] = float(weight)
        seen[name] += 1
    return weights


def own_weights(config: Config) -> dict[str, float | None]:
    """The weights of the config's `objective`, for comparisons: None where the objective does not read one, or where it
    is what the objective publishes, set or not. {} where the objective cannot be used here."""
    try:
        published = objective_class(config.objective.name).published
    except UserError:
        return {}
    set_ones = {name: getattr(config.objective, name) for name in WEIGHTS}
    return {name: value if name in published and value != published[name] else None for name, value in set_ones.items()}


def trained_by(config: Config) -> tuple[EvaluationTask, ...]:
    """What of the model a run trains, in whatever phase; as `Objective.trains`."""
    trained = [create(phase.config).trains for phase in phases_of(config)]
    return tuple(task for task in objective_class(config.objective.name).tasks if any(task in one for one in trained))


def longest_text(config: Config) -> int:
    """Tokens of a text by itself that an evaluation reads, special ones not counted: what the context holds; where a
    pair's caption shortens the text of its contrast (`Sequences.doubled`), as many as a run has trained that on, in
    whatever phase."""
    whole = config.model.language.context_length - 2
    if config.objective.name not in names():  # of a package that is not installed here
        return whole
    sequences = objective_class(config.objective.name).sequences
    if not sequences.doubled:
        return whole
    read = (
        rules.longest_text(
            sequences, c.model.vision.num_placeholders, c.model.language.context_length, c.data.tokens_per_pack
        )
        for c in (phase.config for phase in phases_of(config))
    )
    return min(whole, max(1, *read))


def has_triton(config: Config) -> bool:
    """Whether a loss of a run has Triton kernels, in whatever phase; as `Objective.has_triton`."""
    return any(create(phase.config).has_triton for phase in phases_of(config))


def create(config: Config) -> Objective:
    """The objective of a run. UserError where there is none of this name, its settings leave nothing to train or lack
    what a term needs, or it has parameters, which no optimizer would step."""
    objective = objective_class(config.objective.name)(config)
    for owner in (objective, *(term for term, _ in objective.parts)):
        for name, value in _attributes(owner).items():
            if _is_learned(value):
                cls = owner if isinstance(owner, type) else type(owner)
                raise UserError(
                    f"objective.name = {config.objective.name}: {cls.__name__}.{name} requires gradients, and only the "
                    "model's parameters are trained; a term may use latents, contexts, generation, log_scale and "
                    "logit_bias of `Outputs`, and tensors that are not trained (requires_grad_(False))"
                )
    return objective


def _attributes(owner: object) -> dict[str, Any]:
    """Of an object or a class, those of its classes included."""
    classes = (owner if isinstance(owner, type) else type(owner)).__mro__
    return {name: value for place in (*reversed(classes), owner) for name, value in vars(place).items()}


def _is_learned(value: object) -> bool:
    """Whether a tensor, a module, or one in a list, tuple or dict of them requires gradients."""
    if isinstance(value, torch.nn.Module):
        return any(parameter.requires_grad for parameter in value.parameters())
    if isinstance(value, dict | list | tuple):
        return any(map(_is_learned, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor) and value.requires_grad
