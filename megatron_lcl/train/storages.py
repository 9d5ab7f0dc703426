"""The memory of tensors, counted storage by storage, as a process on a CPU or a device would hold them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lcl.losses import contrastive, generation, sigmoid
from megatron_lcl.train.engine import KEPT
from megatron_lcl.train.heap import Heap, Place


class Storages(TorchDispatchMode):
    """Bytes of all storages alive, and the most that there were. Numbers asked of a tensor without data are 1.

    `touched` is what a process on a CPU has of them. Small ones, freed, stay with it. Of the others it has the pages
    that were written: a buffer that is filled in part counts in part. And gloo copies what it gathers or scatters.
    `process` is that by its allocator: what lies between the small ones is not free for others, and what is free takes
    large ones, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.touched = self.process = 0
        self._small = self.small = self.kept = 0
        """of those whose memory is kept when they are freed, now, at most in this part, and at most"""
        self._heap = Heap()
        self._written = self.large = 0
        """of the others, what was written, now; and at most in this part, with what gloo copies"""
        self._apart = 0
        """of those outside the heap, what was written"""
        self._copies = 0
        """gloo's largest copy of those whose memory is kept: its threads have a heap of their own"""
        self._sizes: dict[int, int] = {}
        self._places: dict[int, Place] = {}
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self.losses = self.network = 0
        self._top = 0
        """the most since the loss began that is being computed"""
        self._resident: set[int] = set()
        self._sent: set[int] = set()
        """of those made in this step, what collectives read or write"""
        self._sending = 0
        """bytes of these"""

    def begin_step(self) -> int:
        """The peaks are of what follows; returns the bytes that are there."""
        self._resident = set(self._sizes)
        self._sent.clear()
        self.losses = self._sending = 0
        self.begin_part()
        return self.now

    def begin_part(self) -> None:
        """The peaks are of what follows, but for that of the losses: of a part of a step."""
        self.peak, self.small, self.network, self.large = self.now, self._small, self._sending, 0
        self._look()

    @contextlib.contextmanager
    def watching_losses(self) -> Iterator[None]:
        """Measure what the losses take here, forward and backward."""

        def measured(function: Any) -> Any:
            def call(*args: Any) -> Any:
                before, outer = self.now, self._top
                self._top = before
                try:
                    return function(*args)
                finally:
                    self.losses = max(self.losses, self._top - before)
                    self._top = max(self._top, outer)

            return staticmethod(call)

        with contextlib.ExitStack() as stack:
            for kind in (contrastive._ContrastiveFunction, sigmoid._SigmoidFunction, generation._GenerationFunction):
                for way in ("forward", "backward"):
                    stack.enter_context(mock.patch.object(kind, way, measured(getattr(kind, way))))
            yield

    def _add(self, tensor: torch.Tensor) -> bool:
        """Count the tensor's storage, if it is new; whether it is."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes or tensor.device.type == "meta":  # DeepSpeed keeps shapes so
            return False
        size = self._sizes[key] = storage.nbytes()
        self.now += size
        self.peak, self._top = max(self.peak, self.now), max(self._top, self.now)
        place = self._heap.take(size)
        if place is not None:
            self._places[key] = place
        if size <= KEPT:
            self._small += size
            self.small, self.kept = max(self.small, self._small), max(self.kept, self._small)
            self._apart += size if place is None else 0
        else:
            self._ranges[key] = []
        weakref.finalize(storage, self._free, key)
        return True

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.now -= size
        self._resident.discard(key)  # another storage may get its id
        if key in self._sent:
            self._sent.remove(key)
            self._sending -= size
        place = self._places.pop(key, None)
        if place is not None:
            self._heap.give(place, size)
        written = size if size <= KEPT else _length(self._ranges.pop(key))
        if size <= KEPT:
            self._small -= size
        else:
            self._written -= written
        self._apart -= written if place is None else 0

    def _write(self, tensor: torch.Tensor) -> None:
        """What the tensor shows of its storage is written."""
        key = id(tensor.untyped_storage())
        if key in self._ranges and tensor.numel():
            first = int(tensor.storage_offset()) * tensor.element_size()
            last = sum((n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            ranges = self._ranges[key]
            before = _length(ranges)
            ranges[:] = _merged([*ranges, (first, first + (last + 1) * tensor.element_size())])
            more = _length(ranges) - before
            self._written += more
            self._apart += more if key not in self._places else 0

    def _send(self, tensor: torch.Tensor) -> None:
        key = id(tensor.untyped_storage())
        if key in self._sizes and key not in self._resident and key not in self._sent:
            self._sent.add(key)
            self._sending += self._sizes[key]
            self.network = max(self.network, self._sending)

    def _copy(self, size: int) -> None:
        """gloo copies so much while it sends."""
        if size <= KEPT:
            self._copies = max(self._copies, size)
        else:
            self._look(size)

    def _look(self, more: int = 0) -> None:
        more += self._copies
        self.large = max(self.large, self._written + more)
        self.touched = max(self.touched, self.kept + self._written + more)
        self.process = max(self.process, self._heap.size + self._apart + more)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor

        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype  # uint8: DeepSpeed's flag of an overflow
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else int(dtype != torch.uint8)
        if func is torch.ops.prim.device.default:  # more than half of the calls: backward asks every gradient
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        reserves = func.overloadpacket in _RESERVING
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self._add(leaf) and not reserves:
                self._write(leaf)
        for leaf in _written_by(func, args, kwargs or {}):
            self._write(leaf)
            if func.namespace == "c10d":
                self._send(leaf)
        if func.overloadpacket in _COPIED:
            self._copy(sum(leaf.nbytes for leaf in tree_leaves(args[_COPIED[func.overloadpacket]])))
        self._look()
        return out


_RESERVING = {
    getattr(torch.ops.aten, f"{name}")
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
"""they give memory that is not written"""
_COPIED = {
    torch.ops.c10d._allgather_base_: 0,
    torch.ops.c10d.allgather_: 0,
    torch.ops.c10d.allgather_into_tensor_coalesced_: 0,
    torch.ops.c10d._reduce_scatter_base_: 1,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_: 1,
}
"""collectives of which gloo copies an argument, all of it: what an all-gather gives, what a reduce-scatter takes"""


def _written_by(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operation writes into."""
    if func.namespace == "c10d":
        yield from (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        return
    for n, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[n] if n < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of ranges [first, end) those that overlap or touch as one."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


def _length(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(end - first for first, end in ranges)
