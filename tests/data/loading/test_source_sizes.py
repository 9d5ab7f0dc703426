"""Protects: the sizes that packs are planned with, of some documents of a corpus, whatever else its shards hold, and
what it costs to ask for few of many."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from corpora import finish_corpus, jpeg, random_documents, write_corpus
from hypothesis import strategies as st

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.store import Corpus, ShardWriter
from megatron_lcl.data.corpus.tokenizer import ClipTokenizer
from megatron_lcl.data.loading.rules import INTERLEAVED, PAIRS, Sequences
from megatron_lcl.data.loading.sequence import END, IMAGE_ROW, arranged_sizes, in_turn
from megatron_lcl.data.loading.source import Source, open_source, pieces_of


def source_of(corpus: Corpus, sequences: Sequences = INTERLEAVED, **fields: Any) -> Source:
    patches = 0 if sequences is PAIRS else 4
    return open_source(corpus, Data(cache=str(corpus.path / "cache"), **fields), patches, 48, 2, sequences)


def by_whole_shards(source: Source, documents: np.ndarray, epoch: int, ranges: np.ndarray) -> list[list[int]]:
    """What `sizes` says, from all arrays of each document's shard, and `document_key`; by shard, as they are given."""
    found = []
    shards = np.array([source.corpus.locate(document)[0] for document in documents.tolist()], int)
    for i in np.argsort(shards, kind="stable").tolist():
        document = int(documents[i])
        if source.tokens[document] == 0:
            continue
        k, local = source.corpus.locate(document)
        start, stop = source.corpus.document_starts[k : k + 2]
        arrays = (*pieces_of(source.corpus.shard(k)), source.placements[start:stop])
        text, num_texts = -1, len(source.corpus[document].texts)
        if source.kinds[k] == "captions":
            text = in_turn(source.document_key(document, 1 << 61), num_texts, epoch)
        rows = arranged_sizes(  # type: ignore[call-arg]
            *map(np.array, arrays),  # copies that may be written to, as `sizes` has them: else numba compiles once more
            np.array([local]),
            np.array([source.document_key(document, epoch)], np.uint64),
            np.array(ranges[i : i + 1]),
            source.rules_of(k),
            np.array([text]),
        )
        found += [[i, part, int(tokens), int(images)] for part, (_, tokens, images) in enumerate(rows)]
    return found


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    """One with texts and images in any order, one with images matched to texts, one of pairs with several texts; in
    each a shard without any image."""
    folder = tmp_path_factory.mktemp("corpora")
    found = {}
    for name, source in (("natural", "jsonl"), ("matched", "mmc4"), ("captions", "jsonl")):
        documents = random_documents(60, len(name), name == "matched", max_images=1 if name == "captions" else 6)
        documents += [[[1, 2, 3]] * (1 + k % 2 * 40) for k in range(20)]
        found[name] = write_corpus(folder / name, documents, num_shards=4, source=source)
    for shard in found["captions"].manifest["shards"]:
        shard["kind"] = "captions"
    return found


@pytest.mark.parametrize("sequences", [INTERLEAVED, PAIRS], ids=["interleaved", "pairs"])
@pytest.mark.parametrize("name", ["natural", "matched", "captions"])
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=20)
def test_sizes_of_some_documents_are_those_by_whole_shards(
    corpora: dict[str, Corpus], name: str, sequences: Sequences, data: st.DataObject
) -> None:
    source = source_of(corpora[name], sequences, min_images=0)
    documents = np.array(data.draw(st.lists(st.integers(0, 79), max_size=40)), np.int64)
    ranges = np.broadcast_to(np.array([0, END]), (len(documents), 2))
    if parts := data.draw(st.booleans()):
        begin = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(documents), max_size=len(documents))), int)
        ranges = np.stack([begin, begin + 15], 1)
    epoch = data.draw(st.integers(0, 3))
    told = source.sizes(documents, epoch, ranges)
    assert told.dtype == np.int32
    expected = by_whole_shards(source, documents, epoch, ranges)
    if parts:  # of all documents: then there are none that come first as they are not cut
        assert told.tolist() == expected
    assert sorted(told.tolist()) == sorted(expected)


@pytest.mark.parametrize("sequences", [INTERLEAVED, PAIRS], ids=["interleaved", "pairs"])
def test_sizes_in_a_corpus_of_several_kinds_are_those_of_what_is_read(tmp_path: Path, sequences: Sequences) -> None:
    """A shard's first document is of the shard's kind: of a caption's texts one is read, of a pair's or others all."""
    kinds = ["pairs", "captions", "natural", "captions", "captions", "pairs", "natural"]
    documents: list[Any] = [
        [(jpeg(d % 5), None, None), *([1] * (1 + (d + 3 * n) % 11) for n in range(3))] for d in range(4 * len(kinds))
    ]
    corpus = write_corpus(tmp_path / "corpus", documents, num_shards=len(kinds))
    for shard, kind in zip(corpus.manifest["shards"], kinds, strict=True):
        shard["kind"] = kind
    source, firsts = source_of(corpus, sequences), set(corpus.document_starts.tolist())
    assert source.kinds == kinds
    drawn: dict[int, set[int]] = {}
    for epoch in range(6):
        told = source.sizes(np.arange(len(documents)), epoch)
        by_document = {d: told[told[:, 0] == d][:, 1:].tolist() for d in range(len(documents))}
        for d, pieces in enumerate(documents):
            rows, *ends, _, _ = source.arranged(d, epoch)
            read = []
            for sequence in range(int(rows[-1, 0]) + 1):
                mine = rows[rows[:, 0] == sequence]
                texts = mine[mine[:, 3] != IMAGE_ROW]
                of_image = 6 if sequences is INTERLEAVED else 1  # `<soi>`, placeholders and `<eoi>`; `<soi>` alone
                images = len(mine) - len(texts)
                read.append([sequence, sum(ends) + int((texts[:, 3] - texts[:, 2]).sum()) + of_image * images, images])
            assert by_document[d] == read, (d, kinds[d // 4], d in firsts)
            if kinds[d // 4] == "captions":
                (text,) = rows[rows[:, 3] != IMAGE_ROW]
                assert text[3] == len(pieces[text[1]])
                drawn.setdefault(d, set()).add(int(text[1]))
    assert len(drawn) == 12
    assert sum(len(texts) > 1 for texts in drawn.values()) > 9, "another text in another epoch"


def test_what_few_documents_cost_does_not_grow_with_their_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither memory, by what else the shard holds, nor a Python call for each document."""
    num = 50_000
    writer = ShardWriter(tmp_path, 0)
    writer.add_text_documents(np.zeros(num * 4, np.int32).tobytes(), [2] * (2 * num), [2] * num, [""] * num)
    files, counts = writer.finish()
    source = source_of(finish_corpus(tmp_path, ClipTokenizer([]), [counts], files))
    monkeypatch.setattr(Source, "document_key", None)
    documents = np.arange(0, num, 10_000)
    ranges = np.array([[1, 3]] * len(documents))
    expected = source.sizes(documents, 0, ranges)
    tracemalloc.start()
    try:
        again = source.sizes(documents, 0, ranges)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert again.tolist() == expected.tolist() == [[i, 0, 4, 0] for i in range(len(documents))]
    assert peak < num, "bytes: a copy of the shard's lengths alone is eight times as many"
