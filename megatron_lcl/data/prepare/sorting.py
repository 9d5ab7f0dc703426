"""Rows of numbers that may not fit in memory, sorted: each is written once, and read once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_lcl.errors import naming


def sorted_rows(blocks: Iterable[np.ndarray], at_once: int, file: Path) -> Iterator[np.ndarray]:
    """Rows, uint64 [N, K], by their first number, equal ones in the order in which they came; in parts [P, K], each
    with all rows of its first numbers.

    More than `at_once` rows wait, as sorted runs, in a new `file`, of 8 · K bytes a row, which is removed at the end.
    A part then has about `at_once` rows if the first numbers are evenly distributed, as hashes are. In memory are so
    many rows, or a block or the rows of one first number if those are more, up to three times; and 8 bytes for each run
    in each part.
    """
    waiting: list[np.ndarray] = []
    ends = [0]
    num = 0
    try:
        for block in blocks:
            if num and num + len(block) > at_once:
                _append(file, waiting)
                ends.append(ends[-1] + num)
                num = 0
            waiting.append(block)
            num += len(block)
        if len(ends) == 1:  # all fits in memory
            if num:
                yield _sorted(waiting)
            return
        width = waiting[0].shape[1]
        _append(file, waiting)
        ends.append(ends[-1] + num)
        yield from _merged(np.memmap(file, np.uint64, "r").reshape(-1, width), ends, at_once)
    finally:
        file.unlink(missing_ok=True)


def _merged(rows: np.ndarray, ends: list[int], at_once: int) -> Iterator[np.ndarray]:
    """The parts, from sorted runs rows[ends[r]:ends[r+1]]."""
    num_parts = -(-len(rows) // at_once)
    lows = np.array([(k << 64) // num_parts for k in range(num_parts)], np.uint64)
    bounds = np.empty((len(ends) - 1, num_parts + 1), np.int64)
    for of_run, (start, stop) in zip(bounds, itertools.pairwise(ends), strict=True):
        of_run[:-1] = start + np.searchsorted(rows[start:stop, 0], lows)
        of_run[-1] = stop
    for k in range(num_parts):
        part = _sorted([rows[start:stop] for start, stop in bounds[:, k : k + 2].tolist()])
        if len(part):
            yield part
        del part  # or it would be there while the next is sorted


def _append(file: Path, waiting: list[np.ndarray]) -> None:
    with naming(file), file.open("ab") as stream:
        stream.write(_sorted(waiting).data)


def _sorted(pieces: list[np.ndarray]) -> np.ndarray:
    """All rows of the pieces, which are given up."""
    rows = np.concatenate(pieces)
    pieces.clear()
    return rows[np.argsort(rows[:, 0], kind="stable")]
