"""Corpora of many objects: few descriptors stay open, files are counted seldom, and few requests open a corpus."""

from __future__ import annotations

import json
import os
import resource
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from corpora import random_documents, write_corpus
from forks import status_of
from s3_fixtures import readable_by_all, upload
from s3_server import Proxy
from users import mode_of, umask

from megatron_lcl.data.corpus import remote
from megatron_lcl.data.corpus.remote import Remote
from megatron_lcl.data.storage import blocks as module
from megatron_lcl.data.storage.blocks import BLOCK, LARGEST, Blocks, Room
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError

CONTENT = bytes(range(256)) * 32


class Objects:
    """All of one content."""

    def read(self, name: str, ranges: Sequence[tuple[int, int]], etag: str | None = None) -> list[bytes]:
        return [CONTENT[start:stop] for start, stop in ranges]


def in_child(action: Callable[[], None]) -> int:
    """Exit status of a forked process that has no file of this one open but stdout and stderr."""

    def act() -> None:
        os.closerange(3, 1 << 14)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            raise

    return status_of(act)


@pytest.mark.parametrize("hard", [64, 100])
def test_more_objects_than_files_may_be_open(tmp_path: Path, hard: int) -> None:
    def read_all() -> None:
        module._opened.clear()  # of other tests, whose descriptors are closed here
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, hard))
        room = Room(tmp_path, "objects", 1e9)
        opened = [Blocks(Objects(), f"{n}", len(CONTENT), None, tmp_path, room) for n in range(40)]  # type: ignore[arg-type]
        for _ in range(2):
            for blocks in opened:
                assert blocks.read(BLOCK, BLOCK + 10) == CONTENT[BLOCK : BLOCK + 10]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert hard // 4 <= len(os.listdir("/proc/self/fd")) <= hard // 2 + 4

    assert in_child(read_all) == 0


def test_the_umask_says_who_may_use_the_blocks(tmp_path: Path) -> None:
    with umask(0o002):
        (tmp_path / "file").touch()
        Blocks(Objects(), "0", len(CONTENT), None, tmp_path, Room(tmp_path, "none", 0)).read(0, 10)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "0", "0.have"}
    assert {mode_of(path) for path in tmp_path.iterdir()} == {mode_of(tmp_path / "file")}


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


def requests(s3: Proxy) -> tuple[int, int]:
    """HEAD requests, but for the manifest and the tokenizer, which this corpus's manifest does not list, and listings;
    since the last time."""
    seen = [(request.method, request.path) for request in s3.requests]
    s3.requests.clear()
    heads = sum(method == "HEAD" and not path.endswith(("corpus.json", "tokenizer.json")) for method, path in seen)
    return heads, sum("list-type" in path for _, path in seen)


@pytest.fixture
def stored(place: str, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A corpus of 3 shards in storage, and its manifest."""
    path = write_corpus(tmp_path / "corpus", random_documents(12, 3), 3).path
    return upload(path, place), json.loads((path / "corpus.json").read_text())


@pytest.mark.parametrize("damaged", [False, True])
def test_those_that_open_a_corpus_at_once_list_it_once(
    s3: Proxy, stored: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    place, manifest = stored
    name = "tokens-00001.idx"
    if damaged:
        Store(place).put(name, bytes(manifest["files"][name]["size"]))
    is_refused = partial(pytest.raises, UserError, match=name) if damaged else nullcontext
    one, other = (Remote(place, tmp_path, "corpus.json") for _ in range(2))
    versions, lock, waiting = Store.versions, remote.lock_descriptor, threading.Event()

    def locked(descriptor: int, *, blocking: bool = True) -> bool:
        if blocking:
            waiting.set()
        return lock(descriptor, blocking=blocking)

    def listed(store: Store, deep: bool) -> Any:
        begun.append(pool.submit(other.prepare, manifest))
        assert waiting.wait(30)
        return versions(store, deep)

    monkeypatch.setattr(remote, "lock_descriptor", locked)
    monkeypatch.setattr(Store, "versions", listed)
    s3.requests.clear()
    begun: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        with is_refused():
            one.prepare(manifest)
        with is_refused():
            begun[0].result(30)
    assert len(begun) == 1
    assert requests(s3) == (0, 1)
    assert other._objects == one._objects
    assert {name: about[0] for name, about in one._objects.items() if about} == {
        name: info["size"] for name, info in manifest["files"].items()
    }


def test_who_opens_a_corpus_later_sees_what_has_changed(
    s3: Proxy, stored: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    place, manifest = stored
    first, second = (Remote(place, tmp_path, "corpus.json") for _ in range(2))
    first.prepare(manifest)
    Store(place).put("images-00001.bin", b"another")
    Store(place).delete(["names-00002.bin"])
    s3.requests.clear()
    second.prepare(manifest)
    assert requests(s3) == (1, 1), "what is not in the list is asked for"
    assert second.size("images-00001.bin") == 7
    with pytest.raises(FileNotFoundError):
        second.size("names-00002.bin")
    with pytest.raises(StorageError, match=r"images-00001.bin"):
        first.blocks("images-00001.bin").read(0, 10)


def test_what_may_not_be_listed_is_asked_for(
    s3: Proxy, stored: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(store: Store, deep: bool) -> Any:
        raise StorageError("403")

    monkeypatch.setattr(Store, "versions", refused)
    place, manifest = stored
    for url in (place, readable_by_all(s3, place)):
        s3.requests.clear()
        opened = Remote(url, tmp_path, "corpus.json")
        opened.prepare(manifest)
        assert requests(s3) == (len(manifest["files"]), 0)
        assert opened.size("tokens-00002.bin") == manifest["files"]["tokens-00002.bin"]["size"]
