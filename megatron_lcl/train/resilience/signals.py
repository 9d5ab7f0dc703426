"""Signals that ask a run to end: it saves once and ends with a code that launch scripts turn into a requeue."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import TracebackType
from typing import Any

from megatron_lcl.train.resilience.start import SIGNALS, code_of_signal, handle, leave

SAME_SECONDS = 1.0
"""signals this close together are one: a scheduler and a launcher that passes signals on both reach a process"""


class Stopped(Exception):
    """A signal has ended the run after `step` steps; the newest checkpoint is of step `saved`."""

    def __init__(self, signum: int, step: int, saved: int) -> None:
        where = "from there" if saved == step else f"from step {saved}, for it could not be saved"
        super().__init__(f"{signal.Signals(signum).name}: ended after step {step}; the same command goes on {where}")
        self.code = code_of_signal(signum)


class Interrupted(Exception):
    """A signal has ended processes that this one had started and needs, and so this one, in the midst of a step."""

    def __init__(self, signum: int, error: BaseException) -> None:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        super().__init__(
            f"{signal.Signals(signum).name}: ended at once, as it has also ended what was needed ({what}); the same "
            "command goes on from the last checkpoint"
        )
        self.code = code_of_signal(signum)


def start_compilers() -> None:
    """Start the processes in which inductor compiles for a GPU, with the signals held back that ask a run to end.

    torch would start them with the first graph. A scheduler's signal also reaches them, and inductor waits for ever for
    what one that has gone was to compile. They also hold back the SIGTERM by which torch would end them in the midst of
    a compilation, and so end after it. Nothing is started where torch would start nothing.
    """
    from torch._inductor.async_compile import maybe_warm_pool

    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        maybe_warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Signals:
    """The first signal is kept until the end of a step; a second one, but for SIGHUP, ends the process at once.

    At once also means while the main thread waits in a collective, where no Python handler runs: the interpreter's C
    handler writes each signal's number into a pipe, and a thread reads it.
    """

    def __init__(self) -> None:
        self.received = 0
        """number of the first signal; 0: none yet"""
        self.answered = False
        """the run saves for it, and then ends"""
        self._handlers: dict[signal.Signals, Any] = {}
        self._ends: tuple[int, int] | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # a library call from another thread: signals are the caller's
        self._ends = os.pipe()
        os.set_blocking(self._ends[1], False)
        self._wakeup = signal.set_wakeup_fd(self._ends[1])
        self._handlers = handle(self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # those that `start` held back come now
        threading.Thread(target=self._listen, args=(self._ends[0],), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._ends is None:
            return
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._ends[1])  # the thread reads the end

    def _note(self, signum: int, _frame: object = None) -> None:
        """The main thread knows of a signal as soon as it can, the other thread where it cannot."""
        self.received = self.received or signum

    def _listen(self, end: int) -> None:
        first = True
        while number := os.read(end, 1):
            signum = number[0]
            if signum not in SIGNALS:
                continue
            if not first and signum == signal.SIGHUP:
                continue  # nobody insists by it: a shell passes it on, and as it ends the system sends it again
            if not first:
                leave(128 + signum, f"{signal.Signals(signum).name} again: ending at once")
            first = False
            self._note(signum)
            time.sleep(SAME_SECONDS)
            os.set_blocking(end, False)
            with contextlib.suppress(BlockingIOError):
                os.read(end, 1 << 16)  # what is there came within that time, whenever this process gets to read it
            os.set_blocking(end, True)
        os.close(end)
