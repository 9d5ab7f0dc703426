"""Seconds of a step in a layout, from what its layers compute, what its processes send, and what the device gives.

A stage of a pipeline takes for a micro-batch what its layers take one after another (train/pipeline/partition.py, with
counted costs in place of measured ones), and the step what the schedule makes of the slowest stage:

    1F1B, retain  (M + S - 1)(F + B)        recompute  M P + (M + S - 1)(F + B)

(train/pipeline/schedule.py), F and B of a micro-batch, P its forward for the features alone. To that come the
optimizer, the contrast, and what of the network nothing hides (`HIDDEN`, docs/parallelism.md, "What overlaps").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from megatron_lcl import objectives
from megatron_lcl.config import Config, Model
from megatron_lcl.model.flops import Flops, of_step
from megatron_lcl.model.gradients import LayerGradients, model_gradients
from megatron_lcl.model.layers import num_parameters, parameter_shapes
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.plan.devices import Rates
from megatron_lcl.plan.network import Sending, bandwidth, mesh_of, sending_of, shapes_of_stage
from megatron_lcl.plan.work import LayerWork, stops_short, work_of_layers
from megatron_lcl.train.layout import check_layout, num_micro_batches
from megatron_lcl.train.optimizer import muon_parts
from megatron_lcl.train.parts import frozen_parameters, trained_kinds
from megatron_lcl.train.pipeline.partition import partition_balanced, stage_sums
from megatron_lcl.train.precision import DTYPES, resolve_dtype
from megatron_lcl.train.settings import sums_apart
from megatron_lcl.train.simulate import full_batch, sizes_of

TENSOR_SHOWS = 0.6
"""share of the tensor ranks' bytes for which a process waits: all of forward's, and of backward's six gathers and
reduce-scatters the two beside which nothing is multiplied; (4 + 2) of 10"""
HIDDEN = 0.8
"""share of a computation behind which the network's time disappears, where it overlaps at all"""
ADAM_BYTES = 34
"""of the optimizer for each number that a process steps, float32: the gradient's norm reads 4; AdamW reads weight,
gradient and both moments and writes three of them (28); 2 to 4 the rounded weight"""
GRADIENT_PASSES, SUM_BYTES = 8, 12
"""over each number's gradient in a micro-batch, in its own type: autograd's copy, DeepSpeed's into its bucket, its
division, and out of the bucket again, each read and written; and in float32 its sum over micro-batches"""


@dataclass(frozen=True)
class Prediction:
    """Of one step; seconds are those of the slowest process."""

    seconds: float
    compute: float
    """forwards and backwards of the slowest stage, with what is computed again"""
    again: float
    """of that: second forwards, and what activation checkpointing computes again"""
    bubble: float
    network: float
    """what is waited for"""
    optimizer: float
    """with the sums of gradients over micro-batches"""
    loss: float
    flops: Flops
    """of all processes together, as the model must be run"""
    mfu: float
    images: int
    """image slots of a step"""
    tokens: int
    sending: Sending
    """of the process that sends most"""
    partition: tuple[int, ...]
    """first layer of each stage"""
    stages: tuple[float, ...]
    """seconds of a micro-batch in each stage"""
    micro_batches: int

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def balance(self) -> float:
        """Mean over the stages, as a share of the slowest."""
        return sum(self.stages) / len(self.stages) / max(self.stages)


def predict(config: Config, processes: int, node_size: int, rates: Rates, images: int) -> Prediction:
    """A step of a run on so many processes, all of whose steps are as the config says (of a run with phases: one of
    their configs). UserError where the layout does not divide.

    images: image slots of a pack. Where parts are frozen, a backward has what is left of it (model/gradients.py); in a
    pipeline every stage but the first computes the gradient of the rows that it receives, and layers are divided among
    stages by that, as a run divides them.
    """
    data, objective = check_layout(config, processes), objectives.create(config)
    micro_batches, train, num_stages = num_micro_batches(config, data), config.train, config.parallel.pipeline
    sizes = sizes_of(config, images, train.micro_batch)
    frozen, twice = frozen_parameters(config), objective.num_forwards == 2

    def times_with(gradients: Mapping[int, LayerGradients]) -> list[_LayerSeconds]:
        return [_LayerSeconds.of(layer, rates, twice) for layer in work_of_layers(config, sizes, gradients)]

    partition: tuple[int, ...] = (0,)
    gradients = model_gradients(config.model, frozen)
    times = times_with(gradients)
    if num_stages > 1:
        others = times
        if frozen:  # each layer as if it received its rows from another stage
            others = times_with(model_gradients(config.model, frozen, tuple(range(len(times)))))
        partition = _partition(config, [t.total for t in others], [t.total for t in times])
        if frozen:
            gradients = model_gradients(config.model, frozen, partition)
            times = times_with(gradients)
    bounds = [*partition, len(times)]
    with torch.device("meta"):
        batch = full_batch(config, images)
    meshes = [mesh_of(config, processes, stage) for stage in range(num_stages)]
    sendings = [
        sending_of(config, mesh, _held(config, bounds, s), batch, micro_batches) for s, mesh in enumerate(meshes)
    ]
    sendings = [(_with_muon(s, config, mesh.data.size), more) for (s, more), mesh in zip(sendings, meshes, strict=True)]
    waits = [
        _wait(config, mesh, more, [gradients[i].given[""] for i in range(bounds[s], bounds[s + 1])], node_size, rates)
        for s, (mesh, (_, more)) in enumerate(zip(meshes, sendings, strict=True))
    ]
    plain, forward, backward, again = (
        stage_sums([getattr(t, name) for t in times], partition) for name in ("plain", "forward", "backward", "again")
    )
    computed = [sum(of) for of in zip(plain, forward, backward, again, strict=True)]
    stages = [c + w for c, w in zip(computed, waits, strict=True)]
    slowest = max(range(num_stages), key=lambda s: stages[s])
    in_turn = stages[slowest] - plain[slowest]
    bubble = (num_stages - 1) * in_turn
    hiding = micro_batches * _hiding(config, forward[slowest] + plain[slowest], backward[slowest])
    once = _once_a_step(config, meshes[slowest], sendings[slowest][0], micro_batches, hiding, node_size, rates)
    terms = _shown(sendings[-1][0].contrast, meshes[-1].data_tensor.ranks, node_size, rates)
    network = micro_batches * waits[slowest] + once + terms
    held = sum(shape.numel() for shape in _held(config, bounds, slowest).values())
    optimizer = _optimizer_seconds(config, held, data, micro_batches, rates)
    replica = sizes * micro_batches
    contrast = objective.all_features_first
    flops = of_step(config.model, replica, data * replica.pairs, contrast=contrast, frozen=frozen)
    whole = flops * data
    loss = flops.loss / config.parallel.tensor / rates.matmul["language"]
    compute = micro_batches * computed[slowest]
    seconds = compute + bubble + network + optimizer + loss
    most = max((s for s, _ in sendings), key=lambda s: s.total)
    return Prediction(
        seconds=seconds,
        compute=compute,
        again=micro_batches * (plain[slowest] + again[slowest]),
        bubble=bubble,
        network=network,
        optimizer=optimizer,
        loss=loss,
        flops=whole,
        mfu=whole.total / (seconds * processes * rates.peak),
        images=data * replica.images,
        tokens=data * replica.rows,
        sending=most,
        partition=partition,
        stages=tuple(stages),
        micro_batches=micro_batches,
    )


@dataclass(frozen=True)
class _LayerSeconds:
    """Of a layer and a micro-batch."""

    plain: float
    """0 where there is one forward only"""
    forward: float
    backward: float
    again: float

    @classmethod
    def of(cls, layer: LayerWork, rates: Rates, twice: bool) -> _LayerSeconds:
        again = layer.again.seconds(rates) if layer.again else 0.0
        plain = layer.plain.seconds(rates) if twice else 0.0
        return cls(plain, layer.forward.seconds(rates), layer.backward.seconds(rates), again)

    @property
    def total(self) -> float:
        return self.plain + self.forward + self.backward + self.again


def _held(config: Config, bounds: list[int], stage: int) -> Mapping[str, torch.Size]:
    return shapes_of_stage(config.model, config.parallel.tensor, bounds[stage], bounds[stage + 1])


def _partition(config: Config, costs: list[float], in_first: list[float]) -> tuple[int, ...]:
    """As the run would divide its layers, by counted costs; what is sent is the same at most boundaries."""
    unit = sum(costs) / 2000
    parts = (tuple(round(cost / unit) for cost in each) for each in (costs, in_first))
    return _balanced(config.parallel.pipeline, *parts, trained_kinds(config.model, frozen_parameters(config)))


@functools.lru_cache(maxsize=1024)
def _balanced(
    num_stages: int, costs: tuple[int, ...], in_first: tuple[int, ...], trained: tuple[frozenset[bool], ...]
) -> tuple[int, ...]:
    """costs: in parts of a whole, so that layouts whose layers are in the same proportions share an answer."""
    return partition_balanced(costs, [0.0] * len(costs), num_stages, in_first, trained)


def _shown(sent: float, ranks: tuple[int, ...], node_size: int, rates: Rates) -> float:
    return sent / bandwidth(ranks, node_size, rates) if sent else 0.0


def _wait(config: Config, mesh: Mesh, more: Sending, entered: list[bool], node_size: int, rates: Rates) -> float:
    """Seconds of a micro-batch for which a stage waits for tensor ranks and for its neighbors.

    more: what it sends for a micro-batch, without activation checkpointing. entered: by layer of the stage, whether
    backward enters it.
    """
    across = len({rank // node_size for rank in mesh.pipeline.ranks}) > 1  # a process speaks by its own adapter then
    seconds = more.pipeline / (rates.inter if across else rates.intra)
    if mesh.tensor.size == 1:
        return seconds
    passes = objectives.create(config).num_forwards
    short = all(stops_short(config, encoder) for encoder in (config.model.vision, config.model.language))
    # what a product that is not made again would give is not summed over ranks again
    repeated = {"none": 0, "attention": 1, "full": 3 if short else 4}[config.train.activation_checkpointing]
    forward, back = 4 * passes * len(entered), sum(entered)
    again = 1 + repeated * back / config.train.activation_checkpointing_every / (forward + 6 * back)
    # a host that computes itself hides none of backward's six, of which two show elsewhere
    shown, shows = (6, 1.0) if rates.waits else (2, TENSOR_SHOWS)
    started = rates.collective * (forward + shown * back)
    return seconds + started + _shown(more.tensor, mesh.tensor.ranks, node_size, rates) * shows * again


def _once_a_step(
    config: Config, mesh: Mesh, sending: Sending, micro_batches: int, hiding: float, node_size: int, rates: Rates
) -> float:
    """Seconds of a step for which a process waits for batches, for other replicas, and for Muon's exchange.

    hiding: of the computation beside which replicas exchange gradients, and with ZeRO-3 parameters.
    """
    between = _shown(sending.data, mesh.data.ranks, node_size, rates)
    hidden = 0.0 if rates.waits else HIDDEN * hiding
    if config.zero.stage < 3:  # parameters are gathered when the optimizer has stepped
        hidden = min(hidden, between * (1 - _gathered(config, micro_batches)))
    read = _shown(sending.reading, mesh.model_parallel.ranks, node_size, rates)
    muon = _shown(sending.muon, mesh.data_tensor.ranks, node_size, rates)
    return max(0.0, between - hidden) + read + muon


def _hiding(config: Config, forward: float, backward: float) -> float:
    """Seconds of a micro-batch's computation beside which gradients or parameters travel between replicas."""
    if config.zero.stage == 3:
        return forward + backward
    late = config.parallel.pipeline > 1 or sums_apart(config, resolve_dtype(config))
    return 0.0 if late else backward


def _gathered(config: Config, micro_batches: int) -> float:
    """Share of the parameters in what replicas send with ZeRO-1 or 2; the rest are gradients."""
    number, sums = DTYPES[resolve_dtype(config)].itemsize, micro_batches if config.zero.stage == 2 else 1
    return number / (number + 8 * sums)


@functools.lru_cache(maxsize=64)
def _trained_share(model: Model, frozen: frozenset[str]) -> float:
    return num_parameters(model, frozen) / num_parameters(model)


def _optimizer_seconds(config: Config, held: int, data: int, micro_batches: int, rates: Rates) -> float:
    """held: numbers of the process's layers. Each micro-batch adds its gradients to sums in float32."""
    share = _trained_share(config.model, frozen_parameters(config))
    own, gradient = held * share / data, DTYPES[resolve_dtype(config)].itemsize
    summed = held * share / (data if config.zero.stage == 3 else 1) * (GRADIENT_PASSES * gradient + SUM_BYTES)
    seconds = (own * ADAM_BYTES + micro_batches * summed) / rates.memory
    if config.optimizer.name == "muon":
        seconds += _newton_schulz(config) / (config.parallel.tensor * data) / rates.matmul["language"]
    return seconds


@functools.lru_cache(maxsize=64)
def _matrices(model: Model, per_head: bool, frozen: frozenset[str]) -> tuple[tuple[int, int], ...]:
    """Smaller and larger side of each matrix that Muon orthogonalizes by itself, of the whole model."""
    shapes = ((name, shape) for name, shape in parameter_shapes(model).items() if name not in frozen)
    parts = ((shape, muon_parts(name, shape, model, per_head)) for name, shape in shapes)
    sides = [(shape[0] // number, shape[1]) for shape, number in parts for _ in range(number)]
    return tuple((min(pair), max(pair)) for pair in sides)


def _matrices_of(config: Config) -> tuple[tuple[int, int], ...]:
    return _matrices(config.model, config.optimizer.muon.per_head, frozen_parameters(config))


def _newton_schulz(config: Config) -> float:
    """Operations of Muon's iterations for the whole model, of one stage's share where there is a pipeline."""
    steps = config.optimizer.muon.newton_schulz_steps
    one = sum(steps * (4 * m * m * n + 2 * m**3) for m, n in _matrices_of(config))
    return one / config.parallel.pipeline


def _with_muon(sending: Sending, config: Config, data: int) -> Sending:
    """On average: each piece of a matrix goes to its owner and back, save what the owner has."""
    if config.optimizer.name != "muon":
        return sending
    axis = data * config.parallel.tensor
    held = sum(m * n for m, n in _matrices_of(config)) / config.parallel.pipeline / axis
    return replace(sending, muon=2 * DTYPES[config.optimizer.muon.dtype].itemsize * held * (1 - 1 / axis))


def seconds_of_run(per_step: list[tuple[int, Prediction]], images: float | None) -> tuple[float, float]:
    """Seconds and images of a run whose phases take so many steps each; images: of a longer or shorter one."""
    seconds = math.fsum(steps * of.seconds for steps, of in per_step)
    seen = math.fsum(steps * of.images for steps, of in per_step)
    return (seconds, seen) if images is None else (seconds * images / seen, images)
