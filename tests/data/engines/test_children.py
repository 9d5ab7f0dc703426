"""Protects: no process outlives who started it, whatever it does and however often it is told to end."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_lcl.data.engines import children
from megatron_lcl.data.engines.children import Children


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.timeout(60)
def test_ctrl_c_while_they_have_time_to_end_kills_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this process would wait for one that is stopped when it ends, without end."""
    monkeypatch.setattr(children, "_PATIENCE", 50.0)
    join, waits = BaseProcess.join, iter([True])

    def interrupted(process: BaseProcess, timeout: float | None = None) -> None:
        if timeout is not None and next(waits, False):
            os.kill(os.getpid(), signal.SIGINT)
        join(process, timeout)

    monkeypatch.setattr(BaseProcess, "join", interrupted)
    running: Children[int, None] = Children()
    running.start(0, stop)
    running.start(1, stop)
    processes = [process for _, process in running._running.values()]
    try:
        stats = [Path(f"/proc/{process.pid}/stat") for process in processes]
        while any(stat.read_text().rpartition(") ")[2][0] != "T" for stat in stats):
            time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            running.end()
        assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
        assert not len(running)
    finally:
        for process in processes:  # else pytest would wait for them when it ends
            process.kill()


class Deaf:
    """A process that does not end before it is killed."""

    def __init__(self, waited: list[float]) -> None:
        self.waited, self.killed = waited, False

    def terminate(self) -> None:
        pass

    def kill(self) -> None:
        self.killed = True

    def join(self, seconds: float | None = None) -> None:
        assert seconds is not None or self.killed
        self.waited.append(seconds or 0)
        time.sleep(seconds or 0)

    def close(self) -> None:
        pass


def test_all_have_the_same_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_PATIENCE", 1.0)
    running: Children[int, None] = Children()
    waited: list[float] = []
    deaf = [Deaf(waited) for _ in range(4)]
    running._running = cast(Any, {process: (k, process) for k, process in enumerate(deaf)})
    running.end()
    assert 0 < sum(waited) < 1.5
    assert all(process.killed for process in deaf)
