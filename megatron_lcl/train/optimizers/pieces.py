"""Which tensors lie where in the flat partitions that DeepSpeed's ZeRO optimizers step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_lcl.parallel.layers import full_shape, is_split
from megatron_lcl.parallel.mesh import Mesh


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


Partition = tuple[torch.Tensor, list[Piece]]
"""a flat float32 tensor that DeepSpeed's base optimizer steps, and what lies in it, in order"""


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
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [(flat, list(_zero3(optimizer, group, mesh.data.rank))) for flat, group in groups]
    bfloat16 = hasattr(optimizer, "bf16_groups")  # ZeRO-1's own class for it
    flats = optimizer.fp32_groups_flat_partition if bfloat16 else optimizer.single_partition_of_fp32_groups
    groups = zip(flats, optimizer.bf16_groups if bfloat16 else optimizer.bit16_groups, strict=True)
    return [(flat, list(_zero12(optimizer, group))) for flat, group in groups]


def _zero12(optimizer: Any, group: list[Any]) -> Iterator[Piece]:
    """ZeRO-1 and 2: a run of all parameters of the group, one behind the other."""
    for parameter in group:
        if (mapping := parameter._hp_mapping) is not None:
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Piece(optimizer.param_names[parameter], here.start, here.numel, there.start)


def _zero3(optimizer: Any, group: list[Any], rank: int) -> Iterator[Piece]:
    """ZeRO-3: of every parameter an equal run, the last ones padded."""
    start = 0
    for parameter in group:
        size = parameter.partition_numel()
        offset = rank * size
        yield Piece(optimizer.param_names[parameter], start, max(0, min(size, parameter.ds_numel - offset)), offset)
        start += size
