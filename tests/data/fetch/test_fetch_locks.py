"""`fetch` needs locks and says where there are none; those that wait for one go on, whatever became of the folder."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from data.fetch.test_outages import planned, work_on

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from megatron_lcl.cli import main
from megatron_lcl.data.corpus import scratch
from megatron_lcl.data.fetch import run
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.errors import UserError


def refusing(error: int) -> Callable[..., None]:
    def flock(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    return flock


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: int
) -> None:
    (tmp_path / "urls.txt").write_text("http://127.0.0.1:9/a")
    monkeypatch.setattr(fcntl, "flock", refusing(error))
    assert main(["fetch", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "store")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot be locked ({os.strerror(error)})" in line
    assert "take a folder on a file system that has locks" in line
    assert not (tmp_path / "store").exists()


@pytest.mark.timeout(60)
def test_a_part_that_cannot_be_locked_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only this request fails: another process may have the part."""
    plan = planned(tmp_path, ["http://live.example/a"])
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refusing(errno.EIO))
        with pytest.raises(UserError, match=r"part-00000\.lock cannot be locked \(Input/output error\)"):
            work_on(tmp_path, plan, 1)
    assert not list(tmp_path.glob("*.partial"))
    work_on(tmp_path, plan, 1)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["00000-00000.tar"]


@pytest.mark.timeout(60)
def test_those_that_waited_begin_anew_where_the_folder_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a command whose input was of no use. The second of them had waited for the lock of the removed file too."""
    output, waiting, lock = tmp_path / "store", threading.Semaphore(0), scratch.lock_descriptor
    (tmp_path / "urls.txt").write_text("http://live.example/a")

    def noted(descriptor: int, **options: Any) -> bool:
        if options.get("blocking", True):
            waiting.release()
        return lock(descriptor, **options)

    def plan() -> int:
        with run._planned(tmp_path / "urls.txt", output, Settings(), None, 1) as (plan, _):
            held = os.open(output / ".lock", os.O_RDWR)
            try:
                with pytest.raises(BlockingIOError):  # the one that is there is the one that is held
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(held)
            return sum(plan.parts)

    monkeypatch.setattr(scratch, "_POLL_SECONDS", 0.01)
    with ThreadPoolExecutor(2) as pool:
        with run._folder(output):
            monkeypatch.setattr(scratch, "lock_descriptor", noted)
            begun = [pool.submit(plan) for _ in range(2)]
            for _ in begun:
                assert waiting.acquire(timeout=30)
        assert [each.result(30) for each in begun] == [1, 1]
