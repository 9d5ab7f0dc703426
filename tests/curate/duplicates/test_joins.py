"""Protects the joins: the clusters are those of all pairs, however the corpus is cut, in whatever memory."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curate.corpora_of_rules import manifests_read
from data.corpora import jpeg, write_corpus
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megatron_lcl.curate.documents import Range
from megatron_lcl.curate.duplicates import clusters
from megatron_lcl.curate.duplicates import join as joins
from megatron_lcl.curate.duplicates.clusters import difference, equal_keys, find, unite_alike
from megatron_lcl.curate.duplicates.facts import document_facts, image_facts
from megatron_lcl.curate.duplicates.join import Removals, join_documents, join_images
from megatron_lcl.curate.duplicates.settings import DocumentDuplicates, ImageDuplicates
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.corpus.tokenizer import ClipTokenizer


@settings(max_examples=60)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 400))
def test_groups_are_those_of_equal_keys_in_any_memory(values: list[int], memory: int) -> None:
    """And each row is read once: all of them are more than a machine keeps in memory."""
    spread = np.array(values, np.uint64) * np.uint64(1 << 60)  # wraps: a few values of the whole range
    read: list[int] = []

    def keys(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        read.extend(range(start, stop))
        return spread[start:stop], np.arange(start, stop)

    with tempfile.TemporaryDirectory() as folder:
        groups = [
            rows[start:stop].tolist()
            for rows, starts in equal_keys(keys, len(values), Path(folder) / "keys", memory)
            for start, stop in itertools.pairwise(starts)
        ]
    assert read == list(range(len(values)))
    order = sorted(set(spread.tolist()))
    expected = [np.flatnonzero(spread == np.uint64(key)).tolist() for key in order]
    assert groups == [rows for rows in expected if len(rows) > 1]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(0, 5))
def test_clusters_are_the_components_of_all_alike_pairs(seed: int, num: int, limit: int) -> None:
    described = np.random.default_rng(seed).integers(0, 3, (num, 6), np.uint32)
    for bits in (False, True):
        apart = described[:, None] ^ described
        counted = np.bitwise_count(apart).sum(2) if bits else (apart != 0).sum(2)
        assert all(
            difference(described[i], described[j], bits, 99) == counted[i, j] for i in range(num) for j in range(num)
        )
        _, expected = connected_components(coo_array(counted <= limit), directed=False)
        parent = np.arange(num)
        unite_alike(np.arange(num), np.array([0, num]), described, bits, limit, parent)
        roots = [find(parent, k) for k in range(num)]
        assert roots == [int(np.flatnonzero(expected == expected[k])[0]) for k in range(num)]


def test_a_key_that_many_rows_have_costs_no_square() -> None:
    num = 200_000
    described = np.arange(num, dtype=np.uint32)[:, None] // 2 * np.uint32(2)  # pairs, and all of one key
    parent = np.arange(num)
    unite_alike(np.arange(num), np.array([0, num]), described, False, 0, parent)  # minutes if all pairs were compared
    assert (parent[: clusters.LIMIT] == np.arange(clusters.LIMIT) // 2 * 2).all()


WORDS = [f"word{k}" for k in range(400)]


def sentence(seed: int, changed: int = 0) -> str:
    """120 words, the last few of which are others."""
    rng = np.random.default_rng(seed)
    words = rng.choice(WORDS, 120).tolist()
    words[len(words) - changed :] = rng.choice(WORDS, changed).tolist()
    return " ".join(words)


def make_corpus(folder: Path, documents: Sequence[Sequence[Any]], num_shards: int = 1) -> Corpus:
    """Texts as strings, images as bytes."""
    encode = ClipTokenizer([]).encode
    pieces = [[encode(p) if isinstance(p, str) else (p, None, None) for p in document] for document in documents]
    return write_corpus(folder, pieces, num_shards)


def facts_of(corpus: Corpus, make: Any, folder: Path, size: int, rule: Any) -> list[Path]:
    """Facts of tasks of at most `size` documents, as files."""
    folder.mkdir(parents=True)
    files = []
    for shard in range(corpus.num_shards):
        num = corpus.shard(shard).num_documents
        for first in range(0, num, size):
            files.append(folder / f"{len(files):05d}.npz")
            np.savez(files[-1], **make(corpus, Range(0, shard, first, min(num, first + size), 0), rule))
    return files


def removed(removals: Removals) -> list[tuple[int, int]]:
    return list(zip(removals.document.tolist(), removals.item.tolist(), strict=True))


DOCUMENTS = [
    [sentence(0)],
    [sentence(1), jpeg(1)],
    [sentence(0).upper().replace(" ", ", ")],  # the same words
    [jpeg(2)],
    [sentence(1), jpeg(2)],  # the same text, another image
    [sentence(2, changed=4)],
    [sentence(2)],
    [jpeg(2)],
    [sentence(3)],
    [sentence(0)],
]


def together(parts: Iterator[Removals]) -> Removals:
    """All removals of a join."""
    columns = list(zip(*((p.document, p.item, p.value, p.matched) for p in parts), strict=True))
    return Removals(*map(np.concatenate, columns[:3]), [name for part in columns[3] for name in part])


@pytest.mark.parametrize(("shards", "size", "memory"), [(1, 99, 1 << 30), (3, 1, 1 << 30), (2, 2, 100)])
def test_documents_that_are_there_before(
    shards: int, size: int, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joins, "_BLOCK", 3 if memory == 100 else 1 << 14)
    corpus = make_corpus(tmp_path / "corpus", DOCUMENTS, shards)
    for k, (rule, expected, matched) in enumerate(
        [
            (DocumentDuplicates(), [2, 4, 6, 7, 9], [0, 1, 5, 3, 0]),
            (DocumentDuplicates(action="drop-all"), [0, 1, 2, 3, 4, 5, 6, 7, 9], [2, 4, 0, 7, 1, 6, 5, 3, 0]),
            (DocumentDuplicates(threshold=None), [7, 9], [3, 0]),
        ]
    ):
        files = facts_of(corpus, document_facts, tmp_path / f"facts-{k}", size, rule)
        (scratch := tmp_path / f"scratch-{k}").mkdir()
        found = together(join_documents(files, rule, scratch, memory=memory))
        assert removed(found) == [(d, -1) for d in expected]
        assert found.matched == [f"{corpus.path}: document {d}" for d in matched]
        assert (found.value >= 0.75).all()
        assert found.value[expected.index(9)] == 1


def test_documents_of_another_corpus(tmp_path: Path) -> None:
    ours = make_corpus(tmp_path / "ours", DOCUMENTS, 2)
    other = make_corpus(tmp_path / "other", [[sentence(9)], [sentence(3)], [sentence(2)]])
    rule = DocumentDuplicates()
    files, against = (facts_of(c, document_facts, tmp_path / f"facts-{c.path.name}", 2, rule) for c in (ours, other))
    (scratch := tmp_path / "scratch").mkdir()
    found = together(join_documents(files, rule, scratch, against))
    assert removed(found) == [(d, -1) for d in (2, 4, 5, 6, 7, 8, 9)]
    assert found.matched[2:4] == [f"{other.path}: document 2"] * 2
    assert found.matched[5] == f"{other.path}: document 1"
    (scratch := tmp_path / "again").mkdir()
    one = together(join_documents(files, DocumentDuplicates(action="drop-all"), scratch, against))
    assert 8 in one.document  # once in each corpus


def photograph(seed: int, quality: int = 92, scale: float = 1.0) -> bytes:
    """A picture with detail of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    image = Image.fromarray(pixels).resize((240, 200), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.resize((round(240 * scale), round(200 * scale))).save(out, "JPEG", quality=quality)
    return out.getvalue()


def blank(level: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (60, 60), level).save(out, "PNG")
    return out.getvalue()


IMAGES = [
    ["one", photograph(0), photograph(1)],
    [photograph(0, quality=60), "two", blank(10), photograph(2)],
    [photograph(3), blank(11), photograph(1), photograph(1)],
    [photograph(2, scale=0.5), b"no image", blank(10), b"no picture"],
]


@pytest.mark.parametrize(("shards", "size", "memory"), [(1, 99, 1 << 30), (4, 1, 1 << 30), (2, 1, 100)])
def test_images_that_stand_before(
    shards: int, size: int, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joins, "_BLOCK", 3 if memory == 100 else 1 << 14)
    corpus = make_corpus(tmp_path / "corpus", IMAGES, shards)
    near = [(1, 0), (2, 2), (2, 3), (3, 0), (3, 2)]
    exact = [(2, 2), (2, 3), (3, 2)]
    everywhere = sorted([*near, (0, 1), (0, 2), (1, 2), (1, 3)])
    for k, (rule, expected) in enumerate(
        [
            (ImageDuplicates(), near),
            (ImageDuplicates(max_bits=None), exact),
            (ImageDuplicates(action="drop-all"), everywhere),
        ]
    ):
        files = facts_of(corpus, image_facts, tmp_path / f"facts-{k}", size, rule)
        (scratch := tmp_path / f"scratch-{k}").mkdir()
        found = together(join_images(files, rule, scratch, memory=memory))
        assert removed(found) == expected
        assert (found.value <= 40).all()
        if rule == ImageDuplicates():
            assert found.matched[0] == f"{corpus.path}: document 0, piece 1"
            assert found.value[1] == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=4), min_size=2, max_size=9),
    st.integers(0, 99),
    st.sampled_from(["keep-one", "drop-all"]),
)
@example([[(k, False)] for k in (0, 0, 0, 1, 2)], 0, "keep-one")  # 1 and 2 are alike
def test_how_a_corpus_is_divided_decides_on_no_image(
    shown: list[list[tuple[int, bool]]], seed: int, action: Any
) -> None:
    """Also where many have one key, and one of them stands in most ranges, or an image's first place is gone."""
    hashes = np.zeros((10, 10), np.uint32)  # one key; of the bits that decide few differ
    hashes[:, 2] = np.random.default_rng(seed).integers(0, 16, 10)
    rule = ImageDuplicates(max_bits=1, action=action)
    gone = {d: {i for i, (_, is_gone) in enumerate(document) if is_gone} for d, document in enumerate(shown)}

    def facts(corpus: Corpus, task: Range, rule: Any) -> dict[str, np.ndarray]:
        found = image_facts(corpus, task, ImageDuplicates(max_bits=None), gone)
        part = corpus.shard(task.shard)
        number_of = {digest.tobytes(): int(bytes(part.image(k))) for k, digest in enumerate(part.image_xxh3)}
        of_rows = [number_of[digest.tobytes()] for digest in found["digest"]]
        return {**found, "hash": hashes[of_rows], "detail": np.full(len(of_rows), 9, np.float32)}

    check_divisions([[b"%d" % k for k, _ in document] for document in shown], facts, join_images, rule)


def test_what_stands_often_hides_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """All have one key; the last two are alike, and before them one content stands often."""
    shown = [0, 0, 0, 1, 2]
    signatures = np.array([[0, 7, 7, 7], [0, 1, 1, 1], [0, 1, 1, 1]], np.uint32)
    monkeypatch.setattr(joins, "choose_bands", lambda *_: (1, 1))

    def facts(corpus: Corpus, task: Range, rule: Any) -> dict[str, np.ndarray]:
        found = document_facts(corpus, task, DocumentDuplicates(threshold=None))
        rows = [shown[document] for document in found["document"]]
        return {**found, "signature": signatures[rows], "shingles": np.ones(len(rows), np.int32)}

    rule = DocumentDuplicates(threshold=0.5, permutations=4, action="keep-one")
    ((places, _, matched),) = check_divisions([[f"text {k}"] for k in shown], facts, join_documents, rule)
    assert places == [(1, -1), (2, -1), (4, -1)]
    assert matched == ["document 0", "document 0", "document 3"]


def test_a_similarity_at_the_threshold_is_enough(tmp_path: Path) -> None:
    """10 · (1 - 0.9) is less than 1."""
    signature = np.zeros((2, 10), np.uint32)
    signature[1, 9] = 1
    facts = {"corpus": np.array("corpus"), "document": np.arange(2), "shingles": np.ones(2, np.int32)}
    np.savez(tmp_path / "0.npz", digest=np.arange(8, dtype=np.uint32).reshape(2, 4), signature=signature, **facts)
    (scratch := tmp_path / "scratch").mkdir()
    rule = DocumentDuplicates(threshold=0.9, permutations=10, action="keep-one")
    (found,) = join_documents([tmp_path / "0.npz"], rule, scratch)
    assert (removed(found), found.value.tolist()) == ([(1, -1)], [np.float32(0.9)])


def check_divisions(
    documents: Sequence[Sequence[Any]], facts: Any, join: Any, rule: Any
) -> list[tuple[list[tuple[int, int]], list[float], list[str]]]:
    """Places, values and matches that are removed where a row is compared with two of its key, which are the same
    however the corpus is cut into shards and tasks."""
    results = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "LIMIT", 2)
        patch.setattr(joins, "_DIFFERING", 0)  # one choice of bytes in place of 70
        patch.setattr(joins, "unite_alike", unite_alike.py_func)  # numba has compiled the limit in
        corpora = {shards: make_corpus(Path(folder) / f"{shards}", documents, shards) for shards in (1, 2)}
        for shards, size in ((1, 99), (1, 1), (2, 2)):
            root = Path(folder) / f"{shards}-{size}"
            files = facts_of(corpora[shards], facts, root / "facts", size, rule)
            (root / "scratch").mkdir()
            found = list(join(files, rule, root / "scratch"))
            results.append([(removed(r), r.value.tolist(), [m.partition(": ")[2] for m in r.matched]) for r in found])
    assert results[1:] == results[:1] * 2
    return results[0]


def test_a_manifest_is_not_read_for_each_file_of_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be large, as its corpus is."""
    corpus = make_corpus(tmp_path / "corpus", [[sentence(k % 5)] for k in range(10)])
    files = facts_of(corpus, document_facts, tmp_path / "facts", 1, rule := DocumentDuplicates(action="drop-all"))
    read = manifests_read(monkeypatch)
    (scratch := tmp_path / "scratch").mkdir()
    assert len(together(join_documents(files, rule, scratch))) == 10, "each is named by what another file has"
    assert read == []


def test_images_of_another_corpus(tmp_path: Path) -> None:
    ours = make_corpus(tmp_path / "ours", IMAGES, 2)
    other = make_corpus(tmp_path / "other", [["text"], [photograph(3, quality=70)]])
    rule = ImageDuplicates()
    files, against = (facts_of(c, image_facts, tmp_path / f"facts-{c.path.name}", 1, rule) for c in (ours, other))
    (scratch := tmp_path / "scratch").mkdir()
    found = together(join_images(files, rule, scratch, against))
    assert removed(found) == [(1, 0), (2, 0), (2, 2), (2, 3), (3, 0), (3, 2)]
    assert found.matched[1] == f"{other.path}: document 1, piece 0"


def test_an_empty_corpus_has_none(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", [["text"]])
    for name, make, join, rule in (
        ("documents", document_facts, join_documents, DocumentDuplicates()),
        ("images", image_facts, join_images, ImageDuplicates()),
    ):
        files = facts_of(corpus, make, tmp_path / f"facts-{name}", 1, rule)
        (scratch := tmp_path / f"scratch-{name}").mkdir()
        assert list(join(files, rule, scratch)) == []
