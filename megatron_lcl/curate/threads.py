"""Models that rules ask compute in one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in one thread of this process meanwhile (also as a decorator).

    Kernels divide a sum among threads, so their number changes the last bits; without this it would be that of the
    cores, which a Slurm job has as many of as `--workers`. Several processes use several cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
