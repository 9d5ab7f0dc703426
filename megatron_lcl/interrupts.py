"""Ctrl-C reaches every process of a terminal at once: the first one answers it, the others only end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

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


def end_with_parent() -> None:
    """In a worker process of multiprocessing: it ends as soon as its parent does, were that killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> NoReturn:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), so that what was begun elsewhere is ended. Not where it is another's already."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    code = 128 + signal.SIGTERM
    came: list[int] = []

    def end(signum: int, _frame: FrameType | None) -> NoReturn:
        came.append(signum)
        raise SystemExit(code)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        if came:  # extension modules make errors of their own of it
            raise SystemExit(code) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
