"""Processes of this machine, each of which says at its end what came of it; none outlives who started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from megatron_lcl.interrupts import ENDING, end_with_command, holding_interrupts
from megatron_lcl.processes import importing_first

_PATIENCE = 10.0
"""seconds that processes have to end by themselves"""
K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


@dataclass(frozen=True)
class Lost:
    """A process ended before its function had returned."""

    exit_code: int
    """negative: the number of the signal that killed it"""


class Children(Generic[K, R]):
    """Processes by their keys. Call `end` in any case: they would be waited for when this process ends."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[Connection, tuple[K, BaseProcess]] = {}
        """by where a process says what its function returned, which ends with it"""

    def __len__(self) -> int:
        """Those of which `ended` has not told."""
        return len(self._running)

    def start(self, key: K, function: Callable[..., R], *arguments: Any) -> None:
        """Call an importable function in a process of its own; what it returns can be pickled."""
        reading, writing = self._context.Pipe(duplex=False)
        target, given = importing_first(_child, writing, function, arguments)
        process = self._context.Process(target=target, args=given)
        with holding_interrupts(ENDING):
            process.start()
            writing.close()
            self._running[reading] = key, process

    def ended(self, seconds: float) -> dict[K, R | Lost]:
        """What those returned that have ended since the last call; waits so long for one."""
        results: dict[K, R | Lost] = {}
        for words in wait(list(self._running), seconds):
            assert isinstance(words, Connection)
            key, process = self._running[words]
            results[key] = _result(words, process)
            del self._running[words]
            words.close()
        return results

    def end(self) -> None:
        """End those that still run; the processes that they have started end with them.

        Where a signal interrupts it, those are killed that have not ended by then.
        """
        processes = [process for _, process in self._running.values()]
        deadline = time.monotonic() + _PATIENCE
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()  # it may be stopped, or have told this signal to be ignored
            for process in processes:
                process.join()
            for words in self._running:
                words.close()
            self._running.clear()


def _child(words: Connection, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    end_with_command()
    words.send(function(*arguments))


def _result(words: Connection, process: BaseProcess) -> Any:
    """Read first: a process waits until a long text is taken from it."""
    found: list[Any] = []
    with contextlib.suppress(EOFError, OSError):
        found.append(words.recv())
    process.join()
    if found:
        return found[0]
    assert process.exitcode is not None
    return Lost(process.exitcode)
