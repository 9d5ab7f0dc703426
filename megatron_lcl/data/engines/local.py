"""Jobs as processes of this machine, as many at a time as it has CPUs for."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_lcl.data.engines.task import Task, do_logged
from megatron_lcl.errors import UserError
from megatron_lcl.interrupts import ENDING, end_with_command, holding_interrupts
from megatron_lcl.machine import num_cores
from megatron_lcl.processes import NEVER_BEGAN

_POLL = 1.0
"""seconds that `ended` waits"""
_PATIENCE = 10.0
"""seconds that a process has to end by itself"""


@contextlib.contextmanager
def opened(task: Task) -> Iterator[_Local]:
    """Ready for jobs."""
    task.logs.mkdir(parents=True, exist_ok=True)
    runner = _Local(task)
    try:
        yield runner
    finally:
        runner.end()


class _Local:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._context = multiprocessing.get_context("spawn")
        self._at_once = max(1, num_cores() // task.cpus)
        self._waiting: deque[int] = deque()
        self._running: dict[Connection, tuple[int, BaseProcess]] = {}
        """job and process by where that says what went wrong, which ends with it"""

    def submit(self, jobs: Sequence[int]) -> None:
        self._waiting.extend(jobs)

    def ended(self) -> Mapping[int, UserError | None]:
        while self._waiting and len(self._running) < self._at_once:
            self._start(self._waiting.popleft())
        errors: dict[int, UserError | None] = {}
        for words in wait(list(self._running), _POLL):
            assert isinstance(words, Connection)
            index, process = self._running[words]
            errors[index] = _outcome(process, words, self._task.log(index))
            del self._running[words]
            words.close()
        return errors

    def end(self) -> None:
        """Kill what still runs; the processes that jobs have started end with them."""
        for _, process in self._running.values():
            process.terminate()
        for words, (_, process) in self._running.items():
            process.join(_PATIENCE)
            process.kill()
            process.join()
            words.close()

    def _start(self, index: int) -> None:
        reading, writing = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_job, args=(self._task, index, writing))
        with holding_interrupts(ENDING):
            process.start()
            writing.close()
            self._running[reading] = index, process


def _job(task: Task, index: int, words: Connection) -> None:
    end_with_command()
    words.send(do_logged(task, index, "here"))


def _outcome(process: BaseProcess, words: Connection, log: Path) -> UserError | None:
    """Of a process that has said something, or has ended. Read first: it waits until a long text is taken from it."""
    found: list[UserError | None] = []
    with contextlib.suppress(EOFError, OSError):
        found.append(words.recv())
    process.join()
    if found:
        return found[0]
    exit_code = process.exitcode
    assert exit_code is not None
    if exit_code < 0:
        return UserError(f"killed by {signal.Signals(-exit_code).name}, perhaps out of memory")
    if not log.exists():
        return UserError(NEVER_BEGAN)
    return UserError(f"ended with exit code {exit_code}")
