"""Which process this is, along each axis of parallelism. One object, handed around; there is no global state."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


class RunError(ValueError):
    """Bad input that every process of a run finds, with the same message; the first one says it."""


@dataclass(frozen=True)
class Axis:
    """One axis: its process group, this process's place in it, and its size."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


@dataclass(frozen=True)
class Mesh:
    """The axes of a run."""

    data: Axis
    """replicas of the model; each sees other packs of the global batch"""

    @classmethod
    def of_world(cls) -> Mesh:
        """All processes of the initialised default group as data-parallel replicas."""
        return cls(Axis(dist.group.WORLD, dist.get_rank(), dist.get_world_size()))

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run: logs, progress, files of which there is one."""
        return self.data.rank == 0
