"""Rows that are alike, joined into clusters: equal keys by sorting, beyond memory, and union-find.

N rows have a description each, uint32 [N, D] in a file that is mapped. Two of them are alike where they differ in few
places: entries of MinHash signatures, or bits of perceptual hashes. Only rows with an equal key are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_lcl.compiled import compiled
from megatron_lcl.data.prepare.sorting import sorted_rows

LIMIT = 64
"""A row is compared with the first so many rows of its key, in order: where boilerplate gives one key to many rows, to
compare all pairs would take the square of their number. Of rows with the same content the joins give a key to the first
only (`join.same_content`), so these are so many contents. numba compiles the number in."""
MEMORY = 1 << 30
"""bytes that sorting the keys may take"""
_BYTES_OF_ROW = 48
"""a key and its row, the same sorted, the order that sorting gives, and what it needs itself"""
_CHUNK = 1 << 20


@compiled
def find(parent: np.ndarray, row: int) -> int:
    """The first row of a row's cluster, which the rows on the way are then nearer to (path halving)."""
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row


@compiled
def unite(parent: np.ndarray, one: int, other: int) -> None:
    """Join two rows' clusters; the first row of both stands for it, whatever the order of calls."""
    one, other = find(parent, one), find(parent, other)
    if one < other:
        parent[other] = one
    else:
        parent[one] = other


@compiled
def difference(one: np.ndarray, other: np.ndarray, bits: bool, limit: int) -> int:
    """How many entries (bits: how many bits) of two descriptions differ; more than `limit` are not counted on."""
    total = 0
    for k in range(len(one)):
        x = one[k] ^ other[k]
        if bits:
            x = x - ((x >> np.uint32(1)) & np.uint32(0x55555555))
            x = (x & np.uint32(0x33333333)) + ((x >> np.uint32(2)) & np.uint32(0x33333333))
            x = (x + (x >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
            x = (x + (x >> np.uint32(8))) & np.uint32(0x00FF00FF)
            total += (x + (x >> np.uint32(16))) & np.uint32(0xFF)
        elif x:
            total += 1
        if total > limit:
            break
    return total


@compiled
def unite_alike(
    rows: np.ndarray, starts: np.ndarray, described: np.ndarray, bits: bool, limit: int, parent: np.ndarray
) -> None:
    """Join those of each group, rows[starts[g]:starts[g+1]], whose descriptions, uint32 [N, D], differ in at most
    `limit` places."""
    for g in range(len(starts) - 1):
        for k in range(starts[g] + 1, starts[g + 1]):
            row = rows[k]
            for j in range(starts[g], min(k, starts[g] + LIMIT)):
                other = rows[j]
                if find(parent, row) == find(parent, other):
                    continue
                if difference(described[row], described[other], bits, limit) <= limit:
                    unite(parent, row, other)


def equal_keys(
    keys: Callable[[int, int], tuple[np.ndarray, np.ndarray]], num: int, file: Path, memory: int = MEMORY
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows int64 [R], starts int64 [G+1]) of groups of two or more rows with an equal key, keys and rows ascending.

    keys(start, stop): keys of those of the rows start … stop-1 that have one, uint64 and evenly distributed, and these
    rows, int64; each row is asked for once. If sorting them would take more than `memory` bytes, a new `file` takes 16
    bytes a row meanwhile; the groups and their order are the same. Rows with one key are in memory together, however
    many they are.
    """
    at_once = max(1, memory // _BYTES_OF_ROW)
    step = min(_CHUNK, -(-at_once // 16))
    found = (keys(start, min(num, start + step)) for start in range(0, num, step))
    for rows in sorted_rows((np.stack([key, row.view(np.uint64)], 1) for key, row in found), at_once, file):
        groups = _groups(rows[:, 0], rows[:, 1].view(np.int64))
        del rows  # or it would be there while the next part is sorted
        yield groups


def _groups(key: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sorted keys, and their rows."""
    new = np.concatenate([[True], key[1:] != key[:-1]])
    sizes = np.diff(np.append(np.flatnonzero(new), len(key)))
    several = sizes > 1
    starts = np.concatenate([[0], np.cumsum(sizes[several])])
    return row[np.repeat(several, sizes)], starts
