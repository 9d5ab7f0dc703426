"""Processes that write one output in object storage at the same time, and outputs that are not whole."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from data.storage.test_outputs_to_storage import files, objects, puts
from s3_server import Proxy

from megatron_lcl.data.corpus import scratch, upload
from megatron_lcl.data.corpus.upload import uploaded
from megatron_lcl.data.storage.names import UPLOADING
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once somebody waits for a lock."""
    lock, waiting = scratch.lock_descriptor, threading.Event()

    def noted(descriptor: int, **options: Any) -> bool:
        if "poll_interval" in options:
            waiting.set()
        return lock(descriptor, **options)

    monkeypatch.setattr(scratch, "lock_descriptor", noted)
    return waiting


@pytest.mark.timeout(60)
def test_of_two_that_find_an_output_finished_one_waits(
    s3: Proxy, place: str, tmp_path: Path, waits: threading.Event
) -> None:
    """Both find no folder. The records that the second one brings are not brought into that of the first, which would
    upload them as far as they are there, and the first does not remove what the second one reads."""
    there, store, work = {"a": b"one", "b.json": b"[1]", "c": b"more"}, Store(place), tmp_path / "work"
    for name, content in there.items():
        store.put(name, content)
    second_is_in, may_end = threading.Event(), threading.Event()

    def second() -> dict[str, bytes]:
        with uploaded(place, work, "a", resumes=True) as folder:
            second_is_in.set()
            assert may_end.wait(30)
            return files(folder)

    try:
        with ThreadPoolExecutor(1) as pool:
            with uploaded(place, work, "a", resumes=True) as folder:
                begun = pool.submit(second)
                assert waits.wait(30)
                (folder / "b.json").read_bytes()
            assert second_is_in.wait(30)
            with (
                pytest.raises(UserError, match=r"s3://.*: another process writes this output, in .*; wait until"),
                uploaded(place, work, None, resumes=False),
            ):
                pytest.fail("the first has deleted the lock under the second")
            may_end.set()
            assert begun.result(30) == {"a": b"one", "b.json": b"[1]"}
    finally:
        may_end.set()
    assert (objects(place), puts(s3)) == (there, ["a", "b.json", "c"])
    assert [*work.iterdir()] == []


def test_records_are_whole_where_others_read_them(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are no locks: a file that is being written has another name."""
    for name in ("a", "b.json"):
        Store(place).put(name, b"[1]")
    fetch, target = Store.fetch, tmp_path / "work" / quote("s3://bucket", safe="") / place.rpartition("/")[2]
    looked: list[dict[str, bytes]] = []

    def fetched(self: Store, names: Sequence[str], folder: Path) -> None:
        fetch(self, names, folder)
        looked.append(files(target))

    monkeypatch.setattr(Store, "fetch", fetched)
    for job in range(2):  # the folder stays for jobs, also where one has failed
        with (
            pytest.raises(UserError, match=f"^bad: {place}$") if job == 0 else contextlib.nullcontext(),
            uploaded(place, tmp_path / "work", "a", resumes=True, keep=True) as folder,
        ):
            assert (folder, files(folder)) == (target, {"a": b"[1]", "b.json": b"[1]"})
            if job == 0:
                raise UserError(f"bad: {folder}")
    assert looked == [{}]


def test_a_second_merge_removes_nothing_of_the_first(place: str, tmp_path: Path) -> None:
    with uploaded(place, tmp_path / "work", "a", resumes=False) as folder:
        folder.mkdir()
        (folder / "a").write_text("one")
        with (
            pytest.raises(UserError, match="another process writes this output"),
            uploaded(place, tmp_path / "work", "a", resumes=False),
        ):
            pytest.fail("it began")
        assert files(folder) == {"a": b"one"}
    assert objects(place) == {"a": b"one"}


def test_an_output_that_lacks_a_file_is_not_put(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "work" / quote("s3://bucket", safe="") / place.rpartition("/")[2]
    folder.mkdir(parents=True)
    (folder / "a").write_text(json.dumps({"files": {"b": {}, "tokens": {}}}))
    (folder / "b").touch()
    with (
        pytest.raises(UserError, match=r"lacks tokens \(1 in all\), which its a lists; remove that folder"),
        uploaded(place, tmp_path / "work", "a", resumes=True),
    ):
        pass
    assert [name for name, _ in Store(place).list()] == [UPLOADING]
    (folder / "tokens").touch()
    with uploaded(place, tmp_path / "work", "a", resumes=True):
        pass
    assert {*objects(place)} == {"a", "b", "tokens"}


def test_what_a_killed_process_left_is_not_put(place: str, tmp_path: Path) -> None:
    with uploaded(place, tmp_path / "work", "a", resumes=True) as folder:
        (folder / "scratch-x").mkdir(parents=True)
        for name in ("a", "scratch-x/b"):
            (folder / name).write_text(name)
    assert objects(place) == {"a": b"a"}


def test_what_another_job_is_removing_is_not_looked_at(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with uploaded(place, tmp_path / "work", "a", resumes=True) as folder:
        (folder / "scratch-x").mkdir(parents=True)
        for name in ("a", "scratch-x/b"):
            (folder / name).write_text(name)
        listed = upload.below

        def removed(folder: Path) -> list[Path]:
            found = [*listed(folder)]
            shutil.rmtree(folder / "scratch-x", ignore_errors=True)
            return found

        monkeypatch.setattr(upload, "below", removed)
    assert objects(place) == {"a": b"a"}
