"""The micro-batches of a step, copied to a CUDA device while it computes the step before.

On the stream that computes, a copy would wait for all that the device was given before. So copies have a stream of
their own, and those of a step begin when the step before has been handed to the device: the micro-batches of two steps
lie there then. They are made from page-locked memory, which torch gives to nobody else before the copies from it are
done; and memory of the device not before all streams that it knows of (`record_stream`) are done with a tensor there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from megatron_lcl.data.loading.batch import PackedBatch


class Step(NamedTuple):
    """The micro-batches of a step."""

    read: list[PackedBatch]
    """as they were read, on the host"""
    copies: list[PackedBatch]
    """the same on the device"""


class Prefetcher:
    """The steps of a loader, one after another."""

    def __init__(self, batches: Iterator[PackedBatch], micro_batches: int, device: torch.device) -> None:
        """micro_batches: of a step."""
        self._batches, self._number, self._device = batches, micro_batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Step | None = None
        self._error: Exception | None = None

    @property
    def reads_ahead(self) -> bool:
        """Whether `begin` does anything: on a CPU there is nothing to copy."""
        return self._stream is not None

    def begin(self) -> None:
        """Read the next step, if there is one, and begin to copy it. An error of the loader is raised by `take`, so
        that what the step before gave can still be recorded."""
        if self._stream is not None:
            try:
                self._next = self._read()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised later
                self._error = error

    def take(self) -> Step:
        """The next step; what the current stream is given from now on waits for its copies."""
        if self._error is not None:
            raise self._error
        step, self._next = self._next or self._read(), None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for batch in step.copies:
                batch.record_stream(current)
        return step

    def _read(self) -> Step:
        read = list(itertools.islice(self._batches, self._number))
        copying: Any = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with copying:
            return Step(read, [batch.to(self._device) for batch in read])
