"""Which tensors lie where in the flat partitions that DeepSpeed's ZeRO optimizers step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_lcl.parallel.layers import full_shape, is_split
from megatron_lcl.parallel.mesh import Mesh

ELSEWHERE = "parameter_alignment"
"""DeepSpeed's option by which tensors lie elsewhere in its partitions than is known here"""


@dataclass(frozen=True)
class Tensor:
    """A parameter as one process would have it, and how tensor ranks share it."""

    shape: torch.Size
    """whole"""
    partition_dim: int | None
    """the dimension along which tensor ranks hold equal shards; None: each has all of it"""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter in a flat partition."""

    name: str
    """of the parameter, `{index}.name`"""
    start: int
    """of the first in the partition"""
    length: int
    """without the padding that ZeRO-3 puts behind a parameter"""
    offset: int
    """of the first in this tensor rank's shard of the parameter, flattened"""

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The elements, as a view of the partition or of a state that is as long."""
        return flat.narrow(0, self.start, self.length)


@dataclass(frozen=True)
class Partition:
    """A flat float32 tensor that DeepSpeed's base optimizer steps on this process, and its counterparts elsewhere."""

    flat: torch.Tensor
    pieces: list[Piece]
    """what lies in it, in order"""
    of_ranks: list[list[Piece]]
    """what lies in that of each data rank, on every tensor rank alike"""


def tensors_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of this process's parameters that are trained; to be asked before DeepSpeed has them."""
    return {
        name: Tensor(full_shape(p), p.partition_dim if is_split(p) else None)  # type: ignore[attr-defined]
        for name, p in parameters.items()
        if p.requires_grad
    }


def partitions_of(optimizer: Any, mesh: Mesh) -> list[Partition]:
    """The partitions of a DeepSpeed optimizer on this process, in the order in which it steps them.

    Every data and tensor rank has as many, of the same parameters, in the same order.
    """
    partitions = []
    for flat, group, pieces_of in _flat_groups(optimizer):
        named = [(optimizer.param_names[parameter], parameter) for parameter in group]
        of_ranks = [list(pieces_of(named, flat.numel(), rank)) for rank in range(mesh.data.size)]
        partitions.append(Partition(flat, of_ranks[mesh.data.rank], of_ranks))
    return partitions


def flats_of(optimizer: Any) -> list[torch.Tensor]:
    """`flat` of each of `partitions_of`, without the work of all ranks: for every step."""
    return [flat for flat, *_ in _flat_groups(optimizer)]


def _flat_groups(optimizer: Any) -> Iterator[tuple[torch.Tensor, list[Any], Callable[..., Iterator[Piece]]]]:
    """Each flat partition, the parameters of its group, and how they lie in it."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        flats, groups, pieces_of = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, _zero3
    elif hasattr(optimizer, "bf16_groups"):  # ZeRO-1's own class for bfloat16
        flats, groups, pieces_of = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, _zero12
    else:
        flats, groups, pieces_of = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, _zero12
    for flat, group in zip(flats, groups, strict=True):
        yield flat, group, pieces_of


def _zero12(group: list[tuple[str, Any]], size: int, rank: int) -> Iterator[Piece]:
    """ZeRO-1 and 2: the rank-th run, of a size, of all parameters of the group, one behind the other."""
    start = -rank * size
    for name, parameter in group:
        end = start + parameter.numel()
        if end > 0 and start < size:
            yield Piece(name, max(start, 0), min(end, size) - max(start, 0), max(-start, 0))
        start = end


def _zero3(group: list[tuple[str, Any]], size: int, rank: int) -> Iterator[Piece]:
    """ZeRO-3: of every parameter the rank-th of equal runs, the last ones padded."""
    start = 0
    for name, parameter in group:
        length = parameter.partition_numel()
        offset = rank * length
        yield Piece(name, start, max(0, min(length, parameter.ds_numel - offset)), offset)
        start += length
