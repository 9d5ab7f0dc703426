"""The pack index: epochs, blends, the ledger, and what the cache may and may not share."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import MakeCorpus, jpeg, random_documents
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.corpus import store
from megatron_lcl.data.loading import pack_index as pack_index
from megatron_lcl.data.loading.cache import build_once
from megatron_lcl.data.loading.ledger import Ledger, kept_states, open_ledger, tokenizer_of
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.packing import max_sequences
from megatron_lcl.data.loading.rules import PAIRS
from megatron_lcl.data.loading.source import VERSION
from megatron_lcl.errors import UserError

P, CONTEXT = 4, 128


def data_of(*corpora: tuple[Path, float], **options: Any) -> Data:
    return Data(corpora=tuple(Corpus(str(p), w) for p, w in corpora), tokens_per_pack=256, **options)


def index_of(data: Data, previous: Ledger | None = None, consumed: int = 0) -> PackIndex:
    return PackIndex(data, open_ledger(data, P, CONTEXT, previous=previous, consumed=consumed))


def documents_of(index: PackIndex, packs: range | list[int]) -> list[tuple[str, int, int]]:
    """(corpus, epoch, document) of the first parts in some packs, in order."""
    return [
        (str(pack.sources[e["corpus"]].corpus.path), int(e["epoch"]), int(e["document"]))
        for pack in map(index.__getitem__, packs)
        for e in pack.entries
        if e["part"] == 0
    ]


def test_an_epoch_has_every_document_once_and_ends_before_the_next(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(150, 1, mean_text=40), num_shards=3)
    index = index_of(data_of((corpus.path, 1)))
    seen = documents_of(index, range(300))
    for epoch in range(3):
        block = seen[epoch * 150 : (epoch + 1) * 150]
        assert {e for _, e, _ in block} == {epoch}
        assert {d for *_, d in block} == set(range(150))
    orders = [[d for *_, d in seen[e * 150 : (e + 1) * 150]] for e in range(3)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) != orders[0]


def test_every_part_of_a_long_document_is_packed(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(60, 2, mean_text=300))
    index = index_of(data_of((corpus.path, 1)))
    parts: Counter[tuple[int, int, int]] = Counter()
    for number in range(500):
        parts.update((int(e["epoch"]), int(e["document"]), int(e["part"])) for e in index[number].entries)
    assert max(parts.values()) == 1
    first = {k for k in parts if k[0] == 0}
    for document in range(60):
        numbers = sorted(p for _, d, p in first if d == document)
        assert numbers == list(range(len(numbers)))
        assert numbers
    assert any(p for _, _, p in first)


def test_documents_without_enough_images_are_left_out_by_rule(make_corpus: MakeCorpus) -> None:
    documents = random_documents(80, 3, matched=True)
    corpus = make_corpus("c", documents)
    keeps = {d for d, pieces in enumerate(documents) if any(isinstance(p, tuple) and p[1] >= 0.24 for p in pieces)}
    assert len(keeps) < 80
    index = index_of(data_of((corpus.path, 1)))
    seen = [d for _, e, d in documents_of(index, range(100)) if e == 0]
    assert sorted(seen) == sorted(keeps)
    everything = index_of(data_of((corpus.path, 1), min_images=0))
    assert {d for _, e, d in documents_of(everything, range(100)) if e == 0} == set(range(80))
    with pytest.raises(ValueError, match=r"no document of .* is left"):
        index_of(data_of((corpus.path, 1), min_similarity=0.9, images_per_pack=2)).prepare(0)


def test_blend_counts_tokens(make_corpus: MakeCorpus) -> None:
    a = make_corpus("a", random_documents(500, 4, mean_text=10))
    b = make_corpus("b", random_documents(300, 5, mean_text=40))
    index = index_of(data_of((a.path, 1), (b.path, 3)))
    tokens = {str(a.path): 0, str(b.path): 0}
    for number in range(400):
        pack = index[number]
        for e in pack.entries:
            source = pack.sources[e["corpus"]]
            tokens[str(source.corpus.path)] += int(source.tokens[e["document"]]) if e["part"] == 0 else 0
    share = tokens[str(a.path)] / sum(tokens.values())
    assert share == pytest.approx(0.25, abs=0.01)


def test_the_shares_of_a_blend_are_kept_through_all_windows(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a window has too much of, the next one has less of: behind each, tokens are within a document of a share."""
    monkeypatch.setattr(pack_index, "MIN_CHUNK", 1)  # a chunk is a window
    rng = np.random.default_rng(5)
    lengths = {name: rng.integers(1, 500, num).tolist() for name, num in (("a", 23), ("b", 17))}
    paths = {name: make_corpus(name, [[[1] * n] for n in of]).path for name, of in lengths.items()}
    index = index_of(data_of((paths["a"], 2), (paths["b"], 1)))
    name_of, given, first = {str(path): name for name, path in paths.items()}, {"a": 0, "b": 0}, 0
    for _ in range(15):
        index.prepare(first)
        for path, _, document in documents_of(index, range(first, index.chunks[-1].stop)):
            given[name_of[path]] += lengths[name_of[path]][document] + 2
        first = index.chunks[-1].stop
        assert abs(given["a"] - 2 / 3 * sum(given.values())) <= 502
    index.close()


@pytest.mark.parametrize("skipped", [0, 100])
def test_a_changed_blend_repeats_and_loses_nothing(make_corpus: MakeCorpus, skipped: int) -> None:
    """Also behind packs that a rewind has skipped, among which a window begins: it stays as it was."""
    a = make_corpus("a", random_documents(400, 6))
    b = make_corpus("b", random_documents(200, 7))
    before = index_of(data_of((a.path, 1)))
    old = [before[n].entries.tolist() for n in range(20 + skipped)]
    assert ({e for _, e, _ in documents_of(before, range(20, 20 + skipped))} == {0, 1}) == bool(skipped)
    previous = before.ledger.skip(10, skipped) if skipped else before.ledger
    after = index_of(data_of((a.path, 1), (b.path, 1)), previous=previous, consumed=20)
    assert after.ledger.entries[: len(previous.entries)] == previous.entries
    assert [after[n].entries.tolist() for n in range(20 + skipped)] == old
    seen = documents_of(after, range(600))
    path_a, path_b = str(a.path), str(b.path)
    switch = next(i for i, (c, *_) in enumerate(seen) if c == path_b)
    assert switch > 0
    for path, size in ((path_a, 400), (path_b, 200)):
        mine = [(e, d) for c, e, d in seen if c == path]
        assert len(set(mine)) == len(mine)
        full = [e for e in {e for e, _ in mine} if e < max(e for e, _ in mine)]
        assert full
        for epoch in full:  # every epoch that is over had every document, also the one in which the blend changed
            assert {d for e, d in mine if e == epoch} == set(range(size))
        assert [e for e, _ in mine] == sorted(e for e, _ in mine)
    later = seen[switch:]
    for some in (later, later[:100]):  # shares count from the change, nothing is made up for
        assert 0.3 < sum(c == path_a for c, *_ in some) / len(some) < 0.7
    # an unchanged config appends nothing
    same = open_ledger(data_of((a.path, 1), (b.path, 1)), P, CONTEXT, previous=after.ledger, consumed=90)
    assert same == after.ledger
    assert Ledger.from_json(json.loads(json.dumps(same.to_json()))) == same


def test_a_blend_that_changes_where_a_window_begins_is_that_window_s(make_corpus: MakeCorpus) -> None:
    a, b = (make_corpus(name, random_documents(60, seed)) for name, seed in (("a", 6), ("b", 7)))
    before = index_of(data_of((a.path, 1)))
    begin = next(n for n in itertools.count() if documents_of(before, [n])[0][1] == 1)  # a window is an epoch
    for consumed in (begin, begin + 1):
        after = index_of(data_of((a.path, 1), (b.path, 1)), previous=before.ledger, consumed=consumed)
        assert documents_of(after, range(begin)) == documents_of(before, range(begin))
        corpora = {c for c, *_ in documents_of(after, range(begin, begin + 8))}
        assert corpora == ({str(a.path), str(b.path)} if consumed == begin else {str(a.path)})


def test_image_slots_are_chosen_by_the_blend_s_shares(make_corpus: MakeCorpus) -> None:
    """Documents of 100 tokens without images, nine times as many as such with three: of 1,000 tokens 100 are theirs."""
    texts = make_corpus("texts", [[[1] * 98]] * 7)
    images = make_corpus("images", [[[1] * 80, *[(jpeg(n), None, None) for n in range(3)]]] * 40)
    data = dataclasses.replace(data_of((texts.path, 9), (images.path, 1)), tokens_per_pack=1000)
    assert open_ledger(data, P, CONTEXT).settings["images_per_pack"] == 3
    data = dataclasses.replace(data_of((texts.path, 1), (images.path, 9)), tokens_per_pack=1000)
    assert open_ledger(data, P, CONTEXT).settings["images_per_pack"] == 27
    short = make_corpus("short", [[[1, 1], *[(jpeg(n), None, None) for n in range(3)]]] * 40)
    data = dataclasses.replace(data_of((short.path, 1)), tokens_per_pack=1000)
    chosen = open_ledger(data, P, CONTEXT, sequences=PAIRS).settings["images_per_pack"]
    assert chosen == max_sequences(1000), "of pairs, each of which is a sequence, as many as a pack may hold"


def test_skipped_packs_are_jumped_over(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(50, 8))
    ledger = index_of(data_of((corpus.path, 1))).ledger
    assert [ledger.locate(n) for n in range(4)] == [0, 1, 2, 3]
    once = ledger.skip(4, 3)
    assert [once.locate(n) for n in range(7)] == [0, 1, 2, 3, 7, 8, 9]
    twice = once.skip(3, 2)  # packs 3 and 7
    assert [twice.locate(n) for n in range(5)] == [0, 1, 2, 8, 9]
    assert twice.entries[:2] == once.entries
    assert index_of(data_of((corpus.path, 1)), previous=twice)[5].entries.tolist()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20))), st.integers(0, 40), st.integers(1, 60))
def test_ranges_of_packs_are_those_packs(skipped: list[tuple[int, int]], consumed: int, count: int) -> None:
    ledger = Ledger({}, tuple({"from_pack": first, "skip": number} for first, number in skipped))
    ranges = ledger.ranges(consumed, count)
    numbers = [ledger.locate(consumed + i) for i in range(count)]
    assert [number for first, stop in ranges for number in range(first, stop)] == numbers
    assert all(stop < first for (_, stop), (first, _) in itertools.pairwise(ranges)), "as few as can be"


def test_a_setting_that_fixes_the_packs_cannot_change_in_a_run(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(50, 8))
    data = data_of((corpus.path, 1))
    ledger = open_ledger(data, P, CONTEXT)
    with pytest.raises(ValueError, match="seed is 1, but this run began with 0"):
        open_ledger(dataclasses.replace(data, seed=1), P, CONTEXT, previous=ledger)
    with pytest.raises(ValueError, match="context_length"):
        open_ledger(data, P, 64, previous=ledger)
    kept = open_ledger(data, P, CONTEXT, previous=ledger)
    assert kept.settings["images_per_pack"] == ledger.settings["images_per_pack"]
    later = dataclasses.replace(ledger, settings={**ledger.settings, "version": VERSION + 1})
    with pytest.raises(ValueError, match=f"version is {VERSION}, but this run began with {VERSION + 1}"):
        open_ledger(data, P, CONTEXT, previous=later)


def test_a_run_keeps_the_rules_of_the_version_that_began_it(make_corpus: MakeCorpus) -> None:
    """Version 1 put an image apart from a text that did not fit beside it."""
    corpus = make_corpus(
        "c", [[[1] * length, (jpeg(0), None, None)] for length in range(100, 140)], source="webdataset"
    )
    data = data_of((corpus.path, 1), image_first=0.0)
    new = open_ledger(data, P, CONTEXT)
    old = dataclasses.replace(new, settings={**new.settings, "version": 1})

    def images_alone(index: PackIndex) -> int:
        source = index.source(corpus.fingerprint)
        rows = [source.arranged(d, 0)[0] for d in range(len(corpus))]
        return sum(int(r[-1, 0] != r[-2, 0]) for r in rows)

    assert images_alone(index_of(data, new)) == 0
    assert images_alone(index_of(data, old)) == 6  # of 121 to 126 tokens: what is left of longer ones fits
    assert index_of(data, old).ledger.settings == old.settings
    assert open_ledger(data, P, CONTEXT, version=1) == old  # what is said of phases that are to come


def test_an_image_as_similar_as_the_threshold_stays(make_corpus: MakeCorpus) -> None:
    """Similarities are float32, and that of 0.24 is below 0.24; runs that skipped such images go on so."""
    corpus = make_corpus("c", [[[1] * 9, (jpeg(0), similarity, 0)] for similarity in (0.0, 0.2399, 0.24, 0.3)])
    data = data_of((corpus.path, 1))
    new = open_ledger(data, P, CONTEXT)
    old = dataclasses.replace(new, settings={**new.settings, "version": 1})
    for ledger, images in ((new, [0, 0, 1, 1]), (old, [0, 0, 0, 1])):
        assert index_of(data, ledger).source(corpus.fingerprint).images.tolist() == images


def test_packs_are_the_ledger_s_whatever_the_config_says(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    """Chunks that other settings than the ledger's had built were read as the run's later."""
    corpus = make_corpus("c", random_documents(120, 9, matched=True))
    data = data_of((corpus.path, 1))
    ledger = open_ledger(data, P, CONTEXT)
    cache = str(tmp_path / "other")
    other = data_of((corpus.path, 1), seed=1, min_similarity=0.3, image_first=1.0, max_images=1, cache=cache)
    wrong, right = PackIndex(other, ledger), index_of(data, ledger)
    for number in range(10):
        assert (wrong[number].entries == right[number].entries).all()


def test_seed_corpus_and_config_each_give_their_own_index(make_corpus: MakeCorpus, cache: Path) -> None:
    documents = random_documents(120, 9, matched=True)
    one, two = make_corpus("one", documents), make_corpus("two", documents[:-1])
    options: list[dict[str, Any]] = [{}, {"seed": 1}, {"min_similarity": 0.3}, {"image_first": 0.0}]
    datas = [data_of((one.path, 1), **o) for o in options] + [data_of((two.path, 1))]
    folders = []
    for data in datas:
        index = index_of(data)
        index.prepare(0)
        folders.append(index.chunks[0].folder)
    assert len(set(folders)) == len(folders)
    again = index_of(datas[0])
    again.prepare(0)
    assert again.chunks[0].folder == folders[0]
    moved = one.path.rename(one.path.with_name("elsewhere"))  # the fingerprint counts, not the path
    there = index_of(data_of((moved, 1)))
    there.prepare(0)
    assert there.chunks[0].folder == folders[0]


def test_chunks_go_on_where_the_last_one_ended(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus("c", random_documents(300, 10))
    monkeypatch.setattr(pack_index, "MIN_CHUNK", 100)
    monkeypatch.setattr(pack_index, "CHUNK", 120)
    index = index_of(data_of((corpus.path, 1)))
    seen = documents_of(index, range(400))
    assert len(index.chunks) > 4
    assert all(a.stop == b.first for a, b in zip(index.chunks, index.chunks[1:], strict=False))
    for epoch in range(2):
        block = seen[epoch * 300 : (epoch + 1) * 300]
        assert sorted(d for *_, d in block) == list(range(300))
        assert {e for _, e, _ in block} == {epoch}


def test_chunks_of_a_small_corpus_double(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to so many documents. What the packs hold does not depend on it."""
    corpus, packs = make_corpus("c", random_documents(30, 10)), range(0, 900, 7)
    found = {}
    for first, documents in ((10**6, 10**4), (40, 900)):
        monkeypatch.setattr(pack_index, "FIRST_CHUNK", first)
        monkeypatch.setattr(pack_index, "MIN_CHUNK", documents)
        index = index_of(data_of((corpus.path, 1), cache=str(tmp_path / f"{first}")))
        found[first] = documents_of(index, packs)
    assert found[40] == found[10**6]
    assert all(a.stop == b.first for a, b in itertools.pairwise(index.chunks))
    lengths = [chunk.stop - chunk.first for chunk in index.chunks]
    assert 40 <= lengths[0] < 60
    doubled = [length >= chunk.first > 0 for chunk, length in zip(index.chunks, lengths, strict=True)]
    assert doubled[1:4] == [True] * 3
    assert not any(doubled[5:])
    assert max(lengths) - min(lengths[5:]) < 10  # packs of an epoch


@pytest.mark.parametrize("weights", [(1,), (1, 1), (5, 1, 2), (9, 1, 1, 1)])
def test_what_packs_hold_does_not_depend_on_where_chunks_begin(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[float, ...]
) -> None:
    paths = [make_corpus(f"c{n}", random_documents(70 + 20 * n, 30 + n, num_jpegs=2)).path for n in range(len(weights))]
    monkeypatch.setattr(pack_index, "CHUNK", 100)
    found, chunks = [], []
    for documents in (60, 700):
        monkeypatch.setattr(pack_index, "MIN_CHUNK", documents)
        monkeypatch.setattr(pack_index, "FIRST_CHUNK", 10 * documents)
        index = index_of(data_of(*zip(paths, weights, strict=True), cache=str(tmp_path / f"{documents}")))
        found.append(documents_of(index, range(300)))
        chunks.append(len(index.chunks))
    assert found[0] == found[1]
    assert chunks[0] > 3 * chunks[1]


@pytest.mark.parametrize(("corpora", "most"), [(100, 1000), (1000, 100), (20_000, 20)])
def test_a_ledger_of_many_chunks_keeps_a_thousand_states_or_fewer(corpora: int, most: int) -> None:
    """Those of a run that saves at every chunk, of five billion documents or more. Each names every corpus, so of
    1,000 corpora a thousand would be 100 MB in each checkpoint."""
    states: list[dict[str, Any]] = []
    positions = {str(corpus): [0, 1] for corpus in range(corpora)}
    for number in range(1, 10 * most):
        states = [*kept_states([*states, {"pack": 30_000 * number, "positions": positions}])]
        assert len(states) <= most
        assert states[-1]["pack"] == 30_000 * number
        if number == most:
            assert len(states) == number, "all"
    packs = np.array([0, *(state["pack"] for state in states)])
    assert np.diff(packs).max() < packs[-1] / most * 20 / 3


def _build_slowly(folder: str, log: str) -> None:
    def build(path: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (path / "done").touch()

    assert (build_once(Path(folder), build) / "done").exists()


def test_one_process_builds_and_the_others_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build_slowly, args=(str(tmp_path / "x"), str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(log.read_text().split()) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"x", "x.lock", "log"}


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        (path / "half").touch()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build_once(tmp_path / "x", fails)
    assert [p.name for p in tmp_path.iterdir()] == ["x.lock"]
    assert build_once(tmp_path / "x", lambda path: (path / "done").touch()).is_dir()


def test_a_cache_that_cannot_be_written_says_what_to_set(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus("c", random_documents(20, 11))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"set data\.cache"):
        index_of(data_of((corpus.path, 1), cache=str(tmp_path / "file" / "cache")))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody can write into a folder. Modes do not stop root, a mount does; skips where root may not mount."""
    is_root = os.geteuid() == 0
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if is_root:
        command = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"root may write here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OSError, match=r"Read-only|Permission"):
            (folder / "new").touch()
        yield
    finally:
        if is_root:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.chmod(0o755)


def test_a_read_only_corpus_works(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(20, 12)).path
    with read_only(corpus):
        index_of(data_of((corpus, 1))).prepare(0)


def test_each_corpus_of_a_blend_is_opened_once(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that forks the loader's workers: none of them reads a manifest again."""
    paths = [make_corpus(f"c{n}", random_documents(6, 20 + n, num_jpegs=2)).path for n in range(8)]
    data = data_of(*((path, 1) for path in paths))
    ledger = open_ledger(data, P, CONTEXT)
    opened: list[str] = []
    plain = store.Corpus.__init__

    def init(self: store.Corpus, path: str, *options: Any) -> None:
        opened.append(path)
        plain(self, path, *options)

    monkeypatch.setattr(store.Corpus, "__init__", init)
    for _ in ("the chunk is built", "it is there"):
        index = PackIndex(data, ledger)
        index.prepare(0)
        assert opened == [str(path) for path in paths]
        opened.clear()
        assert len(index[0].sources) == 8
        assert not opened


def test_blends_need_one_tokenizer_and_distinct_corpora(make_corpus: MakeCorpus) -> None:
    a, b, c = (make_corpus(name, random_documents(20, seed)) for name, seed in (("a", 13), ("b", 14), ("c", 15)))
    with pytest.raises(ValueError, match="twice"):
        index_of(data_of((a.path, 1), (a.path, 2)))
    manifest = json.loads((b.path / "corpus.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "another"
    (b.path / "corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="same tokenizer") as raised:
        index_of(data_of((a.path, 1), (c.path, 1), (b.path, 1)))
    assert str(raised.value).endswith(f"; that of {a.path} is another than that of {b.path}")
    with pytest.raises(ValueError, match="empty"):
        index_of(data_of())


def test_a_run_keeps_its_tokenizer(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    """Another one of the same size is refused, of runs of earlier versions as long as a corpus of theirs is there."""
    a, b = (make_corpus(name, random_documents(20, seed)) for name, seed in (("a", 13), ("b", 14)))
    own = a.tokenizer.fingerprint
    before = open_ledger(data_of((a.path, 1)), P, CONTEXT)
    old = Ledger(before.settings, ({key: x for key, x in before.entries[0].items() if key != "tokenizer"},))
    moved = tmp_path / "moved"
    for ledger in (before, old):
        after = open_ledger(data_of((b.path, 1)), P, CONTEXT, previous=ledger, consumed=5)
        assert after.entries[-1]["tokenizer"] == own
        assert after.entries[:-1] == ledger.entries
    manifest = json.loads((b.path / "corpus.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "another"
    (b.path / "corpus.json").write_text(json.dumps(manifest))
    for ledger in (before, old, after):
        with pytest.raises(UserError, match="b has another tokenizer than the corpora that this run has read"):
            open_ledger(data_of((b.path, 1)), P, CONTEXT, previous=ledger, consumed=8)
    a.path.rename(moved)
    with pytest.raises(UserError, match="another tokenizer"):
        open_ledger(data_of((b.path, 1)), P, CONTEXT, previous=before, consumed=8)
    assert tokenizer_of(old, data_of((b.path, 1))) is None
    assert tokenizer_of(old, data_of((moved, 1))) == own
