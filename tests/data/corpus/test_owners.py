"""Whose a scratch folder is: what a process left that has ended is removed, what another may be writing is not."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from clocks import set_back
from forks import fork_context

from megatron_lcl.data.corpus import owners, scratch

ANOTHER = f"{'f' * 32}-1"
"""machine"""


@pytest.mark.parametrize(
    ("here", "alive", "written", "stays"),
    [
        (True, True, 1, True),
        (True, False, None, False),
        (False, False, None, True),
        (False, True, 1, False),
    ],
    ids=["at work", "killed", "on another machine", "on another machine, a day ago"],
)
def test_left_or_in_use(tmp_path: Path, here: bool, alive: bool, written: int | None, stays: bool) -> None:
    process = fork_context().Process()
    process.start()
    process.join()
    machine, pid = owners.machine() if here else ANOTHER, os.getpid() if alive else process.pid
    folder = tmp_path / f"scratch-{machine}-{pid}-{'0' * 32}"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").touch()
    for path, when in ((folder / "below" / "file", written), (folder / "below", 1), (folder, 1)):
        if when is not None:
            os.utime(path, times=(when, when))
    scratch.clear_dead(tmp_path)
    assert folder.exists() == stays


def test_a_process_that_nobody_has_asked_how_it_ended_has_left_its_folder(tmp_path: Path) -> None:
    process = fork_context().Process()
    process.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[arg-type]
    folder = tmp_path / f"scratch-{owners.machine()}-{process.pid}-{'0' * 32}"
    folder.mkdir()
    scratch.clear_dead(tmp_path)
    process.join()
    assert not folder.exists()


@pytest.mark.parametrize("ahead", [2e5, -2e5])
def test_days_are_counted_by_the_clock_of_the_file_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """ahead: seconds by which this machine's is."""
    monkeypatch.setattr(owners, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    used, left = (tmp_path / f"scratch-{ANOTHER}-{number}-{'0' * 32}" for number in (1, 2))
    used.mkdir()
    left.mkdir()
    os.utime(left, times=(time.time() - 90_000,) * 2)
    scratch.clear_dead(tmp_path)
    assert (used.exists(), left.exists()) == (True, False)


def test_one_in_use_is_not_taken_for_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another machine, where nothing is written into it for a day."""
    set_back(monkeypatch)
    monkeypatch.setattr(scratch, "_BEAT_SECONDS", 0.01)
    with scratch.scratch_folder(tmp_path) as folder:
        os.utime(folder, times=(1, 1))
        ends = time.monotonic() + 30
        while folder.stat().st_mtime == 1 and time.monotonic() < ends:
            time.sleep(0.01)
        monkeypatch.setattr(owners, "machine", lambda: "another")
        scratch.clear_dead(tmp_path)
        assert folder.exists()


def test_another_users_process_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert owners._alive(os.getpid())


def test_one_that_cannot_be_looked_at_is_not_taken_for_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"scratch-{ANOTHER}-1-{'0' * 32}"
    (folder / "below").mkdir(parents=True)
    for path in (folder / "below", folder):
        os.utime(path, times=(1, 1))

    scandir, errors = os.scandir, [OSError(errno.ESTALE, os.strerror(errno.ESTALE))]

    def fail_once(path: Any) -> Any:
        if errors and Path(path) == folder:
            raise errors.pop()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail_once)
    scratch.clear_dead(tmp_path)
    assert folder.exists()
    scratch.clear_dead(tmp_path)
    assert not folder.exists()
