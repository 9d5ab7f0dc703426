"""The `megatron-lcl` command: arguments to library calls, errors to one line.

One file per group of commands: training, corpus, curating, fetching, planning, evaluation. Each has `add_commands`,
which adds its parsers, and a thin function per command, which calls the library and returns the exit code (None: 0).
May import everything. What is slow to import is imported only inside the function of the command that needs it:
`--help` stays quick. Nothing imports this package except `python -m megatron_lcl` and the scripts of `tools/`. Begin
with command.py.

`main` is in place before anything that takes time is imported, so that a signal is answered from the first moment.
Standard streams that are closed, full, or read by nobody end no command (streams.py).
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from megatron_lcl.cli.streams import lasting_streams
from megatron_lcl.train.resilience.start import answer_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Without `arguments` they are the process's own, which ends with that code
    whatever its program does afterwards."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ended: list[object] = []
    """with which exit code"""
    if arguments is None:
        # what is imported stays: looked at for garbage after every 700 new objects, imports take a tenth longer
        gc.set_threshold(20_000)
        atexit.register(_end_at_once, ended)  # before all others, so it runs after them
    with lasting_streams(), _interruptible(ends=arguments is None) as interrupts:
        try:
            with answer_signals(training=given[:1] == ["train"]):
                from megatron_lcl.cli.command import run

                code = run(given)
        except BaseException as error:
            # extension modules turn it into errors of their own where it comes while they are imported
            if not interrupts:
                ended.append(error.code if isinstance(error, SystemExit) else 1)
                raise
            code = 128 + signal.SIGINT
    ended.append(code)
    if arguments is None and threading.current_thread() is threading.main_thread():
        # a late copy of one that was answered changes no exit code
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, lambda *_: os._exit(code))
    return code


def _end_at_once(ended: Sequence[object]) -> None:
    """Where torch is imported, the process ends with its exit code before Python takes its modules apart, and after all
    exit handlers but those that were registered before the command.

    That takes half a second and more. And threads of gloo may still let go of tensors: one that waits for Python's lock
    then is ended in the middle of a destructor, and C++ aborts the process, exit code 134.
    """
    if "torch" in sys.modules and ended and isinstance(code := ended[0], int):
        with suppress(OSError, ValueError):  # a pipe that nobody reads, a full disk: Python says so
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


@contextmanager
def _interruptible(ends: bool) -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt, and leaves a mark in the list. ends: this process does, afterwards."""
    marks: list[int] = []

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        marks.append(signum)
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, nor another's
    if not ours or threading.current_thread() is not threading.main_thread():
        yield marks
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield marks
    finally:
        # a process that ends has nothing to say about Ctrl-C; a caller of `main` goes on as before
        signal.signal(signal.SIGINT, signal.SIG_DFL if ends else signal.default_int_handler)
