"""Models that rules ask compute in one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()
"""The number is of the whole process: of two calls that overlap, one would find the other's 1 and put that back"""


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in one thread of this process meanwhile (also as a decorator).

    Kernels divide a sum among threads, so their number changes the last bits; without this it would be that of the
    cores, which a Slurm job has as many of as `--workers`. Several processes use several cores; Python's threads of one
    process wait for each other.
    """
    import torch

    with _LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
