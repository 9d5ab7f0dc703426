"""Which parts of the model backward enters, where some are frozen (`train.freeze`).

What a module gives needs a gradient where what it is given does, or where it has something to train. Backward enters no
other module, and a parameter that is frozen has no gradient: nothing is sent or computed for either.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_lcl.config import Model
from megatron_lcl.model.layers import layer_kinds, num_layers, parameter_shapes

Has = Callable[..., bool]
"""whether one of the named modules or parameters of a layer has something to train"""


@dataclass(frozen=True)
class LayerGradients:
    """Of one layer of a process."""

    trained: frozenset[str]
    """parameters by their name in the layer"""
    received: bool
    """whether the rows that it is given need a gradient"""
    given: Mapping[str, bool]
    """by module, of those that have parameters: whether what it gives needs one; the layer itself is the empty name,
    `attention` the queries, keys and values together"""

    def has(self, *names: str) -> bool:
        """Whether one of these modules or parameters has something to train."""
        return any(own == name or own.startswith(f"{name}.") for own in self.trained for name in names)

    def entered(self, parameter: str) -> bool:
        """Whether backward enters the module that has the parameter."""
        return self.given[parameter.rpartition(".")[0]]

    def num_needed(self, *factors: str) -> int:
        """How many of these need a gradient: modules, by what they give, and parameters. For a product of them backward
        makes so many."""
        return sum(factor in self.trained or self.given.get(factor, False) for factor in factors)


def layer_gradients(
    names: Iterable[str], frozen: Collection[str], model: Model, received: bool
) -> dict[int, LayerGradients]:
    """Of each layer of a process, by index.

    names: `{index}.name` of its parameters. received: whether rows come from another process, which waits for their
    gradient: those of the first stage are images.
    """
    leaves: dict[int, set[str]] = {}
    for name in names:
        index, _, leaf = name.partition(".")
        leaves.setdefault(int(index), set())
        if name not in frozen:
            leaves[int(index)].add(leaf)
    found: dict[int, LayerGradients] = {}
    for layer, own in sorted(leaves.items()):
        trained = LayerGradients(frozenset(own), received, {})
        found[layer] = replace(trained, given=_given(layer, model, received, trained.has))
        received = found[layer].given[""]
    return found


@functools.lru_cache(maxsize=64)
def model_gradients(
    model: Model, frozen: frozenset[str] = frozenset(), partition: tuple[int, ...] = (0,)
) -> Mapping[int, LayerGradients]:
    """Of each layer of a model; computed once.

    frozen: parameters `{index}.name`. partition: the first layer of each stage of a pipeline, whose rows come from
    another process unless it is layer 0.
    """
    found: dict[int, LayerGradients] = {}
    for first, after in itertools.pairwise([*partition, num_layers(model)]):
        own = [name for name in parameter_shapes(model) if first <= int(name.partition(".")[0]) < after]
        found |= layer_gradients(own, frozen, model, received=first > 0)
    return found


def _given(index: int, model: Model, received: bool, has: Has) -> dict[str, bool]:
    kind, _ = layer_kinds(model)[index]
    if kind == "patches":
        rows = has("projection", "class_embedding", "positions", "registers")
        return {"projection": has("projection"), "norm": rows or has("norm"), "": rows or has("norm")}
    if kind == "pool":
        return _given_by_pool(received, has)
    if kind == "head":
        norm, words = received or has("norm"), received or has("vocabulary_norm")
        whole = norm or words or has("projection", "vocabulary", "log_scale", "logit_bias")
        return {"norm": norm, "projection": norm or has("projection"), "vocabulary_norm": words, "": whole}
    return _given_by_block(received, has)


def _given_by_block(received: bool, has: Has) -> dict[str, bool]:
    given = {"norm1": received or has("norm1")}
    for name in ("q", "k", "v"):
        given[f"attention.{name}"] = given["norm1"] or has(f"attention.{name}")
    for name in ("q", "k"):
        given[f"attention.norm_{name}"] = given[f"attention.{name}"] or has(f"attention.norm_{name}")
    given["attention"] = any(given.values())
    given["attention.out"] = given["attention"] or has("attention.out")
    between = received or given["attention.out"] or has("scale1")
    given["norm2"] = between or has("norm2")
    given["mlp.up"] = given["norm2"] or has("mlp.up")
    given["mlp.down"] = given["mlp.up"] or has("mlp.down")
    return {**given, "": between or given["mlp.down"] or has("scale2")}


def _given_by_pool(received: bool, has: Has) -> dict[str, bool]:
    given = {"norm": received or has("norm"), "norm_q": has("query", "norm_q")}
    for name in ("k", "v"):
        given[f"norm_{name}"] = given["norm"] or has(f"norm_{name}")
    for name in ("q", "k", "v"):
        given[name] = given[f"norm_{name}"] or has(name)
    given["attention"] = any(given[name] for name in ("q", "k", "v"))
    given["out"] = given["attention"] or has("out")
    return {**given, "embedding": has("embedding"), "": given["out"] or has("embedding", "positions")}
