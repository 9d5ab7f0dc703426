"""Processes that build a folder of the cache: one while others wait, as far as locks work."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forks import fork_context
from no_locks import without_locks

from megatron_lcl.data.loading import cache as cache_module
from megatron_lcl.data.loading.cache import build_once, trim


def _build_without_locks(folder: str, how: str, turn: int, start: Any) -> None:
    without_locks(how)

    def build(path: Path) -> None:
        (path / "one").write_text(str(turn))
        time.sleep(0.6)
        (path / "two").write_text(str(turn))

    start.wait()
    time.sleep(0.15 * turn)
    found = build_once(Path(folder), build)
    assert (found / "one").read_text() == (found / "two").read_text()


@pytest.mark.parametrize("how", ["not coherent", "refused"])
def test_builders_that_no_lock_keeps_apart_do_not_harm_each_other(tmp_path: Path, how: str) -> None:
    context = fork_context()
    start = context.Event()
    arguments = [(str(tmp_path / "packs-x"), how, turn, start) for turn in range(4)]
    processes = [context.Process(target=_build_without_locks, args=a) for a in arguments]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert {p.name for p in tmp_path.iterdir()} == {"packs-x", "packs-x.lock"}


def test_a_builder_that_only_seems_to_live_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine is gone and the server of files has not noticed, say: the lock stays, and nothing is built."""
    monkeypatch.setattr(cache_module, "LOST_SECONDS", 0.5)
    with open(tmp_path / "packs-x.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        live = tmp_path / "packs-x.other.tmp"
        live.mkdir()
        began = time.monotonic()
        build_once(tmp_path / "packs-x", lambda path: (path / "ours").touch())
        assert time.monotonic() - began >= 0.5
    assert (tmp_path / "packs-x" / "ours").exists()
    assert live.is_dir(), "who knows"


def test_a_builder_is_waited_for_whatever_the_clock_of_its_file_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That sets the times of files, and is an hour behind; time passes here only while one sleeps."""
    building, now, began = tmp_path / "packs-x.other.tmp", 0.0, time.time()
    building.mkdir()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > 3 * cache_module.LOST_SECONDS and building.exists():
            building.rename(tmp_path / "packs-x")
        elif building.exists():
            beat = began - 3600 + now // cache_module.BEAT_SECONDS * cache_module.BEAT_SECONDS
            os.utime(building, (beat, beat))

    def build_never(path: Path) -> None:
        raise AssertionError(path)

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now, time=lambda: began + now)
    monkeypatch.setattr(cache_module, "time", clock)
    with open(tmp_path / "packs-x.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert build_once(tmp_path / "packs-x", build_never).is_dir()
    assert now > 3 * cache_module.LOST_SECONDS


def test_a_long_build_is_seen_to_be_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "BEAT_SECONDS", 0.05)

    def build(path: Path) -> None:
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        trim(tmp_path, 0, tmp_path)  # by another process
        assert path.is_dir()

    build_once(tmp_path / "packs-x", build)
