"""A test whose processes hang says where each of them is, and those that they have forked."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import stacks
from train.resilience.fleet import Fleet


def sleep_forked(parent: int, mark: str) -> None:
    Path(mark).touch()
    while os.getppid() == parent:
        time.sleep(0.05)
    os._exit(0)


def sleep_with_a_fork(rank: int, mark: str) -> None:
    parent = os.getpid()
    if os.fork() == 0:
        sleep_forked(parent, f"{mark} {rank}")
    time.sleep(600.0)


def assert_all_told(said: str) -> None:
    for function in ("sleep_forked", "sleep_with_a_fork"):
        innermost = rf"most recent call first\):\n  File .* in {function}\n"
        assert len(re.findall(innermost, said)) == 2, said


def test_processes_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "ANSWER_SECONDS", 60.0)  # of a busy machine
    mark = tmp_path / "sleeps"

    def begun() -> bool:
        return all(Path(f"{mark} {rank}").exists() for rank in range(2))

    def hang() -> None:
        with Fleet(tmp_path / "run", plant=sleep_with_a_fork, planted=(str(mark),)) as fleet:
            fleet.wait_for(begun)
            fleet.wait_for(lambda: False, timeout=0.0)

    with pytest.raises(AssertionError) as caught:
        hang()
    assert_all_told("\n".join(caught.value.__notes__))


def test_processes_of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "sleeps"

    def now() -> float:
        return 1e9 if all(Path(f"{mark} {rank}").exists() for rank in range(2)) else 0.0

    monkeypatch.setattr(stacks, "ANSWER_SECONDS", 60.0)  # of a busy machine
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=now))
    with pytest.raises(AssertionError, match="no result after 400") as caught:
        processes.run_processes(sleep_with_a_fork, 2, str(mark))
    assert_all_told(str(caught.value))
