"""A cache folder of several users: the umask says who may use what one has built, and nobody's files stop others."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest
from users import as_other, mode_of, needs_root, shared_folder, succeeds, umask

from megatron_lcl.data.loading.cache import RECORD, build_and_open, build_once, trim, using
from megatron_lcl.errors import UserError


def build(folder: Path) -> None:
    (folder / RECORD).write_text("{}")


def build_never(folder: Path) -> None:
    raise AssertionError(f"{folder} is built by another")


def make_old(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077], ids=oct)
def test_the_umask_says_who_may_use_what_is_built(tmp_path: Path, mask: int) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    with umask(mask):
        file.touch()
        folder.mkdir()
        built = build_once(tmp_path / "packs-x", build)
        assert mode_of(built) == mode_of(folder)
        assert mode_of(built / RECORD) == mode_of(tmp_path / "packs-x.lock") == mode_of(file)
        make_old(built, 4000)
        trim(tmp_path, 0, keep=tmp_path)
    assert not built.exists()
    assert mode_of(tmp_path / "packs-x.json") == mode_of(file)


def test_a_record_that_was_not_finished_is_cleared_away(tmp_path: Path) -> None:
    for name in (".packs-x.json.0.tmp", "packs-y.json.0.tmp"):  # as earlier releases named them
        (tmp_path / name).touch()
        make_old(tmp_path / name, 90000)
    trim(tmp_path, 0, keep=tmp_path)
    assert not list(tmp_path.iterdir())


@needs_root
@pytest.mark.parametrize("mode", [0o2777, 0o3777], ids=["all may write", "and delete only their own"])
def test_one_user_waits_while_another_builds(mode: int) -> None:
    with shared_folder(mode) as cache:
        with open(cache / "packs-x.lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            process = as_other(lambda: build_once(cache / "packs-x", build_never))
            process.join(0.5)
            assert process.is_alive()
            (cache / "packs-x").mkdir()
        assert succeeds(process)


@needs_root
@pytest.mark.parametrize("rights", [0o644, 0o600], ids=oct)
@pytest.mark.parametrize("mode", [0o2777, 0o3777], ids=["all may write", "and delete only their own"])
def test_what_a_killed_builder_left_stops_no_other_user(mode: int, rights: int) -> None:
    def use() -> None:
        built = build_once(cache / "packs-x", build)
        make_old(built, 4000)
        trim(cache, 0, keep=cache)
        assert not built.exists()

    with shared_folder(mode) as cache:
        for name in "abcdefghx":
            (cache / f"packs-{name}.lock").touch()
            (cache / f"packs-{name}.lock").chmod(rights)
            make_old(cache / f"packs-{name}.lock", 90000)
        assert succeeds(as_other(use))


@needs_root
@pytest.mark.parametrize("mask", [0o002, 0o022], ids=oct)
def test_what_cannot_be_emptied_keeps_its_name(mask: int) -> None:
    with shared_folder(0o2775) as cache:
        with umask(mask):
            make_old(build_once(cache / "packs-x", build), 4000)
        assert succeeds(as_other(lambda: trim(cache, 0, keep=cache)))
        left = {"packs-x.json"} if mask == 0o002 else {"packs-x", "packs-x.lock"}
        assert {path.name for path in cache.iterdir()} == left


@needs_root
def test_what_another_may_not_do_is_one_line() -> None:
    def reads() -> None:
        with pytest.raises(
            UserError, match=r"packs-x was built by another user, .*; have that user.*, or set data\.cache to another"
        ):
            build_and_open(cache / "packs-x", build_never, lambda folder: using(folder, RECORD))

    def builds() -> None:
        with pytest.raises(
            UserError, match=r"cannot be written to .* \(Permission denied\); make it writable, or set data\.cache"
        ):
            build_once(cache / "packs-y", build_never)

    with shared_folder(0o755) as cache:
        with umask(0o077):
            build_once(cache / "packs-x", build)
        assert succeeds(as_other(reads))
        assert succeeds(as_other(builds))
        (cache / "packs-y.lock").touch(0o644)
        assert succeeds(as_other(builds))
