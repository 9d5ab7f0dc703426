"""Which processes a test has started, however they were started: their environment has its mark."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

ROOT = Path(__file__).parents[3]


def marked(mark: str, **variables: str) -> dict[str, str]:
    """An environment for what a test starts."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "TEST_MARK": mark, **variables}


def processes_marked(mark: str) -> list[int]:
    """Those that live, zombies aside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST_MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # gone
            continue
    return found


def kill_tree(pid: int) -> None:
    """A process and its children, at once, as when a machine loses power."""
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").glob("*"):
            with gone():
                pids += map(int, (task / "children").read_text().split())
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for one in pids:
            with gone():
                os.kill(one, signum)


def gone() -> contextlib.suppress:
    """For what may have ended by itself."""
    return contextlib.suppress(FileNotFoundError, ProcessLookupError)
