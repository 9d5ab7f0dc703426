"""What a process sends: bytes counted where torch hands tensors to the network, each collective as `train.traffic`
says."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lcl.train.traffic import SMALL, ring

_SENDING: dict[str, tuple[int, Any, int]] = {
    "allreduce": (0, 1, 2),
    "broadcast": (0, 1, 1),
    "allgather": (0, 2, 1),
    "allgather_base": (0, 2, 1),
    "reduce_scatter_base": (1, 2, 1),
    "send": (0, 1, 0),
}
"""of torch's operations: which argument holds all that travels, which the group, passes of the ring (0: no ring)"""
_QUIET = ("recv", "barrier", "monitored_barrier")


class Traffic(TorchDispatchMode):
    """Counts while it is entered: `sent[ranks]`, bytes that this process sent in the group of these global ranks.

    What it sent to one process stands under (its rank, the other's).
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: defaultdict[tuple[int, ...], float] = defaultdict(float)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._count(function._opname, args)
        return function(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Any) -> None:
        operation = operation.strip("_")
        if operation in _QUIET:
            return
        if operation == "alltoall_base":
            self._count_all_to_all(args[1], args[2], args[4])
            return
        if operation not in _SENDING:
            raise NotImplementedError(f"bytes of c10d::{operation}")
        position, group, passes = _SENDING[operation]
        group = dist.ProcessGroup.unbox(args[group])
        tensors = args[position] if isinstance(args[position], list) else [args[position]]
        tensors = tensors[0] if isinstance(tensors[0], list) else tensors
        ranks = tuple(dist.get_process_group_ranks(group))
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if passes:
            self.sent[ranks] += ring(num_bytes, len(ranks), passes)
        elif num_bytes >= SMALL:
            self.sent[dist.get_rank(), ranks[args[2]]] += num_bytes

    def _count_all_to_all(self, numbers: Any, group: Any, lengths: list[int]) -> None:
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        to_others = numbers.numel() - lengths[ranks.index(dist.get_rank())]
        num_bytes = to_others * numbers.element_size()
        self.sent[ranks] += num_bytes if num_bytes >= SMALL else 0
