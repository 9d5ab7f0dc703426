"""A corpus in object storage: its batches are those of the disk, whatever the network and the cache do."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from corpora import jpeg, random_documents, write_corpus
from forks import status_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_fixtures import readable_by_all, upload
from s3_server import Proxy

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.corpus import cache_folders, owners
from megatron_lcl.data.corpus import remote as module
from megatron_lcl.data.corpus.cache_folders import make_room
from megatron_lcl.data.corpus.remote import Remote, open_remote
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.ahead import _THREADS
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.pages import inspect
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.data.storage.blocks import BLOCK, Blocks, Room, disk_use
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError
from megatron_lcl.train.forks import forkserver

STEPS = 12
"""more than two epochs"""


@pytest.fixture
def local(once: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus on the disk, of 3 shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return once("storage-corpus", lambda folder: write_corpus(folder / "c", random_documents(60, 3), 3).path)


def loader(path: Any, cache: Path, **options: Any) -> PackedLoader:
    given = {"world_size": 1, "rank": 0, "steps": STEPS, "first_pack": 0}
    train = bool(options.pop("train", True))
    given |= {name: options.pop(name) for name in given.keys() & options.keys()}
    fields: dict[str, Any] = {"tokens_per_pack": 512, "images_per_pack": 4, "workers": 0, "look_ahead": 2, **options}
    data = Data(corpora=(Corpus(str(path)),), cache=str(cache), **fields)
    return PackedLoader(data, 4, 16, 96, global_batch=4, micro_batch=2, train=train, **given)


def contents(batches: Any) -> list[tuple[Any, ...]]:
    def of(batch: PackedBatch) -> tuple[Any, ...]:
        arrays = [*batch.integers().values(), batch.images]
        return batch.packs, batch.num_images, *(array.numpy().tobytes() for array in arrays)

    return list(map(of, batches))


def ranges(s3: Proxy) -> list[Any]:
    """Requests for parts of `.bin` files."""
    return [r for r in s3.requests if r.method == "GET" and r.path.endswith(".bin") and "names" not in r.path]


@pytest.mark.parametrize("limit", [1.0, 0.0], ids=["kept", "no room"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_disk(
    s3: Proxy, place: str, local: Path, tmp_path: Path, workers: int, limit: float
) -> None:
    upload(local, place)
    s3.latency, s3.unavailable, s3.cut = 0.02, 9, 7
    options = {"workers": workers, "storage_cache_gb": limit}
    expected, given = (loader(path, tmp_path / "cache", **options) for path in (local, place))
    assert contents(given) == contents(expected)
    if not workers:
        blocks = open_remote(place, str(tmp_path / "cache"), "corpus.json")._blocks.values()
        assert sum(len(b._held) for b in blocks) == 0
        assert {b._path.exists() for b in blocks} == {True}
        stored = sum(b._path.stat().st_blocks for b in blocks)
        assert (stored == 0) == (limit == 0)


def test_each_rank_reads_what_it_needs_and_resumes_anywhere(s3: Proxy, place: str, tmp_path: Path) -> None:
    documents = [[[d], (jpeg(d) + bytes(100_000), None, None)] for d in range(40)]
    corpus = write_corpus(tmp_path / "c", documents, 2)
    upload(corpus.path, place)
    options = {"world_size": 2, "rank": 1, "first_pack": 4, "steps": 1}
    expected = contents(loader(corpus.path, tmp_path / "cache", **options))
    s3.reset()
    remote = loader(place, tmp_path / "cache", **options)
    assert contents(remote) == expected
    origins = [o for packs in (batch[0] for batch in expected) for n in packs for o in remote.provenance(n)]
    images = {(image.shard, image.image) for origin in origins for image in origin.images}
    assert len(images) == 8
    sent = sum(request.sent for request in ranges(s3) if "images" in request.path)
    assert 1.0 < sent / sum(int(corpus.shard(k).image_sizes[j]) for k, j in images) < 1.3


def test_several_epochs_read_once_what_fits(s3: Proxy, place: str, local: Path, tmp_path: Path) -> None:
    upload(local, place)
    s3.reset()
    first = contents(loader(place, tmp_path / "cache"))
    size = sum(file.stat().st_size for file in local.glob("[it]*.bin"))
    read = sum(request.sent for request in ranges(s3))
    assert size / 2 < read < 2 * size
    s3.reset()
    assert contents(loader(place, tmp_path / "cache")) == first
    assert ranges(s3) == []


def test_nothing_is_asked_for_at_the_last_moment(
    place: str, s3: Proxy, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(local, place)
    fetch, late = Blocks._fetch, []

    def counted(self: Blocks, runs: list[tuple[int, int]]) -> Any:
        late.extend((self.name, block) for run in runs for block in range(*run) if not self._asked)
        return fetch(self, runs)

    monkeypatch.setattr(Blocks, "_fetch", counted)
    for limit in (1.0, 0.0):
        contents(loader(place, tmp_path / f"cache-{limit}", storage_cache_gb=limit))
    assert late == []


def test_what_a_disk_has_wrong_is_read_again(s3: Proxy, place: str, local: Path, tmp_path: Path) -> None:
    upload(local, place)
    expected = contents(loader(place, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").glob("corpora-*/")
    for file in folder.glob("*.bin"):
        if file.with_name(f"{file.name}.have").exists():  # a crash has lost what was written last
            size = file.stat().st_size
            file.write_bytes(b"\0" * size)
    s3.reset()
    assert contents(loader(place, tmp_path / "cache")) == expected
    assert ranges(s3)


def reading(path: str, cache: Path, environment: dict[str, str]) -> None:
    os.environ |= environment  # the server of the forks may have begun before it was so
    contents(loader(path, cache, look_ahead=1))


@pytest.mark.slow
def test_killed_again_and_again(s3: Proxy, place: str, local: Path, tmp_path: Path) -> None:
    upload(local, place)
    expected = contents(loader(local, tmp_path / "local"))
    context, draw, arguments = forkserver(), random.Random(1), (place, tmp_path / "cache", dict(os.environ))
    s3.latency, s3.cut = 0.05, 11
    process = context.Process(target=reading, args=arguments)
    for turn in range(3):
        other = context.Process(target=reading, args=arguments)
        other.start()
        seen = len(ranges(s3))
        while other.is_alive() and len(ranges(s3)) == seen:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        other.kill()
        other.join(60)
        assert other.exitcode == -signal.SIGKILL, "it was done before"
        if not turn:
            process.start()  # from now on two at once, on one cache
    process.join(120)
    assert process.exitcode == 0
    assert contents(loader(place, tmp_path / "cache")) == expected
    (folder,) = (tmp_path / "cache").glob("corpora-*/")
    assert not list(folder.glob("scratch-*"))


@pytest.mark.parametrize(("limit", "stays"), [(0.004, False), (0.5, True), (0.0, True)])
def test_the_limit_of_the_config_says_what_is_deleted_for_room(
    s3: Proxy, place: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, stays: bool
) -> None:
    """Of a corpus that nobody has read for a day: not what holds where no config says anything."""
    monkeypatch.setattr(module, "LIMIT", 1e9 if not stays else 1.0)
    upload(local, place)
    unused = tmp_path / "cache" / "corpora-unused"
    unused.mkdir(parents=True)
    (unused / "corpus.json").write_bytes(bytes(10_000_000))
    os.utime(unused, times=(time.time() - 2e5,) * 2)
    contents(loader(place, tmp_path / "cache", storage_cache_gb=limit, steps=2))
    assert unused.exists() == stays
    kept = sum(path.stat().st_blocks for path in (tmp_path / "cache").glob("corpora-*/*.have"))
    assert (kept > 0) == (limit > 0)


@pytest.mark.timeout(120)
def test_what_is_queued_is_not_read_once_the_batches_are_closed(
    s3: Proxy, place: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that fails would read on before its process ends."""
    upload(local, place)
    ahead, asked, held, closed = Blocks.ahead, [], threading.Semaphore(0), threading.Event()

    def waiting(self: Blocks, ranges: Any, turn: int) -> None:
        asked.append(turn)
        if turn and self.name.startswith("images"):
            held.release()
            assert closed.wait(60)
        ahead(self, ranges, turn)

    monkeypatch.setattr(Blocks, "ahead", waiting)
    before = set(threading.enumerate())
    batches = iter(loader(place, tmp_path / "cache", look_ahead=24, steps=100))
    next(batches)
    for _ in range(_THREADS):  # else one may have taken what was queued, and not have asked yet
        assert held.acquire(timeout=60)
    batches.close()  # type: ignore[attr-defined]
    begun = len(asked)
    closed.set()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(60)
    assert len(asked) == begun


def test_http_without_s3(s3: Proxy, place: str, local: Path, tmp_path: Path) -> None:
    upload(local, place)
    url = readable_by_all(s3, place)
    assert contents(loader(url, tmp_path / "a", steps=2)) == contents(loader(local, tmp_path / "a", steps=2))


def test_documents_and_statistics(place: str, s3: Proxy, local: Path) -> None:
    upload(local, place)
    remote, disk = open_corpus(place), open_corpus(local)
    assert len(remote) == len(disk)
    assert [remote[i] for i in (0, 31, 59)] == [disk[i] for i in (0, 31, 59)]
    assert remote.name(31) == disk.name(31)
    numbers, expected = inspect.stats(remote), inspect.stats(disk)
    assert numbers.pop("path") == place
    expected.pop("path")
    assert numbers == expected


def test_machines_that_no_lock_keeps_apart_copy_at_once(
    place: str, s3: Proxy, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(local, place)
    manifest, fetch, others = json.loads((local / "corpus.json").read_text()), Store.fetch, []

    def fetched(store: Store, *arguments: Any) -> None:
        fetch(store, *arguments)
        if not others:
            others.append(Remote(place, tmp_path, "corpus.json"))
            with monkeypatch.context() as patch:
                patch.setattr(owners, "machine", lambda: "another")
                others[0].prepare(manifest)

    monkeypatch.setattr(Store, "fetch", fetched)
    for each in (module, cache_folders):
        monkeypatch.setattr(each, "lock_descriptor", lambda *_, **__: True)
    first = Remote(place, tmp_path, "corpus.json")
    first.prepare(manifest)
    assert others[0].folder == first.folder
    for file in local.glob("*.idx"):
        assert (first.folder / file.name).read_bytes() == file.read_bytes()
    assert not list(first.folder.glob("scratch-*"))


def as_on_nfs(descriptor: Any, operation: int, flock: Callable[..., None] = fcntl.flock) -> None:
    """Exclusive locks are for those who may write."""
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    flock(descriptor, operation)


def without_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("flock", [as_on_nfs, without_locks])
def test_what_is_read_from_is_not_deleted_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: Callable[..., None]
) -> None:
    ages = {"used": 2e5, "unused": 2e5, "ahead": -2e5}  # the last when the clock was wrong
    for name in ages:
        (tmp_path / f"corpora-{name}").mkdir()
        (tmp_path / f"corpora-{name}" / "corpus.json").write_bytes(bytes(10_000))
    use = cache_folders.Use(tmp_path / "corpora-used", "corpus.json", 3600.0)
    for name, age in ages.items():
        os.utime(tmp_path / f"corpora-{name}", times=(time.time() - age,) * 2)
    monkeypatch.setattr(fcntl, "flock", flock)
    make_room(tmp_path / "corpora-new", -1, "corpora-")
    assert (tmp_path / "corpora-used" / "corpus.json").exists()
    for name in ("unused", "ahead"):
        assert (tmp_path / f"corpora-{name}").exists() == (flock is without_locks), "which cannot be known"
    del use
    make_room(tmp_path / "corpora-new", -1, "corpora-")
    assert (tmp_path / "corpora-used").exists() == (flock is without_locks)


def test_what_nobody_has_used_for_longest_is_deleted_first(tmp_path: Path) -> None:
    """Until there is room, and nothing that was used within a day."""
    ages = {"a": 3e5, "b": 4e5, "c": 2e5, "d": 1e4}
    for name, age in ages.items():
        (tmp_path / f"corpora-{name}").mkdir()
        (tmp_path / f"corpora-{name}" / "corpus.json").write_bytes(bytes(10_000))
        os.utime(tmp_path / f"corpora-{name}", times=(time.time() - age,) * 2)
    each = disk_use(tmp_path / "corpora-a")
    for room, names in ((4 * each, "abcd"), (3 * each, "acd"), (2 * each, "cd"), (0, "d")):
        make_room(tmp_path / "corpora-new", room, "corpora-")
        assert {path.name for path in tmp_path.iterdir()} == {f"corpora-{name}" for name in names}


def test_a_corpus_that_is_read_for_days_stays_a_used_one(
    s3: Proxy, place: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all of it is on the disk."""
    shard = open_corpus(upload(local, place), tmp_path / "cache").shard(0)
    (folder,) = (tmp_path / "cache").glob("corpora-*/")
    shard.pieces(0, shard.num_pieces)
    s3.reset()
    os.utime(folder, (1, 1))
    shard.pieces(0, shard.num_pieces)
    assert folder.stat().st_mtime == 1, "not at every read"
    clock = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + 4000)
    monkeypatch.setattr(cache_folders, "time", clock)
    shard.pieces(0, shard.num_pieces)
    assert folder.stat().st_mtime > 1
    assert ranges(s3) == []


def test_what_is_not_the_corpus_is_refused(place: str, s3: Proxy, local: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{place} is not a corpus: it has no corpus.json"):
        open_corpus(place)
    for raw, said in (
        (b"{", "is damaged; copy it again from where"),
        (b'{"format_version": 9}', "has format version 9"),
    ):
        Store(place).put("corpus.json", raw)
        open_remote.cache_clear()
        with pytest.raises(UserError, match=rf"^{place}/corpus.json {said}"):
            open_corpus(place)
    copy = shutil.copytree(local, tmp_path / "copy")
    index = bytearray((copy / "tokens-00001.idx").read_bytes())
    index[-1] ^= 1
    (copy / "tokens-00001.idx").write_bytes(index)
    with pytest.raises(UserError, match=rf"{place}/1/tokens-00001.idx is not the file that the manifest names"):
        open_corpus(upload(copy, f"{place}/1"), tmp_path / "cache-1")
    shutil.copy(local / "tokens-00001.idx", copy)
    (copy / "images-00000.bin").write_bytes((copy / "images-00000.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"/2/images-00000.bin has [\d,]+ bytes, but was written with"):
        open_corpus(upload(copy, f"{place}/2"), tmp_path / "cache-2").shard(0)
    Store(f"{place}/2").delete(["images-00000.bin"])
    with pytest.raises(UserError, match=r"/2/images-00000.bin is missing"):
        open_corpus(f"{place}/2", tmp_path / "cache-3").check_sizes()


@pytest.mark.parametrize("shape", ["{outside}", "../outside.json", "sub/outside.json"])
def test_a_name_that_leads_elsewhere_is_refused(place: str, local: Path, tmp_path: Path, shape: str) -> None:
    """Whoever writes a manifest would else write files of whoever opens it: keys, start-up files of a shell."""
    outside = tmp_path / "outside.json"
    name = shape.format(outside=outside)
    manifest = json.loads((local / "corpus.json").read_text())
    store, said = Store(upload(local, place)), f"lists {name!r}, which is no name of a file in its folder"
    if shape == "{outside}":
        store.put(name.removeprefix("/"), b"theirs")
    as_tokenizer = {**manifest, "tokenizer": {**manifest["tokenizer"], "file": name}}
    as_file = {**manifest, "files": {**manifest["files"], name: {"size": 6, "xxh3": "0" * 32}}}
    store.put("corpus.json", json.dumps(as_tokenizer).encode())
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        open_corpus(place, tmp_path / "cache")
    assert not outside.exists()
    outside.write_text("ours")
    store.put("corpus.json", json.dumps(as_file).encode())
    (fault,) = verify(place)
    assert fault.startswith(f"{place}/corpus.json {said}")
    assert outside.read_text() == "ours"


def test_a_tokenizer_is_no_file_of_another_program(place: str, local: Path, tmp_path: Path) -> None:
    """A checkpoint's config names a corpus and a cache, perhaps where somebody's editor looks for its plugins."""
    manifest = json.loads((local / "corpus.json").read_text())
    store = Store(upload(local, place))
    store.put("corpus.json", json.dumps({**manifest, "tokenizer": {**manifest["tokenizer"], "file": "x.vim"}}).encode())
    store.put("x.vim", b"theirs")
    with pytest.raises(UserError, match=rf"^{place}/corpus.json is damaged; copy it again from where"):
        open_corpus(place, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("x.vim"))


def test_a_cache_that_cannot_be_written(place: str, local: Path, tmp_path: Path) -> None:
    """What sets the folder is named: the environment in every command, `data.cache` in those that have it."""
    upload(local, place)
    file = tmp_path / "user-cache"
    file.write_text("")
    for cache, remedy in (
        (None, "make it writable, or set XDG_CACHE_HOME to another"),
        (file / "x", "make it writable"),
    ):
        with pytest.raises(UserError, match=rf"^{place} cannot be kept in {file}/.* \(.*\); {remedy}") as caught:
            open_corpus(place, cache)
        assert str(caught.value).endswith(", or set data.cache to another folder")
        assert "data.cache" not in caught.value.said()
    assert "data.cache" not in "".join(verify(place))


def test_a_manifest_that_the_disk_has_lost_is_fetched_again(place: str, local: Path, tmp_path: Path) -> None:
    upload(local, place)
    kept = open_corpus(place, tmp_path / "cache").path / "corpus.json"
    open_remote.cache_clear()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    assert len(open_corpus(place, tmp_path / "cache")) == 60
    assert kept.read_bytes() == whole


def test_an_object_of_another_size_is_not_fetched(s3: Proxy, place: str, local: Path, tmp_path: Path) -> None:
    """However large a server says it is."""
    upload(local, place)
    Store(place).put("tokens-00001.idx", bytes(10_000_000))
    s3.reset()
    with pytest.raises(UserError, match=r"1.idx is not the file that the manifest names \(10,000,000 bytes, not "):
        open_corpus(place, tmp_path / "cache")
    assert not [r for r in s3.requests if r.method == "GET" and r.path.endswith("tokens-00001.idx")]


def test_held_out_documents_in_order(place: str, s3: Proxy, local: Path, tmp_path: Path) -> None:
    upload(local, place)
    s3.latency, s3.cut = 0.01, 6
    path = Path(place)  # as the command line gives it
    expected, given = (contents(loader(p, tmp_path / "cache", steps=None, train=False)) for p in (local, path))
    assert given == expected
    assert len(given) > 3


def test_a_fork_while_blocks_are_asked_for(place: str, s3: Proxy, tmp_path: Path) -> None:
    store = Store(place)
    store.put("object", content := bytes(range(256)) * 256)
    room = Room(tmp_path, "none", 0)
    blocks = Blocks(store, "object", len(content), store.head(["object"])[0][1], tmp_path, room)
    s3.latency = 0.5
    thread = threading.Thread(target=blocks.ahead, args=([(0, 3 * BLOCK)], 0))
    thread.start()
    while not blocks._asked:
        time.sleep(0.001)

    def read() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        blocks.ahead([(BLOCK, 2 * BLOCK)], 0)
        assert blocks.read(BLOCK, 3 * BLOCK) == content[BLOCK : 3 * BLOCK]

    assert status_of(read) == 0
    thread.join(30)
    assert blocks.read(0, 3 * BLOCK) == content[: 3 * BLOCK]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 40 * BLOCK),
    wanted=st.lists(st.tuples(st.integers(0, 40 * BLOCK), st.integers(0, 5 * BLOCK)), max_size=6),
    limit=st.sampled_from([0.0, 8 * BLOCK, 1e9]),
    data=st.data(),
)
def test_any_ranges_of_any_object(
    place: str, s3: Proxy, tmp_path: Path, size: int, wanted: list[tuple[int, int]], limit: float, data: Any
) -> None:
    """Ranges read ahead, or not, in any order, whatever room there is, are the object's bytes."""
    content = np.random.default_rng(size).bytes(size)
    store, folder = Store(place), tmp_path / f"{size}-{time.monotonic_ns()}"
    store.put("object", content)
    folder.mkdir()
    blocks = Blocks(store, "object", size, store.head(["object"])[0][1], folder, Room(tmp_path, folder.name, limit))
    bounds = [(min(start, size), min(start + length, size)) for start, length in wanted]
    for turn in range(2):
        blocks.ahead(data.draw(st.lists(st.sampled_from(bounds))) if bounds else [], turn)
        for start, stop in data.draw(st.permutations(bounds)):
            assert blocks.read(start, stop) == content[start:stop]
        blocks.release(turn)
        assert not blocks._held
