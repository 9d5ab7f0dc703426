"""Shared memory, in which loader processes hand over their micro-batches."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.errors import UserError, free_space
from megatron_lcl.units import in_bytes

FOLDER = Path("/dev/shm")
PREFETCH = 2
"""micro-batches that each loader process makes ahead, the one that it is making included"""
_REMEDY = "give the container more (--shm-size or --ipc=host of docker)"


def free_shared_memory() -> float:
    """Bytes; infinite where the system does not show it as a folder, or it has no limit."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return math.inf
    return found.f_bavail * found.f_frsize if found.f_blocks else math.inf  # a tmpfs of size=0 says 0 of everything


def check_shared_memory(needs: float, workers: int, replicas: int, free: float) -> None:
    """UserError where micro-batches that lie there at once are more than is free.

    needs: bytes of a replica's; workers: of a replica; replicas: on this machine; free: bytes.
    """
    if workers and replicas * needs > free:
        of = f" of each of {replicas} replicas on a machine" if replicas > 1 else ""
        raise UserError(
            f"the {workers} loader processes{of} hand over their batches in {FOLDER}, up to "
            f"{in_bytes(replicas * needs)} at once, and {in_bytes(free)} are free there; {_REMEDY}",
            {"--data.workers": f", or lower data.workers ({workers})"},
        )


def workers_with_room(workers: int, batch: int) -> int:
    """How many of so many loader processes have room there for their micro-batches, of so many bytes each."""
    free, each = free_shared_memory(), PREFETCH * batch
    return workers if workers * each <= free else int(free // each)


def put_there(batch: PackedBatch) -> PackedBatch:
    """Move a batch there. UserError where it is full.

    Left to the queue of `multiprocessing`, this would fail in a thread of it that drops the batch, for which the main
    process would wait for ever.
    """
    try:
        for tensor in (batch.tokens, batch.images):  # all integers are in one storage
            tensor.share_memory_()
    except RuntimeError as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise UserError(
            f"loader processes cannot hand over their batches: {free_space(FOLDER)}; {_REMEDY}",
            {"--data.workers": ", or lower data.workers"},
        ) from None
    return batch
