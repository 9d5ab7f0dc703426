"""A heap as glibc's malloc keeps one, as far as large blocks go: it grows, and never shrinks (`keep_freed_memory`)."""

from __future__ import annotations

import bisect

_ALIGNED = 64
"""bytes to which torch aligns tensors; the block before has its header there"""
_SPARE = 96
"""bytes that glibc must find beside an aligned block, which it gives back: so what has become free is not taken by the
next block of the same size"""


class Heap:
    """Places of blocks. The smallest free one that is large enough is taken, what is left of it stays free, and free
    neighbors are one; where none is large enough the heap grows at its end. So it may have more than was ever taken:
    what lies between blocks that stay can be too small for the next one (glibc 2.41's malloc.c, _int_memalign)."""

    def __init__(self) -> None:
        self.size = 0
        """bytes, the most there have been"""
        self._end = 0
        """behind it nothing is taken"""
        self._by_size: list[tuple[int, int]] = []
        self._starts: dict[int, int] = {}
        """length of the free block that begins at a place"""
        self._ends: dict[int, int] = {}
        """of the one that ends there, where it begins"""

    def take(self, size: int) -> int:
        """Where a new block of so many bytes is."""
        size = _rounded(size)
        found = bisect.bisect_left(self._by_size, (size + _SPARE, 0))
        if found == len(self._by_size):
            place, self._end = self._end, self._end + size
            self.size = max(self.size, self._end)
            return place
        length, place = self._by_size[found]
        self._remove(place, length)
        self._insert(place + size, length - size)
        return place

    def give(self, place: int, size: int) -> None:
        """A block is free again."""
        size = _rounded(size)
        if place + size in self._starts:
            after = self._starts[place + size]
            self._remove(place + size, after)
            size += after
        if place in self._ends:
            before = self._ends[place]
            self._remove(before, place - before)
            place, size = before, size + place - before
        if place + size == self._end:
            self._end = place
        else:
            self._insert(place, size)

    def _insert(self, place: int, size: int) -> None:
        bisect.insort(self._by_size, (size, place))
        self._starts[place] = size
        self._ends[place + size] = place

    def _remove(self, place: int, size: int) -> None:
        del self._by_size[bisect.bisect_left(self._by_size, (size, place))]
        del self._starts[place], self._ends[place + size]


def _rounded(size: int) -> int:
    return (size // _ALIGNED + 1) * _ALIGNED
