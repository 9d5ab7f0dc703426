"""The cache: bounded, and any of it may go while others read. Its builders: test_builders.py."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pwd
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from corpora import MakeCorpus, jpeg, random_documents
from forks import fork_context
from no_locks import without_locks

from megatron_lcl import config as configs
from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.corpus import cache_folders
from megatron_lcl.data.corpus.cache_folders import user_cache
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.loading import cache as cache_module
from megatron_lcl.data.loading import ledger as ledger_module
from megatron_lcl.data.loading import pack_index as pack_index
from megatron_lcl.data.loading import source as source_module
from megatron_lcl.data.loading.cache import Rows, build_and_open, build_once, trim, using
from megatron_lcl.data.loading.ledger import Ledger, open_ledger
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.rules import INTERLEAVED
from megatron_lcl.data.loading.source import Source, open_source
from megatron_lcl.data.pages.replay import replay_html
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.features import default_cache

P, CONTEXT, PACKS = 4, 128, 260


def test_shards_are_measured_at_once(make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process measures while all others wait: of three billion documents, half an hour by one core."""
    documents = random_documents(40, 3)
    whole, parts = (make_corpus(f"{n} shards", documents, num_shards=n) for n in (1, 4))
    pieces_of, together = source_module.pieces_of, threading.Barrier(4, timeout=60)

    def together_of(shard: Shard) -> Any:
        together.wait()
        return pieces_of(shard)

    def sources() -> Iterator[Source]:
        for corpus, function in ((whole, pieces_of), (parts, together_of)):
            monkeypatch.setattr(source_module, "pieces_of", function)
            yield open_source(corpus, Data(cache=str(tmp_path / "cache")), P, CONTEXT, 7)

    one, four = sources()
    assert one.tokens.tolist() == four.tokens.tolist()
    assert one.images.tolist() == four.images.tolist()


def test_a_shard_is_mapped_no_longer_than_it_is_measured(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mapped counts as the process's memory: of ten million documents 1.5 GiB."""
    corpus, measure, mapped = make_corpus("c", random_documents(40, 3), num_shards=4), source_module.measure, []

    def shards_mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len({line.split()[-1] for line in lines if f"{corpus.path}/tokens-" in line and line.endswith(".idx")})

    def measured(*arguments: Any) -> None:
        measure(*arguments)
        mapped.append(shards_mapped())

    monkeypatch.setattr(source_module, "_THREADS", 1)
    monkeypatch.setattr(source_module, "measure", measured)
    open_source(corpus, Data(cache=str(tmp_path / "cache")), P, CONTEXT, 7)
    assert mapped == [1, 1, 1, 1]
    assert shards_mapped() == 0


# --- states ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_index, "MIN_CHUNK", 100)
    monkeypatch.setattr(pack_index, "CHUNK", 120)


@pytest.fixture
def data(make_corpus: MakeCorpus, tmp_path: Path) -> Data:
    corpus = make_corpus("c", random_documents(300, 10))
    return Data(corpora=(Corpus(str(corpus.path)),), tokens_per_pack=256, cache=str(tmp_path / "first"), workers=0)


def entries_of(index: PackIndex, packs: range) -> list[Any]:
    return [index[n].entries.tolist() for n in packs]


def as_saved(ledger: Ledger) -> Ledger:
    return Ledger.from_json(json.loads(json.dumps(ledger.to_json())))


def chunks_in(data: Data) -> list[Path]:
    return sorted(path for path in Path(str(data.cache)).glob("packs-*") if path.is_dir() and not path.suffix)


def elsewhere(data: Data, name: str) -> Data:
    """The same with an empty cache."""
    return dataclasses.replace(data, cache=str(Path(str(data.cache)).with_name(name)))


def test_a_run_goes_on_by_building_one_chunk(data: Data) -> None:
    index = PackIndex(data, open_ledger(data, P, CONTEXT))
    truth = entries_of(index, range(PACKS))
    assert len(index.chunks) > 6
    for at in (0, index.chunks[2].first, index.chunks[4].first + 1, index.chunks[5].stop - 1):
        saved = as_saved(index.ledger_at(at))
        assert [s["pack"] for s in saved.states] == [c.first for c in index.chunks if 0 < c.first <= at]
        fresh = elsewhere(data, f"from {at}")
        later = PackIndex(fresh, open_ledger(fresh, P, CONTEXT, previous=saved, consumed=at))
        later.prepare(at)
        assert len(chunks_in(fresh)) == 1
        assert entries_of(later, range(at, PACKS)) == truth[at:]
        assert later.ledger_at(PACKS).states == index.ledger_at(PACKS).states, "no state is lost or twice"


def test_a_ledger_that_keeps_few_states_gives_the_same_packs(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "STATES", 4)
    index = PackIndex(data, open_ledger(data, P, CONTEXT))
    truth = entries_of(index, range(PACKS))
    saved = as_saved(index.ledger_at(PACKS - 1))
    assert 2 <= len(saved.states) <= 4 < len(index.chunks) - 2
    fresh = elsewhere(data, "fresh")
    later = PackIndex(fresh, saved)
    later.prepare(PACKS - 1)
    assert len(chunks_in(fresh)) == 1, "where it goes on is known"
    assert entries_of(later, range(PACKS)) == truth


def test_a_checkpoint_without_states_goes_on_too(data: Data) -> None:
    index = PackIndex(data, open_ledger(data, P, CONTEXT))
    truth = entries_of(index, range(PACKS))
    old = index.ledger_at(PACKS).to_json()
    del old["states"]
    fresh = elsewhere(data, "fresh")
    later = PackIndex(fresh, Ledger.from_json(old))
    assert later[PACKS - 1].entries.tolist() == truth[-1]
    assert later.ledger_at(PACKS).states == index.ledger_at(PACKS).states


def test_states_go_with_changed_blends_and_skipped_packs(data: Data, make_corpus: MakeCorpus) -> None:
    other = make_corpus("other", random_documents(200, 7))
    first = PackIndex(data, open_ledger(data, P, CONTEXT))
    both = dataclasses.replace(data, corpora=(*data.corpora, Corpus(str(other.path), 0.5)))
    first.prepare(100)
    before = as_saved(first.ledger_at(100))  # as after a rewind: states of packs that the new blend changes
    ledger = open_ledger(both, P, CONTEXT, previous=before, consumed=47)
    assert 0 < len(ledger.states) < len(before.states)
    index = PackIndex(elsewhere(both, "whole"), dataclasses.replace(ledger, states=()))
    truth = entries_of(index, range(PACKS))
    assert truth[:47] == entries_of(first, range(47))
    assert entries_of(PackIndex(both, ledger), range(PACKS)) == truth
    skipped = as_saved(index.ledger_at(PACKS)).skip(60, 25)
    assert len(skipped.states) == len(index.ledger_at(PACKS).states) > len(ledger.states)
    for at in (50, 60, 100):
        fresh = elsewhere(both, f"from {at}")
        later = PackIndex(fresh, as_saved(skipped))
        number = skipped.locate(at)
        later.prepare(number)
        assert len(chunks_in(fresh)) == 1
        assert entries_of(later, range(number, PACKS)) == truth[number:]


# --- what goes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks may go as soon as nobody has them."""
    monkeypatch.setattr(cache_module, "RECENT_SECONDS", -1.0)


def size_of(data: Data) -> int:
    folders = (path for path in Path(str(data.cache)).glob("*-*") if path.is_dir() and not path.suffix)
    return sum(cache_module._size(folder) for folder in folders)


def test_the_cache_keeps_to_its_limit_and_nothing_is_lost(data: Data, at_once: None) -> None:
    unlimited = PackIndex(data, open_ledger(data, P, CONTEXT))
    truth = entries_of(unlimited, range(PACKS))
    (documents,) = (p for p in Path(str(data.cache)).glob("documents-*") if p.is_dir())
    one = max(cache_module._size(path) for path in chunks_in(data))
    limit = cache_module._size(documents) + 4 * one
    assert size_of(data) > 1.5 * limit
    small = dataclasses.replace(elsewhere(data, "small"), cache_gb=limit / 1e9)
    index = PackIndex(small, unlimited.ledger)
    for number in range(PACKS):
        assert index[number].entries.tolist() == truth[number]
        assert size_of(small) <= limit + one, "the one that was just built comes on top"
    assert any(p.is_dir() for p in Path(str(small.cache)).glob("documents-*")), "used within a day"
    assert len(index.ledger_at(PACKS).states) == len(unlimited.ledger_at(PACKS).states)
    assert index[0].entries.tolist() == truth[0], "back to a chunk that was deleted"


def test_consumed_chunks_go_whatever_the_limit(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    index = PackIndex(data, open_ledger(data, P, CONTEXT))
    entries_of(index, range(PACKS))
    folders = [chunk.folder for chunk in index.chunks]
    hour_ago = time.time() - 4000
    for folder in folders[:5]:
        os.utime(folder, (hour_ago, hour_ago))
    index.prepare(index.chunks[-1].stop + 60)  # the next one may be there already
    assert [folder.is_dir() for folder in folders[:6]] == [False] * 5 + [True]
    assert all(folder.with_name(folder.name + ".json").exists() for folder in folders[:5])
    fresh = PackIndex(data, index.ledger)
    fresh.prepare(index.chunks[4].first)
    assert [folder.is_dir() for folder in folders[:6]] == [False] * 4 + [True] * 2, "found through the records"


@pytest.mark.parametrize("ahead", [0.0, 2e5, -2e5])
def test_what_is_unused_longest_goes_first_and_dead_builders_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """By the clock of the file server. ahead: seconds by which this machine's is."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + ahead)
    ages = {"documents-old": 90000, "documents-new": 80000, "packs-old": 3000, "packs-new": 400, "packs-now": 10}
    ages |= {"documents-ahead": -99000, "packs-ahead": -2000}  # used when the clock was wrong
    ages |= {"packs-a.x.tmp": 90000, "packs-b.x.tmp": 80000, "packs-c.x.old": 10}
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(100))
        os.utime(tmp_path / name, (now - age, now - age))
    for name in ("packs-d.lock", "packs-e.json", "packs-f.json", "features"):
        (tmp_path / name).touch()
    for name, days in (("packs-d.lock", 2), ("packs-e.json", 40), ("packs-f.json", 20), ("features", 99)):
        os.utime(tmp_path / name, (now - days * 86400,) * 2)
    trim(tmp_path, 350, keep=tmp_path / "packs-now")
    left = {"documents-new", "packs-new", "packs-now", "packs-b.x.tmp", "packs-f.json", "features"}
    assert {p.name for p in tmp_path.iterdir()} == left
    trim(tmp_path, 0, keep=tmp_path / "packs-now")
    assert {p.name for p in tmp_path.iterdir()} == left - {"packs-new"}


def test_a_time_to_come_is_renewed(tmp_path: Path) -> None:
    (tmp_path / "file.json").touch()
    os.utime(tmp_path, (time.time() + 1e7,) * 2)
    using(tmp_path, "file.json")
    assert tmp_path.stat().st_mtime < time.time() + 1e6


def test_many_processes_seldom_touch_a_folder_that_never_looks_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a machine that sees no locks of others. Each minute of two days, each of twenty processes uses both."""
    now, touches, oldest = [time.time()], Counter[str](), Counter[str]()
    clock = SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0])
    for module in (cache_module, cache_folders):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(cache_module, "now_in", lambda _: now[0])
    utime = os.utime

    def touch(path: Path, times: None = None) -> None:
        touches[path.name] += 1
        utime(path, (now[0], now[0]))

    monkeypatch.setattr(os, "utime", touch)
    folders = [tmp_path / name for name in ("documents-x", "packs-x")]
    for folder in folders:
        folder.mkdir()
        (folder / "file.json").touch()
    uses = [using(folder, "file.json") for folder in folders for _ in range(20)]
    for _ in range(2 * 24 * 60):
        now[0] += 60
        for folder in folders:
            oldest[folder.name] = max(oldest[folder.name], int(now[0] - folder.stat().st_mtime))
        trim(tmp_path, 0, keep=tmp_path)
        for use in uses:
            use.renew()
    assert oldest["documents-x"] < 86400 / 4
    assert oldest["packs-x"] < 300 / 2
    assert touches["documents-x"] <= 20, "by all processes together"
    assert touches["packs-x"] <= 2 * 24 * 60, "one of twenty each time"


def _read(data: Data, ledger: Ledger, locks: bool, pipe: Connection, other_end: Connection) -> None:
    other_end.close()  # so that this process ends with the test
    if not locks:
        without_locks("not coherent")
    index = PackIndex(data, ledger)
    pipe.send(index[0].entries.tolist())
    maps = Path("/proc/self/maps").read_text()
    assert "documents-" in maps
    assert "packs-" not in maps, "a mapped file that goes on NFS ends the process with SIGBUS"
    pipe.recv()
    pipe.send(entries_of(index, range(PACKS)))


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def reader(request: pytest.FixtureRequest, data: Data) -> Iterator[tuple[bool, Connection]]:
    """A process that has the first chunk open."""
    context = fork_context()
    ours, theirs = context.Pipe()
    ledger = open_ledger(data, P, CONTEXT)
    process = context.Process(target=_read, args=(data, ledger, request.param, theirs, ours))
    process.start()
    yield request.param, ours
    ours.close()
    process.join(60)
    assert process.exitcode == 0


def test_a_chunk_goes_while_another_process_reads(
    data: Data, at_once: None, reader: tuple[bool, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    locks, pipe = reader
    truth = entries_of(PackIndex(elsewhere(data, "other"), open_ledger(data, P, CONTEXT)), range(PACKS))
    assert pipe.recv() == truth[0]
    (folder,) = chunks_in(data)
    trim(Path(str(data.cache)), 0, keep=Path("none"))
    assert folder.is_dir() == locks, "it is known to be open"
    shutil.rmtree(folder, ignore_errors=True)  # by somebody who asks nobody
    pipe.send("go on")
    assert pipe.recv() == truth


def test_a_chunk_that_another_machine_deleted_is_built_again(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    index = PackIndex(data, open_ledger(data, P, CONTEXT))
    truth = entries_of(index, range(PACKS))
    shutil.rmtree(index.chunks[-1].folder)
    plain, stale = os.preadv, []

    def preadv(*arguments: Any) -> int:  # what NFS says
        if not stale:
            stale.append(arguments)
            raise OSError(errno.ESTALE, "Stale file handle")
        return plain(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    last = index.chunks[-1].first
    assert entries_of(index, range(last, PACKS)) == truth[last:]
    assert stale
    assert index.chunks[-1].folder.is_dir()
    (index.chunks[0].folder / "entries.npy").unlink()
    assert PackIndex(data, index.ledger)[0].entries.tolist() == truth[0], "a folder that is not whole is built again"


def test_rows_of_many_bytes_are_read_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads at most 2 GiB at a time: here 7 bytes."""
    plain, path = os.preadv, tmp_path / "packs-x" / "entries.npy"
    path.parent.mkdir()
    content = np.arange(40, dtype=np.int32).view(np.dtype([("document", np.int64), ("part", np.int64)]))
    np.save(path, content)
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: plain(file, [buffers[0][:7]], at))
    rows = Rows(path)
    read = rows.read(2, 9)
    assert read.dtype == content.dtype
    assert read.tolist() == content[2:9].tolist()
    assert len(rows.read(3, 3)) == 0
    with pytest.raises(ValueError, match="read-only"):
        read["part"] = 0
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=f"entries.npy ends too early; delete {path.parent}, it will be built again"):
        rows.read(9, 10)


# --- what a power failure leaves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0.0, 0.9], ids=["empty", "cut off"])
@pytest.mark.parametrize(
    "name", ["chunk.json", "entries.npy", "offsets.npy", "source.json", "tokens.npy", "images.npy", "placements.npy"]
)
def test_a_damaged_file_is_built_again(data: Data, name: str, left: float) -> None:
    ledger = open_ledger(data, P, CONTEXT)
    truth = entries_of(PackIndex(data, ledger), range(20))
    file = sorted(Path(str(data.cache)).glob(f"*-*/{name}"))[0]
    whole = file.read_bytes()
    for folder in file.parent.parent.glob(f"*/{name}"):  # of every chunk, among which is the first
        folder.write_bytes(folder.read_bytes()[: int(left * folder.stat().st_size)])
    for _ in range(2):
        assert entries_of(PackIndex(data, ledger), range(20)) == truth
        assert file.read_bytes() == whole


def test_what_is_built_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = Path.rename

    def noted(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(Path, "rename", noted)
    build_once(tmp_path / "packs-x", lambda path: [(path / name).write_text("{}") for name in ("a", "b")] and None)
    *files, folder, last = (path.rpartition("/")[2] for path in done)
    assert sorted(files) == ["a", "b"]
    assert (folder.endswith(".tmp"), last) == (True, "rename")


def test_damage_that_cannot_be_deleted_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is another user's, say."""
    (tmp_path / "packs-x").mkdir()
    monkeypatch.setattr(cache_module, "_delete", lambda _: False)
    with pytest.raises(UserError, match=r"packs-x is damaged \(it ends\); delete it, it will be built again"):
        build_and_open(tmp_path / "packs-x", Path.touch, _raise_value_error)


def test_a_fault_of_the_program_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it ends") as caught:
        build_and_open(tmp_path / "packs-x", lambda path: None, _raise_value_error)
    assert not isinstance(caught.value, UserError)


def _raise_value_error(folder: Path) -> None:
    raise ValueError("it ends")


# --- replay ------------------------------------------------------------------------------------------------------


def test_replay_of_an_earlier_step_starts_from_the_nearest_state(
    make_corpus: MakeCorpus, tmp_path: Path, at_once: None
) -> None:
    documents = [[[d % 500, d // 500], (jpeg(d % 20), None, None), [d % 500] * (d % 30 + 1)] for d in range(300)]
    corpus = make_corpus("c", documents)
    overrides = {
        "data.corpora": str(corpus.path),
        "data.tokens_per_pack": "128",
        "data.cache": str(tmp_path / "kept"),
        "model.vision.image_size": "16",
        "model.vision.patch_size": "8",
        "model.language.context_length": "128",
        "train.global_batch": "4",
    }
    config = configs.load(overrides=overrides)
    index = PackIndex(config.data, open_ledger(config.data, P, 128))
    index.prepare(4 * 60)
    pages = {step: replay_html(config, INTERLEAVED, step, ledger=index.ledger) for step in (3, 25, 59)}
    saved = as_saved(index.ledger_at(4 * 60))
    index.close()
    trim(tmp_path / "kept", 0, keep=tmp_path)
    assert chunks_in(config.data) == []
    for step, page in pages.items():  # after eviction, and after the cache was deleted
        for name in ("kept", f"cache of {step}"):
            there = configs.load(overrides={**overrides, "data.cache": str(tmp_path / name)})
            before = len(chunks_in(there.data))
            assert replay_html(there, INTERLEAVED, step, ledger=saved) == page
            assert len(chunks_in(there.data)) - before <= 2, "its own and perhaps the next"


@pytest.mark.parametrize("given", [None, "~/cache"])
def test_a_user_without_a_home_folder_is_told_to_name_a_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None
) -> None:
    """As in a container that runs with a number for its user: `docker run --user 1234`."""

    def unknown(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    data, name = Data(corpora=(Corpus("c"),), cache=given), "HOME" if given else "XDG_CACHE_HOME"
    for wanting in (partial(cache_module.cache_folder, data), *([] if given else [default_cache, user_cache])):
        with pytest.raises(
            UserError, match=rf"no home folder for (~|the cache).*; set {name} to a folder, or set data\.cache to"
        ):
            wanting()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "megatron_lcl" / "features"
