"""What a process of a layout sends in a step, by axis: train/traffic.py on a mesh that has numbers and no processes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_lcl.config import Config, Model
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.flops import Numbers
from megatron_lcl.model.layers import build_layers
from megatron_lcl.parallel.mesh import Axis, Mesh
from megatron_lcl.plan.devices import Rates
from megatron_lcl.train.traffic import Sent, of_layout


@dataclass(frozen=True)
class Sending(Numbers):
    """Bytes that one process sends in a step, by axis."""

    tensor: float = 0.0
    data: float = 0.0
    """gradients and parameters between replicas"""
    pipeline: float = 0.0
    contrast: float = 0.0
    """what the objective's terms exchange"""
    reading: float = 0.0
    """batches handed on inside a replica"""
    muon: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.by_axis().values())

    def by_axis(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def mesh_of(config: Config, processes: int, stage: int) -> Mesh:
    """The mesh that the first process of a stage has, numbered as in DeepSpeed's topology; it sends nothing."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    data = processes // (tensor * pipeline)

    def axis(ranks: Sequence[int]) -> Axis:
        return Axis(None, ranks.index(first), len(ranks), tuple(ranks))

    first = stage * data * tensor
    stages = [q * data * tensor for q in range(pipeline)]
    return Mesh(
        world=axis(range(processes)),
        data=axis(range(first, first + data * tensor, tensor)),
        pipeline=axis(stages),
        tensor=axis(range(first, first + tensor)),
        model_parallel=axis([base + t for base in stages for t in range(tensor)]),
        data_tensor=axis(range(first, first + data * tensor)),
    )


@functools.lru_cache(maxsize=16)
def shard_shapes(model: Model, tensor: int) -> Mapping[str, torch.Size]:
    """Shapes of the first tensor rank's shard of every parameter, by name."""
    with torch.device("meta"):
        layers = build_layers(model, 0.0, nn.LayerNorm, Axis(None, 0, tensor, tuple(range(tensor))))
    return {f"{i}.{name}": p.shape for i, layer in enumerate(layers) for name, p in layer.named_parameters()}


@functools.lru_cache(maxsize=1024)
def shapes_of_stage(model: Model, tensor: int, first: int, after: int) -> Mapping[str, torch.Size]:
    """Shapes of what a process holds of layers first … after - 1 (of all that ZeRO-3 shards: whole), by name."""
    shapes = shard_shapes(model, tensor)
    return {name: shape for name, shape in shapes.items() if first <= int(name.split(".")[0]) < after}


def sending_of(
    config: Config, mesh: Mesh, shapes: Mapping[str, torch.Size], batch: PackedBatch, micro_batches: int
) -> tuple[Sending, Sending]:
    """Bytes of a step of so many equal micro-batches, and what one more adds. shapes: of what the process holds."""

    def of(count: int) -> Sending:
        pairs = [micro_batches * batch.num_pairs] * mesh.data.size
        return by_axis(of_layout([batch] * count, pairs, shapes, config, mesh), mesh)

    # beyond two micro-batches (a single one's headers are too small to count) all formulas are straight lines
    fewer = min(micro_batches, 2)
    found = of(fewer)
    more = of(fewer + 1) - found
    return found + more * (micro_batches - fewer), more


def by_axis(parts: Mapping[str, Sent], mesh: Mesh) -> Sending:
    """What `train.traffic.of_layout` gives, by axis."""
    sums: Counter[str] = Counter()
    for ranks, number in parts["model"].items():
        name = "tensor" if ranks == mesh.tensor.ranks else "data" if ranks == mesh.data.ranks else "pipeline"
        sums[name] += number  # type: ignore[assignment]
    others = {"contrast": "terms", "reading": "reading", "muon": "muon"}
    return Sending(**sums, **{name: sum(parts[part].values()) for name, part in others.items()})  # type: ignore[arg-type]


def bandwidth(ranks: Sequence[int], node_size: int, rates: Rates) -> float:
    """Bytes/s of each process of a group. A ring over nodes enters and leaves each node once for each of the group's
    processes there, by their own network adapters."""
    nodes = Counter(rank // node_size for rank in ranks)
    if len(nodes) == 1:
        return rates.intra
    return min(rates.intra, rates.inter * min(nodes.values()))
