"""Ctrl-C reaches every process of a terminal at once: the first one answers it, the others only end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_INTERRUPT = {signal.SIGINT}


@contextmanager
def holding_interrupts() -> Iterator[None]:
    """Processes that this thread starts meanwhile are born with Ctrl-C held back, so that none is met importing.

    They let it through with `end_on_interrupt`, or are ended by who started them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_on_interrupt() -> None:
    """In a worker process: Ctrl-C ends it, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPT)
