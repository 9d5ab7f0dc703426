"""Bytes that a process sends in a step: the formulas of docs/parallelism.md, for one layout and one batch.

Without activation checkpointing, and with gradients reduced in float32. For what is frozen no gradient is sent, nor are
rows for one (model/gradients.py). Shape legend as in model.layers. `a`: bytes of
a number in an activation or a parameter; r = (p - 1)/p. The selftest compares them with what is sent
(`selftest.count_traffic`), `plan` needs neither an engine nor other processes.

A collective is counted as its ring algorithm sends it (Thakur et al. 2005; NCCL's for large messages), on average over
the p processes of the group: an all-gather or reduce-scatter of n bytes in all (p - 1)/p · n, an all-reduce twice that,
a broadcast of n bytes (p - 1)/p · n. A message to one process is what it is, and so is what goes from each to each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.gradients import LayerGradients, layer_gradients
from megatron_lcl.model.layers import layer_kinds, shared_parameters
from megatron_lcl.objectives.base import COUNTS, Objective, without_targets
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.broadcast_batches import Header
from megatron_lcl.train.optimizers.muon import MatrixExchange
from megatron_lcl.train.parts import frozen_parameters
from megatron_lcl.train.pipeline.partition import hidden_shape
from megatron_lcl.train.precision import DTYPES, resolve_dtype
from megatron_lcl.train.settings import sums_apart, zero_options

FLOAT, LONG = 4, 8
SMALL = 256
"""bytes: what is smaller (a loss, a norm, a few counts) is not counted"""

Sent = defaultdict[tuple[int, ...], float]
"""bytes by the global ranks of the group; what goes to one process under (own rank, the other's)"""


def ring(num_bytes: float, size: int, passes: int = 1) -> float:
    """Bytes that each of `size` processes sends for a ring's passes over `num_bytes` in all."""
    return passes * num_bytes * (size - 1) / size if num_bytes >= SMALL else 0.0


def of_step(batches: Sequence[PackedBatch], engine: Any, config: Config, mesh: Mesh) -> Sent:
    """What this process sends for a step on these micro-batches of its replica, reading included; all call it."""
    pairs = mesh.data.gather_objects(sum(batch.num_pairs for batch in batches))
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
    exchanges = engine.optimizer.optimizer.exchanges if config.optimizer.name == "muon" else ()
    total: Sent = defaultdict(float)
    for part in of_layout(batches, pairs, shapes, config, mesh, exchanges).values():
        for ranks, number in part.items():
            total[ranks] += number
    if config.optimizer.name == "stable_adamw":
        for tensors in engine.optimizer.optimizer.sums:
            total[mesh.data_tensor.ranks] += ring(tensors * FLOAT, mesh.data_tensor.size, 2)
    return total


def of_layout(
    batches: Sequence[PackedBatch],
    pairs: Sequence[int],
    shapes: Mapping[str, torch.Size],
    config: Config,
    mesh: Mesh,
    exchanges: Iterable[MatrixExchange] = (),
) -> dict[str, Sent]:
    """What a process of the mesh sends for a step on these micro-batches of its replica, by what it is for: `reading`,
    `model` with the optimizer and the counts of the global batch, `terms` of the objective, `muon`. Nothing is asked of
    other processes.

    pairs: of each data-parallel replica. shapes: of the parameters that the process holds, ZeRO-3's whole, by name.
    exchanges: Muon's.
    """
    objective, frozen = objectives.create(config), frozen_parameters(config)
    gradients = layer_gradients(shapes, frozen, config.model, received=mesh.pipeline.rank > 0)
    untrained = "generation" not in objective.trains
    if config.zero.stage == 3:
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        idle = {name for name in sizes if not _entered(name, gradients) or (untrained and ".vocabulary_norm" in name)}
        of_model = zero3(sizes, frozen, idle, len(batches), objective.num_forwards, config, mesh)
    else:
        trained = [shape for name, shape in shapes.items() if name not in frozen]
        groups = [sum(s.numel() for s in trained if (len(s) >= 2) == decays) for decays in (True, False)]
        whole = sums_apart(config, resolve_dtype(config))  # they are reduced as they are kept, with padding
        padded = sum(_round_up(size, 2 * mesh.data.size) for size in groups)
        reduced = padded if whole else sum(s.numel() for name, s in shapes.items() if name not in frozen)
        of_model = stepping(batches, gradients, shapes, groups, reduced, objective.num_forwards, config, mesh)
    of_model[mesh.data.ranks] += ring(len(COUNTS) * LONG * mesh.data.size, mesh.data.size)
    has_head = mesh.pipeline.rank == mesh.pipeline.size - 1
    return {
        "reading": reading(batches, config, mesh),
        "model": of_model,
        "terms": of_terms(objective, pairs, mesh) if has_head else defaultdict(float),
        "muon": of_matrices(exchanges, config, mesh),
    }


def _entered(name: str, gradients: Mapping[int, LayerGradients]) -> bool:
    index, _, leaf = name.partition(".")
    return gradients[int(index)].entered(leaf)


def num_bytes(config: Config) -> int:
    """Bytes of a number in an activation or a parameter."""
    return DTYPES[resolve_dtype(config)].itemsize


def reading(batches: Sequence[PackedBatch], config: Config, mesh: Mesh) -> Sent:
    """Handing a step's micro-batches to the other processes of the replica (train.broadcast_batches)."""
    sent: Sent = defaultdict(float)
    replica, tensor = mesh.model_parallel, mesh.tensor
    headers = len(batches) * Header.size(config.train.micro_batch)
    sent[replica.ranks] += ring(headers * LONG, replica.size)
    for batch in batches:
        sent[replica.ranks] += ring(sum(map(len, batch.integers().values())) * FLOAT, replica.size)
        if mesh.pipeline.rank == 0:
            sent[tensor.ranks] += ring(batch.images.numel(), tensor.size)
    return sent


def stepping(
    batches: Sequence[PackedBatch],
    gradients: Mapping[int, LayerGradients],
    shapes: Mapping[str, torch.Size],
    group_sizes: Sequence[int],
    reduced: int,
    forwards: int,
    config: Config,
    mesh: Mesh,
) -> Sent:
    """The model's and the optimizer's part of a step with ZeRO-1 or 2.

    gradients: of the layers that this process holds. shapes: of all its parameters. group_sizes: numbers that are
    trained in each parameter group of this process; reduced: those that have a gradient. forwards: of a micro-batch;
    the first of two is for the features only.
    """
    sent: Sent = defaultdict(float)
    tensor, pipeline, a = mesh.tensor, mesh.pipeline, num_bytes(config)
    last = pipeline.rank == pipeline.size - 1
    me, layers, shared = pipeline.ranks[pipeline.rank], sorted(gradients), shared_parameters(config.model)
    for batch in batches:
        for layer, of_layer in gradients.items():
            forward, backward = _layer(layer, batch, config, tensor.size, a, of_layer)
            if forwards == 2:
                forward += _layer(layer, without_targets(batch), config, tensor.size, a, of_layer)[0]
            summed = [name for name in (f"{layer}.{own}" for own in of_layer.trained) if name in shared]
            backward += [sum(shapes[name].numel() for name in summed) * a] * 2  # an all-reduce
            sent[tensor.ranks] += sum(ring(n, tensor.size) for n in [*forward, *backward])
        if not last:
            sent[me, pipeline.ranks[pipeline.rank + 1]] += forwards * _hidden(layers[-1] + 1, batch, config, mesh, a)
        if pipeline.rank > 0:
            sent[me, pipeline.ranks[pipeline.rank - 1]] += _hidden(layers[0], batch, config, mesh, a)
    data = mesh.data
    reductions = len(batches) if config.zero.stage == 2 else 1
    sent[data.ranks] += reductions * ring(reduced * FLOAT, data.size, 2)
    for size in group_sizes:
        sent[data.ranks] += ring(_round_up(size, 2 * data.size) * a, data.size)
    return sent


def zero3(
    sizes: Mapping[str, int],
    frozen: Collection[str],
    idle: Collection[str],
    batches: int,
    forwards: int,
    config: Config,
    mesh: Mesh,
) -> Sent:
    """ZeRO-3's parameters and gradients (Rajbhandari et al. 2020), without a pipeline or tensor ranks.

    sizes: numbers in each parameter, by name; frozen: those without gradients, of which none are reduced; idle: those
    whose module backward does not enter, and which are not gathered for it. A micro-batch gathers parameters for each
    forward and for backward, and reduces its gradients; parameters up to DeepSpeed's persistence threshold stay, and
    are gathered once, after the step. Of a model up to its reuse distance parameters stay between a micro-batch's only
    forward and its backward.
    """
    sent: Sent = defaultdict(float)
    options = zero_options(config)

    def option(name: str, default: int) -> Any:
        return options.get(f"stage3_{name}", options.get(name, default))  # DeepSpeed takes both names

    threshold = option("param_persistence_threshold", 100_000)
    stay = forwards == 1 and sum(sizes.values()) <= option("max_reuse_distance", 1_000_000_000)
    size = mesh.data.size
    for name, number in sizes.items():
        for_backward = 0 if stay or name in idle else 1
        gathers = batches * (forwards + for_backward) if number > threshold else 1
        each = gathers * num_bytes(config) + (0 if name in frozen else batches * FLOAT)
        sent[mesh.data.ranks] += each * _round_up(number, size) * (size - 1) / size
    return sent


def of_terms(objective: Objective, pairs: Sequence[int], mesh: Mesh) -> Sent:
    """What the objective's terms send, where the head is. pairs: of each data-parallel replica."""
    sent: Sent = defaultdict(float)
    for axis, gathered in objective.gathers(pairs, mesh):
        sent[axis.ranks] += ring(gathered, axis.size)
    return sent


def of_matrices(exchanges: Iterable[MatrixExchange], config: Config, mesh: Mesh) -> Sent:
    """What Muon sends: pieces of matrices to their owners, and of the updates back."""
    sent: Sent = defaultdict(float)
    number = DTYPES[config.optimizer.muon.dtype].itemsize
    for exchange in exchanges:
        for numbers in exchange.numbers_sent:
            sent[mesh.data_tensor.ranks] += number * numbers if number * numbers >= SMALL else 0
    return sent


def _hidden(layer: int, batch: PackedBatch, config: Config, mesh: Mesh, a: int) -> int:
    """The one tensor that a stage sends to the next, which begins with `layer`; its gradient is as large."""
    return math.prod(hidden_shape(layer, batch, config.model, mesh.tensor)) * a


def _layer(
    layer: int, batch: PackedBatch, config: Config, tensor: int, a: int, gradients: LayerGradients
) -> tuple[list[float], list[float]]:
    """Bytes in all of each all-gather and reduce-scatter of a layer, in forward and in backward, but for what unsplit
    parameters owe to the other tensor ranks."""
    vision, language = config.model.vision, config.model.language
    v, d, length = vision.width, language.width, vision.num_prefix + batch.num_patches
    has, given = gradients.has, gradients.given
    images, tokens, latents = (
        _round_up(len(batch.image_soi) * length, tensor) * v * a,
        _round_up(len(batch.tokens), tensor) * d * a,
        _round_up(len(batch.image_soi), tensor) * d * a,
    )
    kind, _ = layer_kinds(config.model)[layer]
    if kind == "patches":
        return [], []
    if kind == "pool":
        # as in a block: rows for what multiplies them, and sums of their gradients
        inputs = [has("k.weight"), has("v.weight"), given["norm_k"], given["norm_v"]]
        of_patches = given["v"] or has("out.weight")
        of_latents = of_patches or given["attention"]
        backward: list[float] = [
            *[images] * sum(inputs),
            tokens * (of_patches or has("embedding")),
            latents * of_latents,
        ]
        return [images, images, tokens, latents], backward
    if kind in ("vision", "language"):
        rows = images if kind == "vision" else tokens
        return [rows] * 4, [rows] * _in_backward_of_block(gradients)
    float_latents = _round_up(len(batch.image_soi), tensor) * d * FLOAT
    statistics = 3 * batch.num_targets * FLOAT * tensor
    return [tokens, statistics, float_latents, float_latents], [tokens] * gradients.received


def _in_backward_of_block(gradients: LayerGradients) -> int:
    """How often a block's rows are gathered or summed over tensor ranks in backward, 6 where nothing is frozen.

    A column-split layer gathers its rows for its weight's gradient, and sums theirs; a row-split one gathers the
    gradient of what it gave, for its weight and for its rows.
    """
    has, given = gradients.has, gradients.given
    attention = has("attention.q.weight", "attention.k.weight", "attention.v.weight"), given["norm1"]
    feed_forward = has("mlp.up.weight"), given["norm2"], given["mlp.up"] or has("mlp.down.weight")
    return sum((*attention, given["attention"] or has("attention.out.weight"), *feed_forward))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
