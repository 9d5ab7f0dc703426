"""Protects sorting beyond memory: all rows, in order and in parts by their first number, each read once."""

from __future__ import annotations

import itertools
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl.data.prepare.sorting import sorted_rows


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 15), max_size=9), max_size=9), st.integers(1, 60), st.integers(1, 3))
def test_rows_are_sorted_and_equal_ones_stay_in_order(blocks: list[list[int]], at_once: int, width: int) -> None:
    first = [np.array(block, np.uint64) << np.uint64(60) for block in blocks]
    of_all = np.concatenate([*first, np.empty(0, np.uint64)])
    number = iter(np.arange(len(of_all), dtype=np.uint64))

    def given_out() -> Iterator[np.ndarray]:
        for block in first:
            yield np.array([[value, *([next(number)] * (width - 1))] for value in block], np.uint64).reshape(-1, width)

    with tempfile.TemporaryDirectory() as folder:
        parts = list(sorted_rows(given_out(), at_once, Path(folder) / "rows"))
        assert list(Path(folder).iterdir()) == []
    assert all(len(part) for part in parts)
    rows = np.concatenate([*parts, np.empty((0, width), np.uint64)])
    order = np.argsort(of_all, kind="stable")
    assert rows[:, 0].tolist() == of_all[order].tolist()
    assert all(column.tolist() == order.tolist() for column in rows.T[1:])
    if len(of_all) <= at_once:
        assert len(parts) <= 1
    assert all(one[-1, 0] < other[0, 0] for one, other in itertools.pairwise(parts))


def test_parts_are_about_as_large_as_is_allowed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = (rng.integers(0, 2**64, (300, 2), np.uint64) for _ in range(40))
    sizes = [len(part) for part in sorted_rows(blocks, 1000, tmp_path / "rows")]
    assert sum(sizes) == 12_000
    assert len(sizes) == 12
    assert max(sizes) < 1200


def test_nothing_is_left_where_a_reader_stops(tmp_path: Path) -> None:
    parts = sorted_rows((np.arange(9, dtype=np.uint64)[:, None] for _ in range(9)), 9, tmp_path / "rows")
    next(parts)
    assert (tmp_path / "rows").stat().st_size == 9 * 9 * 8
    parts.close()  # type: ignore[attr-defined]  # it is a generator
    assert list(tmp_path.iterdir()) == []


def test_of_each_run_and_part_little_is_in_memory(tmp_path: Path) -> None:
    """8 bytes where it is cut: there are as many of both as all rows are times what fits in memory."""
    runs = 200
    blocks = [block[:, None] for block in np.random.default_rng(0).integers(0, 2**64, (runs, 8), np.uint64)]
    tracemalloc.start()
    try:
        assert sum(len(part) for part in sorted_rows(blocks, 8, tmp_path / "rows")) == 8 * runs
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * runs**2
