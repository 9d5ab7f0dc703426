"""The model's parts by the names that a config uses: what is frozen, and how fast each parameter is trained.

A parameter `{index}.name` is called after its part here, whatever the depth of the encoders:

    vision.patches.*  vision.blocks.N.*  vision.norm.*     the vision transformer
    pool.*                                                 the attention pool
    language.embedding.*  language.positions  language.blocks.N.*
    head.*                                                 both output projections, their norms, the log scale
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from megatron_lcl import objectives
from megatron_lcl.config import Config, Model
from megatron_lcl.errors import UserError
from megatron_lcl.fields import plain_text
from megatron_lcl.model.layers import PARTS, layer_kinds, num_layers, parameter_shapes

_WITHOUT_GRADIENT = {
    "retrieval": ("head.vocabulary*",),
    "generation": (
        *("head.norm.*", "head.projection.*", "head.log*"),
        *("pool.query", "pool.norm_[qk].*", "pool.[qk].*"),  # a patch's embedding needs the pool's values alone
    ),
}
"""what has no gradient where an objective trains this alone of the model (`Objective.may_train`)"""


def parameter_names(model: Model) -> dict[str, str]:
    """Every parameter of the model, `{index}.name` → the name after its part."""
    return {name: called(name, model) for name in parameter_shapes(model)}


def called(name: str, model: Model) -> str:
    """A parameter `{index}.name`, by the name after its part."""
    index, _, leaf = name.partition(".")
    kind, number = layer_kinds(model)[int(index)]
    if kind == "patches":
        return f"vision.patches.{leaf}"
    if kind in ("vision", "language"):
        return f"{kind}.blocks.{number}.{leaf}"
    if kind == "pool":
        own = leaf.partition(".")[0]
        kind = {"norm": "vision", "embedding": "language", "positions": "language"}.get(own, "pool")
    return f"{kind}.{leaf}"


# --- how fast ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """How fast a parameter is trained, beside the others."""

    lr: float = 1.0
    """multiple of the scheduled learning rate"""
    weight_decay: float = 1.0
    """multiple of its group's weight decay"""


def rates_of(name: str, config: Config) -> Rates:
    """Of a parameter `{index}.name`: those of its part, and by depth.

    Layer-wise decay d (Clark et al. 2020, arXiv 2003.10555; BEiT, arXiv 2106.08254): of L blocks the
    n-th, counted from 1, has d^(L + 1 - n), the embedding below them d^(L + 1), what stands above them 1.
    """
    part, inside, *more = called(name, config.model).split(".")
    rates = getattr(config.optimizer.parts, part)
    lr = rates.lr
    if part in ("vision", "language"):
        top = getattr(config.model, part).layers + 1
        depth = (
            int(more[0]) + 1 if inside == "blocks" else 0 if inside in ("patches", "embedding", "positions") else top
        )
        lr *= rates.layer_decay ** (top - depth)
    return Rates(lr, rates.weight_decay)


# --- what is frozen ----------------------------------------------------------------------------------------------


def frozen_patterns(config: Config) -> tuple[str, ...]:
    """`train.freeze`, and what the objective never trains: with gradients of zero it would only be decayed."""
    return tuple(dict.fromkeys((*config.train.freeze, *_untrained(config))))


def frozen_parameters(config: Config) -> frozenset[str]:
    """The parameters `{index}.name` that `frozen_patterns` name. UserError where a pattern names none."""
    return _matched(config.model, frozen_patterns(config))


def untrained_parameters(config: Config) -> frozenset[str]:
    """The parameters `{index}.name` that the objective never trains, whatever `train.freeze` says."""
    return _matched(config.model, _untrained(config))


def _untrained(config: Config) -> tuple[str, ...]:
    """Nothing of an objective that is not installed, as that of another machine's run may be."""
    if config.objective.name not in objectives.names():
        return ()
    tasks = objectives.objective_class(config.objective.name).may_train(config)
    return _WITHOUT_GRADIENT.get(tasks[0], ()) if len(tasks) == 1 else ()


def of_layer(names: Iterable[str], index: int) -> frozenset[str]:
    """Of parameters `{index}.name` the names of those of a layer."""
    prefix = f"{index}."
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))


@functools.lru_cache(maxsize=64)
def _matched(model: Model, patterns: tuple[str, ...]) -> frozenset[str]:
    """Computed once: a run asks at every step."""
    names = parameter_names(model)
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name, own in names.items() if fnmatch.fnmatchcase(own, pattern)}
        if not matched:
            raise UserError(f"train.freeze: no parameter is called {pattern}; {_nearest(pattern, names.values())}")
        frozen |= matched
    return frozenset(frozen)


def _nearest(pattern: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(pattern.replace("*", "").rstrip("."), names, n=1, cutoff=0.0)
    return f"the nearest is {near[0]}"


def check_freeze(config: Config) -> None:
    """UserError where a pattern matches nothing, or the objective has nothing left to train."""
    if not config.train.freeze:
        return
    frozen = frozen_parameters(config)
    trained = {own for name, own in parameter_names(config.model).items() if name not in frozen}
    without = [
        {own for pattern in _WITHOUT_GRADIENT[task] for own in fnmatch.filter(trained, pattern)}
        for task in objectives.create(config).trains
    ]
    if trained <= set.intersection(*without):
        raise UserError(
            f"train.freeze = {plain_text(config.train.freeze)} freezes all that the objective "
            f"{config.objective.name} trains; leave a part of it out"
        )


def check_frozen_have_weights(config: Config, drawn: Iterable[str] | None) -> None:
    """UserError where `train.freeze` leaves a whole part for ever as `train.seed` draws it, and the objective needs it.

    drawn: parameters `{index}.name` that begin so; None: all.
    """
    frozen = _matched(config.model, config.train.freeze)
    if not frozen:
        return
    names = parameter_names(config.model)
    random = frozen & (names.keys() if drawn is None else set(drawn))
    for part in PARTS:
        of_part = {name for name, own in names.items() if own.startswith(f"{part}.")}
        if of_part <= frozen and of_part & random:
            raise UserError(
                f"train.freeze = {plain_text(config.train.freeze)} freezes all of {part}, which the objective "
                f"{config.objective.name} needs trained, and train.init_from gives "
                f"{'no weights for it' if of_part <= random else 'not all of its weights'}; name weights that do, or "
                f"train the {part}"
            )


@functools.lru_cache(maxsize=64)
def trained_kinds(model: Model, frozen: frozenset[str]) -> tuple[frozenset[bool], ...]:
    """Of each layer, whether it has matrices (True) and vectors (False) to train: the groups of parameters that
    `optimizer.parameter_groups` makes. Computed once: a plan asks for every layout."""
    kinds = [set[bool]() for _ in range(num_layers(model))]
    for name, shape in parameter_shapes(model).items():
        if name not in frozen:
            kinds[int(name.partition(".")[0])].add(len(shape) >= 2)
    return tuple(map(frozenset, kinds))


def check_stages(config: Config) -> None:
    """UserError where, however the layers are divided, a stage of the pipeline has nothing to train of one kind.

    DeepSpeed adds up the gradient's norm group by group over the stages.
    """
    trained = trained_kinds(config.model, frozen_parameters(config))
    every, most, found = frozenset[bool]().union(*trained), 0, frozenset[bool]()
    for kinds in trained:  # a stage ends as early as it can
        found |= kinds
        if found == every:
            most, found = most + 1, frozenset()
    if config.parallel.pipeline > most:
        raise UserError(
            f"train.freeze = {plain_text(config.train.freeze)} leaves one of parallel.pipeline = "
            f"{config.parallel.pipeline} stages no matrix or no vector to train, and DeepSpeed needs both in every "
            f"stage or neither; set parallel.pipeline to at most {most}, use parallel.tensor or ZeRO, or freeze less"
        )


def freeze(parameters: Mapping[str, torch.nn.Parameter], frozen: Collection[str]) -> None:
    """Of this process's parameters those that are frozen need no gradient."""
    for name, parameter in parameters.items():
        if name in frozen:
            parameter.requires_grad_(False)
