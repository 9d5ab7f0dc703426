"""Signals that end a command. Ctrl-C reaches every process of a terminal at once: the first one answers it, the others
only end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

ENDING = {signal.SIGINT, signal.SIGTERM}
_SAME_SECONDS = 10.0
"""within which a further SIGTERM is the same request"""


@contextmanager
def holding_interrupts(signals: Collection[signal.Signals] = (signal.SIGINT,)) -> Iterator[None]:
    """`deferring` for whoever starts processes, so that it knows of all that it has started.

    They are born with it held back, so that none is met importing: they let it through with `end_with_command`, or are
    ended by who started them.
    """
    resource_tracker.ensure_running()  # which lets the signals through where it is started in here
    with deferring(signals):
        yield


@contextmanager
def deferring(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Signals that come meanwhile come afterwards, each once."""
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # where handlers run, whichever thread is met

    def note(signum: int, _frame: FrameType | None) -> None:
        came.append(signum)

    handlers = {each: signal.signal(each, note) for each in signals} if in_main else {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for each, handler in handlers.items():
            signal.signal(each, handler or signal.SIG_DFL)
        for signum in dict.fromkeys(came):
            signal.raise_signal(signum)


def end_with_command() -> None:
    """In a worker process of multiprocessing: Ctrl-C ends it, without a traceback, and so does its parent's end, were
    that killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> NoReturn:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), so that what was begun elsewhere is ended. Not where it is another's already.

    Not again within ten seconds: schedulers send it repeatedly, while what was begun is being ended.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    code = 128 + signal.SIGTERM
    came: list[float] = []

    def end(_signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not came or now - came[-1] > _SAME_SECONDS:
            came.append(now)
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
