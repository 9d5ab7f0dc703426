"""Protects what `inspect` says of all documents and images of a corpus: the numbers, and the memory that they take."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data.corpora import finish_corpus
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_lcl.data.corpus.store import ShardWriter
from megatron_lcl.data.corpus.tokenizer import ClipTokenizer
from megatron_lcl.data.pages import distribution, inspect
from megatron_lcl.data.pages.distribution import Distribution

FRACTIONS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def of(values: np.ndarray, cuts: list[int]) -> Distribution:
    """The distribution of values that come in parts."""
    found = Distribution()
    for part in np.split(values, cuts):
        found.add(part)
    return found


@example(np.array([0.5, np.nextafter(np.float32(0.5), np.float32(1))], np.float32), [])
@given(
    st.one_of(
        st.lists(st.integers(0, 9), min_size=1, max_size=60).map(lambda v: np.array(v, np.int32)),
        st.lists(st.integers(0, 1 << 40), min_size=1, max_size=60).map(np.array),
        st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60).map(lambda v: np.array(v, np.float32)),
    ),
    st.lists(st.integers(0, 60), max_size=3).map(sorted),
)
def test_numbers_are_those_of_all_values(values: np.ndarray, cuts: list[int]) -> None:
    found, wide = of(values, cuts), values.astype(np.float64)
    assert len(found) == len(values)
    assert found.mean() == pytest.approx(wide.mean(), rel=1e-12, abs=1e-12)
    assert found.quantiles(FRACTIONS) == np.quantile(values, FRACTIONS).tolist()
    counts, edges = found.histogram(40, 0.95)
    low, high = float(wide.min()), float(np.quantile(values, FRACTIONS)[5])
    high = high if high > low else low + 1
    expected, bounds = np.histogram(np.clip(wide, low, high), bins=40, range=(low, high))
    assert counts.tolist() == expected.tolist()
    assert edges.tolist() == bounds.tolist()


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_of_many_different_values_four_digits_stay(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the parts in which they come; few values stay as they are."""
    values = np.random.default_rng(0).lognormal(0, 2, 30_000) * (1 << 20)
    values = values.astype(kind) if kind is np.int64 else (values / (1 << 24)).astype(kind)
    monkeypatch.setattr(distribution, "_EXACT", 1000)
    parts = [of(values, cuts) for cuts in ([], [7, 9000, 9001], list(range(0, 30_000, 300)))]
    told = [part.quantiles(FRACTIONS) for part in parts]
    assert told[0] == told[1] == told[2] != np.quantile(values, FRACTIONS).tolist()
    np.testing.assert_allclose(told[0], np.quantile(values, FRACTIONS), rtol=2.0**-17)
    assert parts[0].mean() == pytest.approx(values.mean(dtype=np.float64), rel=2.0**-17)
    assert len(parts[2]) == len(values)
    monkeypatch.setattr(distribution, "_EXACT", 30_000)
    assert of(values, [9000]).quantiles(FRACTIONS) == np.quantile(values, FRACTIONS).tolist()


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as the same values come again, nor as there are more different ones than are kept."""
    num = 10_000
    monkeypatch.setattr(distribution, "_EXACT", 1000)
    monkeypatch.setattr(distribution, "_BITS", 8)
    peaks = []
    for num_shards in (1, 6):
        folder = tmp_path / str(num_shards)
        folder.mkdir()
        files, counts = {}, []
        for k in range(num_shards):
            writer = ShardWriter(folder, k)
            lengths = np.random.default_rng(k).integers(1, 1000, num)
            writer.add_text_documents(bytes(4 * int(lengths.sum())), lengths.tolist(), [1] * num, [""] * num)
            for j in range(1000):
                writer.add_image(os.urandom(8), 1, 1, "PNG", float(np.random.default_rng([k, j]).uniform()), 0)
            writer.end_document()
            written, of_shard = writer.finish()
            files.update(written)
            counts.append(of_shard)
        corpus = finish_corpus(folder, ClipTokenizer([]), counts, files)
        inspect.stats(corpus)  # what is imported, and read of the manifest
        tracemalloc.start()
        try:
            statistics = inspect.stats(corpus)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(statistics["distributions"]) == 7
    assert peaks[1] < 1.5 * peaks[0]
