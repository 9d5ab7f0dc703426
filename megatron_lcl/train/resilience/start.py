"""Signals that come before a run has begun, while Python still imports: what takes them must itself import little."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""those that ask a run to end"""
REQUEUE = 75
"""exit code: stopped by a signal with everything saved, start me again (EX_TEMPFAIL of sysexits.h)"""
LOST = 71
"""exit code: a process or a machine was lost (EX_OSERR of sysexits.h); the last checkpoint is where to go on"""
WRITE_SECONDS = 5.0
"""that a process which ends gives to what it has to say: the storage may be what hangs"""


def handle(handler: Callable[[int, FrameType | None], object]) -> dict[signal.Signals, Any]:
    """Set a handler for `SIGNALS`, but for those that whoever started this process wants ignored, as `nohup` does
    SIGHUP; the handlers until then."""
    wanted = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in wanted}


def code_of_signal(signum: int) -> int:
    """The exit code of a run that a signal has ended in order."""
    return 128 + signum if signum == signal.SIGINT else REQUEUE


@contextmanager
def answer_signals(training: bool) -> Iterator[None]:
    """Until `train.resilience.signals` does it: a signal that asks a run to end gets the answer that a run gives.

    Alone, nothing has begun, and the process ends at once. Started by a launcher it has to end together with the
    others, as it will before their first step: until then the signals are held back. training: the command is `train`.
    """
    if not training or threading.current_thread() is not threading.main_thread():
        yield
        return
    launched = _launched(os.environ)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if launched else ())
    # a late copy of a signal that the run has answered may find threads of the run which do not hold it back
    handlers = handle(_ignore if launched else _end)
    try:
        yield
    finally:
        while launched and (pending := signal.sigpending() & set(SIGNALS)):  # the process ends by itself
            signal.sigwait(pending)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether this is a process of several: torchrun's, or a task of Slurm's srun (`launch.adopt_slurm`)."""
    given = "RANK" in environment and "WORLD_SIZE" in environment
    return given or (environment.get("SLURM_STEP_NUM_TASKS") or "1") != "1"


def _ignore(_signum: int, _frame: FrameType | None) -> None:
    """What ends is not ended again. (What SIG_IGN ignores, new programs would ignore, too.)"""


def _end(signum: int, _frame: FrameType | None) -> NoReturn:
    leave(code_of_signal(signum), f"{signal.Signals(signum).name}: stopped; the same command goes on")


def leave(code: int, message: str) -> NoReturn:
    """End this process now, from any thread and whatever the others do; its loader processes too."""
    within(WRITE_SECONDS, lambda: print(f"megatron-lcl: {message}", file=sys.stderr, flush=True))
    multiprocessing = sys.modules.get("multiprocessing")  # else there are none
    children = multiprocessing.active_children() if multiprocessing else []
    for child in children:
        child.kill()
    for child in children:
        child.join(1.0)  # leaves no zombie, even where process 1 of a container reaps none
    if (processes := sys.modules.get("megatron_lcl.processes")) is not None:  # else there is no folder of sockets
        within(WRITE_SECONDS, lambda: processes.remove_sockets(os.getpid()))
    os._exit(code)


def within(seconds: float, write: Callable[[], object]) -> None:
    """Write something, or leave it where that takes longer or fails: on a full disk, or in a pipe that nobody reads."""

    def attempt() -> None:
        with suppress(OSError):
            write()

    thread = threading.Thread(target=attempt, daemon=True)
    with suppress(RuntimeError):  # there may be no room for a thread either
        thread.start()
        thread.join(seconds)
