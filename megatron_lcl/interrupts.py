"""Ctrl-C reaches every process of a terminal at once: the first one answers it, the others only end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_INTERRUPT = {signal.SIGINT}


@contextmanager
def holding_interrupts() -> Iterator[None]:
    """Ctrl-C comes afterwards, so that whoever starts processes knows of all that it has started.

    They are born with it held back, so that none is met importing: they let it through with `end_on_interrupt`, or are
    ended by who started them.
    """
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # where handlers run, whichever thread is met
    handler = signal.signal(signal.SIGINT, lambda signum, _frame: came.append(signum)) if in_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        if came:
            signal.raise_signal(signal.SIGINT)


def end_on_interrupt() -> None:
    """In a worker process: Ctrl-C ends it, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPT)
