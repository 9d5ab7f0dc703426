"""Which process this is, along each axis of parallelism. One object, handed around; there is no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One axis: its processes, as a group and by their global ranks, and this process's place among them.

    `group` is None where the axis has one process: nobody is there to talk to, and the methods below do nothing.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    """global ranks, in the order of the axis"""

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce in place over the axis."""
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite with the tensor of the axis's process number `source`."""
        if self.group is not None:
            dist.broadcast(tensor, src=self.ranks[source], group=self.group)
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """Every process's value, in the order of the axis."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The value of the axis's process number `source`."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=self.ranks[source], group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes of the axis."""
        if self.group is not None:
            dist.barrier(group=self.group)


ALONE = Axis()
"""an axis that has this process only, of a run that has one"""


@dataclass(frozen=True)
class Mesh:
    """The axes of a run."""

    world: Axis
    """all processes"""
    data: Axis
    """replicas of the model; each sees other packs of the global batch"""
    pipeline: Axis = ALONE
    """parts of the list of stages, in order"""
    tensor: Axis = ALONE
    """shares of every layer"""
    model_parallel: Axis = ALONE
    """all processes of this data-parallel replica: its pipeline and tensor ranks"""
    data_tensor: Axis = ALONE
    """all processes of this pipeline stage: its data and tensor ranks, the latter next to each other"""

    @classmethod
    def of_world(cls) -> Mesh:
        """All processes of the initialized default group as data-parallel replicas."""
        world = _world()
        alone = Axis(ranks=(dist.get_rank(),))
        return cls(world, world, alone, alone, alone, world)

    @classmethod
    def of_lists(cls, lists: Mapping[str, Sequence[Sequence[int]]]) -> Mesh:
        """Axes by name, each as lists of global ranks that share it. All processes call it together."""
        return cls(_world(), **{name: _axis(of_axis) for name, of_axis in lists.items()})

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run: logs, progress, files of which there is one."""
        return self.world.rank == 0

    @property
    def loads_data(self) -> bool:
        """Whether this process reads the batches of its replica and hands them to the others."""
        return self.model_parallel.rank == 0


def _world() -> Axis:
    size = dist.get_world_size()
    return Axis(dist.group.WORLD, dist.get_rank(), size, tuple(range(size)))


def _axis(lists: Sequence[Sequence[int]]) -> Axis:
    rank = dist.get_rank()
    mine = tuple(next(ranks for ranks in lists if rank in ranks))
    group = None
    if len(mine) == dist.get_world_size():
        group = dist.group.WORLD
    elif len(mine) > 1:
        group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in lists])
    return Axis(group, mine.index(rank), len(mine), mine)
