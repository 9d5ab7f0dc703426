"""Scratch folders: what a process that has ended left is removed, what another may be writing is not."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from megatron_lcl.data.corpus import scratch


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
    process = multiprocessing.get_context("fork").Process()
    process.start()
    process.join()
    machine, pid = scratch._machine() if here else "another", os.getpid() if alive else process.pid
    folder = tmp_path / f"scratch-{machine}-{pid}-0"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").touch()
    for path, time in ((folder / "below" / "file", written), (folder / "below", 1), (folder, 1)):
        if time is not None:
            os.utime(path, times=(time, time))
    scratch.clear_dead(tmp_path)
    assert folder.exists() == (stays or not here)
    scratch.clear_dead(tmp_path, 86400.0)
    assert folder.exists() == stays
