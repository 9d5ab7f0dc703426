"""Which process this is along each axis of parallelism, and the axis's collectives.

One `Mesh` is handed around, and none is kept here. Every collective of training and evaluation but the pipeline's
messages is a method of `Axis` (what measures or tests the network, in `plan` and `selftest`, calls torch's, too). All
processes of an axis call it together, with tensors of one shape and dtype. No gradient flows through them: `mappings`
has those with a gradient.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# named so since torch 2.13; the older names warn there
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def connect_on_demand() -> None:
    """In gloo groups made from now on, two processes connect when one first sends to the other.

    torch's default connects all to all where a group is made: sockets and requests to the store grow with the square
    of the processes, and past about a thousand of them, or a limit of 1,024 open files, no group comes about
    (pytorch/gloo issues 327 and 419). Sums and gathers go round a ring: a process talks to two others.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def join_processes(store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
    """The group of all processes, over NCCL on GPUs and gloo elsewhere, made as DeepSpeed makes a run's.

    That one is bound to its device, so NCCL connects at once, and every later group is split from it: what tries the
    network before a run has to try just that.
    """
    connect_on_demand()
    backend, device = "gloo", None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend, device = "nccl", local_device() if size > 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device)


def set_timeouts(seconds: float) -> None:
    """How long collectives begun from now on wait for other processes, in all groups that this process has by now.

    Libraries make groups too, such as DeepSpeed, which takes no timeout for its own. Under gloo the first message
    between two processes of a group waits for their connection (`connect_on_demand`), which no timeout ends.
    """
    groups: Any = dist.distributed_c10d._world.pg_names
    for group in list(groups):
        group.set_timeout(timedelta(seconds=seconds))


def local_device() -> torch.device:
    """Where this process computes: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class Pending:
    """A collective that has been started."""

    def __init__(self, result: torch.Tensor, work: Any = None, sent: torch.Tensor | None = None) -> None:
        self._result = result
        self._work = work
        self._sent = sent  # kept alive while it is being sent
        self._functions: list[Callable[[torch.Tensor], torch.Tensor]] = []

    def wait(self) -> torch.Tensor:
        """The result, once it has arrived; may be called again. On CUDA the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        self._work = self._sent = None
        while self._functions:
            self._result = self._functions.pop(0)(self._result)
        return self._result

    def then(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Pending:
        """This one, with `function` of its result in the result's place. `wait` calls it."""
        self._functions.append(function)
        return self


@dataclass(frozen=True)
class Axis:
    """One axis: its processes, as a group and by their global ranks, and this process's index among them."""

    group: dist.ProcessGroup | None = None
    """None where the axis has one process: then the collectives give back what they are given"""
    rank: int = 0
    size: int = 1
    """number of its processes"""
    ranks: tuple[int, ...] = (0,)
    """global ranks, in the order of the axis"""
    host_group: dist.ProcessGroup | None = None
    """the same processes, where `group` sends from devices only: tensors in host memory and objects travel by gloo, so
    that nobody waits for a device to hear of them; None: `group` sends these too"""

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None) -> Axis:
        """The processes of a group; without a group, this process alone.

        Raises ValueError if the group does not contain this process.
        """
        if group is None:
            return ALONE
        # new_group gives a process outside the group a number
        rank = dist.get_rank(group) if isinstance(group, dist.ProcessGroup) else -1
        if rank < 0:
            raise ValueError(
                "this process is not in the given process group; call this only on the group's ranks, "
                "or with group=None for this process alone"
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        return cls(group, rank, len(ranks), ranks)

    @classmethod
    def of_all(cls) -> Axis:
        """All processes, which call it together."""
        hosts: Any = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None
        return replace(cls.of_group(dist.group.WORLD), host_group=hosts)

    def _group_of(self, tensor: torch.Tensor) -> dist.ProcessGroup | None:
        """The group by which a tensor travels."""
        return self.host_group if self.host_group is not None and tensor.device.type == "cpu" else self.group

    # What is waited for at once is started like the rest. NCCL could send it from the current stream, which saves two
    # events a call; a step has few of these (counts, sums of rows).

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every process's tensor, in the order of the axis: [size, *tensor.shape]."""
        return self.start_all_gather(tensor).wait()

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """Start `all_gather`."""
        if self.group is None:
            return Pending(tensor[None])
        sent = tensor.detach().contiguous()
        gathered = sent.new_empty(self.size, *sent.shape)
        if not sent.numel():
            return Pending(gathered)
        work = all_gather_single(gathered.view(-1), sent.view(-1), group=self._group_of(sent), async_op=True)
        return Pending(gathered, work, sent)

    def gather_ragged(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Every process's rows, in the order of the axis: [sum(counts), ...].

        counts: rows of each process, known to all of them. Messages are padded to the largest; there is none where all
        are 0.
        """
        return self.start_gather_ragged(rows, counts).wait()

    def start_gather_ragged(self, rows: torch.Tensor, counts: Sequence[int]) -> Pending:
        """Start `gather_ragged`."""
        assert len(rows) == counts[self.rank], f"{len(rows)} rows, not {counts[self.rank]}"
        longest = max(counts)
        if self.group is None or longest == 0:
            return Pending(rows)
        if len(rows) < longest:
            padded = rows.new_zeros(longest, *rows.shape[1:])
            padded[: len(rows)] = rows.detach()
            rows = padded

        def joined(gathered: torch.Tensor) -> torch.Tensor:
            if min(counts) == longest:
                return gathered.flatten(0, 1)
            return torch.cat([of_rank[:count] for of_rank, count in zip(gathered, counts, strict=True)])

        return self.start_all_gather(rows).then(joined)

    def reduce_scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum over the axis of rows [size * n, ...], of which each process gets its n."""
        return self.start_reduce_scatter(rows).wait()

    def start_reduce_scatter(self, rows: torch.Tensor) -> Pending:
        """Start `reduce_scatter`."""
        if self.group is None:
            return Pending(rows)
        assert len(rows) % self.size == 0, f"{len(rows)} rows over {self.size} processes"
        sent = rows.detach().contiguous()
        own = sent.new_empty(len(sent) // self.size, *sent.shape[1:])
        return Pending(own, reduce_scatter_single(own, sent, group=self.group, async_op=True), sent)

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce in place over the axis, to the sum unless `op` says otherwise; returns the tensor."""
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self._group_of(tensor))
        return tensor

    def all_to_all(self, numbers: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Numbers [sum(sent)], one run for each process → the runs that all of them have for this one [sum(received)].

        sent, received: lengths of the runs, in the order of the axis.
        """
        if self.group is None:
            return numbers
        result = numbers.new_empty(sum(received))
        dist.all_to_all_single(result, numbers.contiguous(), list(received), list(sent), group=self.group)
        return result

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite with the tensor of the axis's process with index `source`."""
        if self.group is not None:
            dist.broadcast(tensor, src=self.ranks[source], group=self._group_of(tensor))
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """Every process's value, in the order of the axis."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group or self.group)
        return values

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The value of the axis's process with index `source`."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=self.ranks[source], group=self.host_group or self.group)
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
    """stages of the pipeline: consecutive layers of the model, in order"""
    tensor: Axis = ALONE
    """shards of every layer"""
    model_parallel: Axis = ALONE
    """all processes of this data-parallel replica: its pipeline and tensor ranks"""
    data_tensor: Axis = ALONE
    """all processes of this pipeline stage: its data and tensor ranks, the latter next to each other"""

    @classmethod
    def of_lists(cls, lists: Mapping[str, Sequence[Sequence[int]]]) -> Mesh:
        """Axes by name, each as lists of global ranks that share it. All processes call it together."""
        world = Axis.of_all()
        return cls(world, **{name: _axis(of_axis, world.host_group) for name, of_axis in lists.items()})

    @property
    def is_first(self) -> bool:
        """Whether this process writes for the whole run: logs, progress, files of which there is one."""
        return self.world.rank == 0

    @property
    def loads_data(self) -> bool:
        """Whether this process loads the batches of its replica and broadcasts them to the others."""
        return self.model_parallel.rank == 0


def _axis(lists: Sequence[Sequence[int]], hosts: dist.ProcessGroup | None) -> Axis:
    """hosts: all processes, by gloo, where the groups of the run send from devices only."""
    rank = dist.get_rank()
    mine = tuple(next(ranks for ranks in lists if rank in ranks))
    group: Any = None  # torch 2.15 says that a new group may be the number which it gives who is no member of it
    host_group: Any = None
    if len(mine) == dist.get_world_size():
        group, host_group = dist.group.WORLD, hosts
    elif len(mine) > 1:
        # with its members alone: elsewise all processes wait for each other at every group of the run. NCCL's they wait
        # for all the same, as it is split from the group of all: each process calls once, its lists being of one length
        group = dist.new_group(list(mine), use_local_synchronization=True)
        if hosts is not None:
            host_group = dist.new_group(list(mine), backend="gloo", use_local_synchronization=True)
    return Axis(group, mine.index(rank), len(mine), mine, host_group)
