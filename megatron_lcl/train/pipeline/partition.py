"""Which layers go into which stage of a pipeline: so that the slowest stage is as fast as it can be.

The cost model: a stage takes as long as its layers take one after another, and a layer as long as the others of its
kind, which a short measurement on the run's own device, of its own shapes, finds out at the start: one of the patches,
of a vision block, of pool and embedding, of a language block, of the head with the vocabulary's cross-entropy (each
again where activation checkpointing treats it differently). What `recompute` and checkpointing compute twice is in it,
and what is frozen: in the first stage there is no backward below the lowest part that is trained; every other stage
computes the gradient of the rows that it receives.
benchmarks/pipeline_cost_model.py shows how far off it is.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_lcl import objectives
from megatron_lcl.config import Config, Model
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.errors import UserError
from megatron_lcl.model.activations import Activations, Outputs
from megatron_lcl.model.gradients import model_gradients
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import num_layers
from megatron_lcl.parallel.mappings import shard_size
from megatron_lcl.parallel.mesh import Axis, Mesh
from megatron_lcl.train.parts import freeze, frozen_parameters, of_layer, trained_kinds

WARM_UPS, REPEATS = 2, 10


@dataclass(frozen=True)
class LayerTime:
    """Seconds that a layer takes for one micro-batch."""

    forward: float
    """with its graph kept"""
    backward: float
    plain: float
    """forward without a graph and without targets: for the features only"""

    def of_step(self, recompute: bool) -> float:
        """All of a step's work on a micro-batch; recompute: the forward runs without a graph first."""
        return self.forward + self.backward + (self.plain if recompute else 0.0)


def partition_balanced(
    costs: Sequence[float],
    sizes: Sequence[float],
    num_stages: int,
    in_first: Sequence[float] | None = None,
    trained: Sequence[frozenset[bool]] = (),
) -> tuple[int, ...]:
    """The first layer of each stage, none empty. UserError for more stages than layers.

    costs: what each layer takes; in_first: what it takes in the first stage, if that is something else. Minimal is the
    cost of the slowest stage; among such partitions the sum of `sizes` over the boundaries, sizes[i] being what is sent
    to layer i; among such the first boundary comes as early as possible, then the second, and so on. O(stages ·
    layers²): two dynamic programs, the second within the bound that the first one found.

    trained: what each layer has to train (`parts.trained_kinds`). Every stage gets something of all kinds that there
    are, which DeepSpeed needs, if there is such a partition.
    """
    if not 1 <= num_stages <= len(costs):
        raise UserError(
            f"{len(costs)} layers do not divide into {num_stages} stages; set parallel.pipeline to {len(costs)}"
        )

    kinds, end = frozenset[bool]().union(*trained), len(costs)
    # where a stage ends at the earliest, by its first layer
    ends = [
        next((n for n in range(first, end + 1) if kinds == frozenset[bool]().union(*trained[first:n])), end + 1)
        for first in range(end)
    ]

    def cost(first: int, after: int) -> float:
        if after < ends[first]:
            return math.inf
        return math.fsum((costs if first or in_first is None else in_first)[first:after])

    slowest = _best(len(costs), num_stages, cost, max)[0]
    if slowest == math.inf:
        return partition_balanced(costs, sizes, num_stages, in_first)

    def sent(first: int, after: int) -> float:
        return math.inf if cost(first, after) > slowest else sizes[first] if first else 0.0

    return _best(len(costs), num_stages, sent, lambda a, b: a + b)[1]


def _best(
    end: int,
    num_stages: int,
    value: Callable[[int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The smallest combined value of the stages, and the lexicographically first partition that has it.

    value: of the stage of the layers from the first number to before the second.
    """
    nothing: tuple[float, tuple[int, ...]] = (math.inf, ())
    table = [nothing] * end + [(0.0, nothing[1])]  # of the last p stages, by their first layer
    for _ in range(num_stages):
        table = [
            min(
                (
                    (combine(value(first, after), table[after][0]), (first, *table[after][1]))
                    for after in range(first + 1, end + 1)
                ),
                default=nothing,
            )
            for first in range(end)
        ] + [nothing]
    return table[0]


def partition_uniform(config: Config) -> tuple[int, ...]:
    """The first layer of each stage of the run's pipeline, where all layers cost the same: each stage has equally many,
    or one more, but where that would leave one nothing to train."""
    same, trained = [1.0] * num_layers(config.model), trained_kinds(config.model, frozen_parameters(config))
    return partition_balanced(same, same, config.parallel.pipeline, None, trained)


def hidden_shape(layer: int, batch: PackedBatch, model: Model, axis: Axis) -> tuple[int, int]:
    """Shape of what the layer of this index (not the first) receives for a micro-batch, from stage to stage.

    Up to the pool [S, V], a shard of N*(1+registers+K) rows, K being the patches of an image that are read
    (`batch.num_patches`); behind it [S, D], a shard of R rows, then one of N. axis: the tensor ranks, over which the
    rows are split.
    """
    images, rows = len(batch.image_start), len(batch.tokens)
    if layer <= 1 + model.vision.layers:
        return shard_size(images * (model.vision.num_prefix + batch.num_patches), axis), model.vision.width
    return shard_size(rows, axis) + shard_size(images, axis), model.language.width


def choose_partition(
    specs: Sequence[partial[nn.Module]],
    batch: PackedBatch,
    config: Config,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[int, ...]:
    """The first layer of each stage of the run's pipeline, the same on every process; all processes call it.

    specs: as `layer_specs` gives them for `mesh.tensor`. batch: a micro-batch of the run, on every process the same.
    """
    samples = LayerSamples(specs, batch, config, mesh.tensor, device, dtype)
    shapes = [hidden_shape(index, batch, config.model, mesh.tensor) for index in range(len(specs))]
    costs, in_first = measure_costs(samples, config, mesh)
    sizes = [float(math.prod(shape)) for shape in shapes]
    trained = trained_kinds(config.model, frozen_parameters(config))
    return partition_balanced(costs, sizes, mesh.pipeline.size, in_first, trained)


def measure_costs(samples: LayerSamples, config: Config, mesh: Mesh) -> tuple[list[float], list[float]]:
    """Seconds that each layer takes for a micro-batch in a step, and in the first stage; the same on every process, and
    all call it together."""
    measured = [samples.measure() for _ in range(WARM_UPS + REPEATS)][WARM_UPS:]
    times = (samples.times(measured), samples.times(measured, in_first=True))
    return agree_on_costs(times[0], config, mesh), agree_on_costs(times[1], config, mesh)


def agree_on_costs(times: Sequence[LayerTime], config: Config, mesh: Mesh) -> list[float]:
    """Seconds that each layer takes for a micro-batch in a step: the median of what all processes measured.

    They measure at the same time, as they will work at the same time, be it on devices or on cores that they share.
    """
    recompute = objectives.create(config).num_forwards == 2
    own = [time.of_step(recompute) for time in times]
    mesh.world.barrier()
    return [statistics.median(of_layer) for of_layer in zip(*mesh.world.gather_objects(own), strict=True)]


Kind = tuple[Any, ...]
"""what layers that take equally long have in common: what makes them, with what arguments, what is frozen of them, and
whether they compute the gradient of the rows that they receive"""


class LayerSamples:
    """A layer of each kind with something to work on; all tensor ranks of `axis` make it and measure together."""

    def __init__(
        self,
        specs: Sequence[partial[nn.Module]],
        batch: PackedBatch,
        config: Config,
        axis: Axis,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """batch: a micro-batch of the run, with its images."""
        batch, frozen = batch.to(device), frozen_parameters(config)
        of_first = model_gradients(config.model, frozen)
        self._kinds: dict[bool, list[Kind]] = {True: [], False: []}
        """of every layer, by whether it is in the first stage"""
        self._samples: dict[Kind, tuple[nn.Module, Activations]] = {}
        for index, make in enumerate(specs):
            leaves = of_layer(frozen, index)
            for in_first, kinds in self._kinds.items():
                received = of_first[index].received if in_first else index > 0
                kind = make.func, make.args, leaves, received
                kinds.append(kind)
                if kind not in self._samples:
                    layer = make()
                    initialize({index: layer}, config.model, config.train.seed, axis)
                    freeze(dict(layer.named_parameters()), leaves)
                    rows = _input_of(index, batch, config, axis, dtype, received)
                    self._samples[kind] = layer.to(device, dtype), rows

    def measure(self) -> dict[Kind, tuple[float, float, float]]:
        """Seconds of one forward, one backward and one plain forward of each kind.

        The kinds take turns, so that what else the machine does for a while meets all of them.
        """
        return {kind: _measure(*sample) for kind, sample in self._samples.items()}

    def times(
        self, measured: Sequence[Mapping[Kind, tuple[float, float, float]]], in_first: bool = False
    ) -> list[LayerTime]:
        """Each layer's time: the medians of what its kind took in these measurements. in_first: in the first stage."""
        medians = {
            kind: LayerTime(*map(statistics.median, zip(*(of[kind] for of in measured), strict=True)))
            for kind in self._samples
        }
        return [medians[kind] for kind in self._kinds[in_first]]


def _input_of(
    index: int, batch: PackedBatch, config: Config, axis: Axis, dtype: torch.dtype, received: bool
) -> Activations:
    x = Activations.of(batch)
    if index == 0:
        return x
    shape = hidden_shape(index, batch, config.model, axis)
    return x._replace(hidden=torch.randn(shape, device=x.tokens.device).to(dtype).requires_grad_(received))


def _measure(layer: nn.Module, x: Activations) -> tuple[float, float, float]:
    """One measurement, in the order of LayerTime."""
    out, forward = _timed(partial(layer, x), x.tokens.device)
    run_backward = _backward_of(out)
    backward = _timed(run_backward, x.tokens.device)[1] if run_backward else 0.0
    with torch.no_grad():
        _, plain = _timed(partial(layer, x._replace(target_positions=x.target_positions[:0])), x.tokens.device)
    return forward, backward, plain


def _backward_of(out: Any) -> Callable[[], None] | None:
    """None where all of it is frozen, and all before it."""
    if isinstance(out, Outputs):
        loss = out.generation + out.image_features.sum() + out.text_features.sum() + out.log_scale.sum()
        return loss.backward if loss.requires_grad else None
    return partial(out.hidden.backward, torch.ones_like(out.hidden)) if out.hidden.requires_grad else None


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def stage_sums(values: Sequence[float], partition: Sequence[int]) -> list[float]:
    """The sum of the layers' values over each stage; partition: the first layer of each."""
    return [math.fsum(values[a:b]) for a, b in itertools.pairwise([*partition, len(values)])]
