"""Of however many objects and files: few descriptors stay open, and seldom are the files counted."""

from __future__ import annotations

import os
import resource
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lcl.data.storage import blocks as module
from megatron_lcl.data.storage.blocks import BLOCK, LARGEST, Blocks, Room

CONTENT = bytes(range(256)) * 32


class Objects:
    """All of one content."""

    def read(self, name: str, ranges: Sequence[tuple[int, int]], etag: str | None = None) -> list[bytes]:
        return [CONTENT[start:stop] for start, stop in ranges]


def in_child(action: Callable[[], None]) -> int:
    """Exit status of a forked process that has no file of this one open but stdout and stderr."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        os.closerange(3, 1 << 14)
        action()
    except BaseException:  # noqa: BLE001 the parent tells by the status
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("hard", [64, 100])
def test_more_objects_than_files_may_be_open(tmp_path: Path, hard: int) -> None:
    def read_all() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, hard))
        room = Room(tmp_path, "objects", 1e9)
        opened = [Blocks(Objects(), f"{n}", len(CONTENT), None, tmp_path, room) for n in range(40)]  # type: ignore[arg-type]
        for _ in range(2):
            for blocks in opened:
                assert blocks.read(BLOCK, BLOCK + 10) == CONTENT[BLOCK : BLOCK + 10]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert hard // 4 <= len(os.listdir("/proc/self/fd")) <= hard // 2 + 4

    assert in_child(read_all) == 0


def test_seldom_are_files_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, used, counted = 1000.0, 0, []

    def disk_use(folder: Path) -> int:
        nonlocal now
        counted.append(now)
        now += 2.0
        return used

    monkeypatch.setattr(module, "disk_use", disk_use)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    (tmp_path / "a").mkdir()
    room = Room(tmp_path, "a", 3 * LARGEST)

    def takes(seconds: float) -> list[Any]:
        """What is answered, a second after the other, and how often it counts."""
        nonlocal now
        counted.clear()
        answers = []
        for _ in range(int(seconds)):
            answers.append(room.take(LARGEST // 4))
            now += 1.0
        return [sum(answers), len(counted)]

    assert takes(8) == [8, 1]
    used = 3 * LARGEST
    assert takes(12) == [4, 0], "no more than a tenth of the time is spent on it"
    assert takes(500) == [0, 1]
    assert takes(99) == [0, 0], "where there is no room, none is to be expected soon"
    room.limit *= 2
    assert takes(1) == [1, 0], "another limit counts at once"
