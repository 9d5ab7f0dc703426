"""Bytes that a process sends in a step: the formulas of docs/parallelism.md, for one layout and one batch.

Without activation checkpointing, and with gradients reduced in float32. Shape legend as in model.layers. `a`: bytes of
a number in an activation or a parameter; r = (p - 1)/p.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.losses.group import HEADER
from megatron_lcl.parallel.mappings import shard_size
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.selftest.count_traffic import ring
from megatron_lcl.train.pipeline.partition import hidden_shape
from megatron_lcl.train.precision import DTYPES, resolve_dtype
from megatron_lcl.train.step import without_targets

FLOAT, LONG = 4, 8

Sent = defaultdict[tuple[int, ...], float]
"""bytes by the global ranks of the group (see parallel.traffic.Traffic)"""


def of_step(batches: Sequence[PackedBatch], engine: Any, config: Config, mesh: Mesh) -> Sent:
    """What this process sends for a step on these micro-batches of its replica, reading included; all call it."""
    pairs = mesh.data.gather_objects(sum(batch.num_pairs for batch in batches))
    parameters = dict(engine.module.named_parameters())
    parts = [reading(batches, config, mesh)]
    if config.zero.stage == 3:
        parts.append(zero3([p.ds_numel for p in parameters.values()], len(batches), config, mesh))
        parts.append(contrast(pairs, config.model.language.width, mesh))
    else:
        stages = sorted({int(name.split(".")[0]) for name in parameters})
        groups = [sum(p.numel() for p in parameters.values() if (p.dim() >= 2) == decays) for decays in (True, False)]
        parts.append(stepping(batches, pairs, stages, groups, config, mesh))
    total: Sent = defaultdict(float)
    for part in parts:
        for ranks, number in part.items():
            total[ranks] += number
    return total


def num_bytes(config: Config) -> int:
    """Bytes of a number in an activation or a parameter."""
    return DTYPES[resolve_dtype(config)].itemsize


def reading(batches: Sequence[PackedBatch], config: Config, mesh: Mesh) -> Sent:
    """Handing a step's micro-batches to the other processes of the replica (train.share)."""
    sent: Sent = defaultdict(float)
    replica, tensor = mesh.model_parallel, mesh.tensor
    header = 6 + 8 + 4 + config.train.micro_batch
    sent[replica.ranks] += ring(len(batches) * header * LONG, replica.size)
    for batch in batches:
        sent[replica.ranks] += ring(sum(len(t) for _, t in batch._integers()) * FLOAT, replica.size)
        if mesh.pipeline.rank == 0:
            sent[tensor.ranks] += ring(batch.images.numel(), tensor.size)
    return sent


def stepping(
    batches: Sequence[PackedBatch],
    pairs: Sequence[int],
    stages: Sequence[int],
    group_sizes: Sequence[int],
    config: Config,
    mesh: Mesh,
) -> Sent:
    """One step with ZeRO-1 or 2.

    pairs: of each data-parallel replica. stages: indices of those that this process holds. group_sizes: numbers in each
    parameter group of this process.
    """
    sent: Sent = defaultdict(float)
    passes = 2 if config.objective.name != "generation" and config.contrast.strategy == "recompute" else 1
    tensor, pipeline, a = mesh.tensor, mesh.pipeline, num_bytes(config)
    last = pipeline.rank == pipeline.size - 1
    me = pipeline.ranks[pipeline.rank]
    for batch in batches:
        for stage in stages:
            forward, backward = _stage(stage, batch, config, tensor.size, a)
            if passes == 2:
                forward += _stage(stage, without_targets(batch), config, tensor.size, a)[0]
            sent[tensor.ranks] += sum(ring(n, tensor.size) for n in [*forward, *backward])
        if not last:
            sent[me, pipeline.ranks[pipeline.rank + 1]] += passes * _hidden(stages[-1] + 1, batch, config, mesh, a)
        if pipeline.rank > 0:
            sent[me, pipeline.ranks[pipeline.rank - 1]] += _hidden(stages[0], batch, config, mesh, a)
    data = mesh.data
    reductions = len(batches) if config.zero.stage == 2 else 1
    sent[data.ranks] += reductions * ring(sum(group_sizes) * FLOAT, data.size, 2)
    for size in group_sizes:
        sent[data.ranks] += ring(_round_up(size, 2 * data.size) * a, data.size)
    if last and config.objective.name != "generation":
        for ranks, number in contrast(pairs, config.model.language.width, mesh).items():
            sent[ranks] += number
    return sent


def zero3(sizes: Sequence[int], batches: int, config: Config, mesh: Mesh) -> Sent:
    """ZeRO-3's parameters and gradients (Rajbhandari et al. 2020), without a pipeline or tensor ranks.

    sizes: numbers in each parameter. A micro-batch gathers parameters for each forward and for backward, and reduces
    its gradients; parameters up to DeepSpeed's persistence threshold stay, and are gathered once, after the step.
    """
    sent: Sent = defaultdict(float)
    passes = 2 if config.objective.name != "generation" and config.contrast.strategy == "recompute" else 1
    threshold = config.deepspeed.get("zero_optimization", {}).get("stage3_param_persistence_threshold", 100_000)
    size = mesh.data.size
    for number in sizes:
        gathers = batches * (passes + 1) if number > threshold else 1
        gathered = gathers * num_bytes(config) + batches * FLOAT
        sent[mesh.data.ranks] += gathered * _round_up(number, size) * (size - 1) / size
    return sent


def contrast(pairs: Sequence[int], width: int, mesh: Mesh) -> Sent:
    """The contrast: features and sums once, nothing in backward; tensor ranks exchange rows of gradients."""
    sent: Sent = defaultdict(float)
    stage, tensor = mesh.data_tensor, mesh.tensor
    most = max(1, *(shard_size(n, tensor) for n in pairs))
    for of_rank in (HEADER * LONG, most * 2 * width * FLOAT, (5 + 2 * most) * FLOAT):
        sent[stage.ranks] += ring(of_rank * stage.size, stage.size)
    own = shard_size(pairs[mesh.data.rank], tensor)
    sent[tensor.ranks] += ring(own * 2 * width * FLOAT * tensor.size, tensor.size)
    return sent


def _hidden(stage: int, batch: PackedBatch, config: Config, mesh: Mesh, a: int) -> int:
    """The one tensor that a part sends to the next, which begins with `stage`; its gradient is as large."""
    return math.prod(hidden_shape(stage, batch, config.model, mesh.tensor)) * a


def _stage(stage: int, batch: PackedBatch, config: Config, tensor: int, a: int) -> tuple[list[float], list[float]]:
    """Bytes in all of each all-gather and reduce-scatter of a stage, in forward and in backward."""
    vision, language = config.model.vision, config.model.language
    v, d, length = vision.width, language.width, 1 + vision.num_patches

    def padded(rows: int) -> int:
        return -(-rows // tensor) * tensor

    images, tokens, latents = (
        padded(len(batch.image_soi) * length) * v * a,
        padded(len(batch.tokens)) * d * a,
        padded(len(batch.image_soi)) * d * a,
    )
    if stage == 0:
        return [], [*_twice(3 * vision.patch_size**2 * v + v + length * v + 2 * v, a)]
    if stage <= vision.layers:
        return [images] * 4, [*[images] * 6, *_twice(6 * v, a)]
    if stage == vision.layers + 1:
        shared = 9 * v + language.context_length * d
        return [images, images, tokens, latents], [*[images] * 4, tokens, latents, *_twice(shared, a)]
    if stage <= vision.layers + 1 + language.layers:
        return [tokens] * 4, [*[tokens] * 6, *_twice(6 * d, a)]
    float_latents = padded(len(batch.image_soi)) * d * FLOAT
    statistics = 3 * batch.num_targets * FLOAT * tensor
    return [tokens, statistics, float_latents, float_latents], [tokens, *_twice(4 * d + d * d, a)]


def _twice(numbers: int, a: int) -> Iterable[int]:
    """An all-reduce: what unsplit parameters owe to the other tensor ranks."""
    return [numbers * a] * 2


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
