"""How numbers are distributed that are too many to keep: how often each value occurs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_EXACT = 1 << 20
"""different values that are kept as they are"""
_BITS = 17
"""significant bits of each where there are more: at most 65,536 between two powers of two"""


class Distribution:
    """Mean, quantiles and histogram of the values of a corpus's shards, which are added one after another.

    What is kept grows with the number of different values. Where they are more than a million (2^20), each is rounded
    to 17 significant bits: a change of at most 8 millionths, of which four digits show nothing or one in the last.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._rounded = False

    def __len__(self) -> int:
        """How many values there are, equal ones included."""
        return sum(int(counts.sum()) for _, counts in self._waiting)

    def add(self, values: np.ndarray) -> None:
        """values: integers, or floating point without NaN, [N]."""
        if not len(values):
            return
        different, counts = np.unique(values, return_counts=True)
        self._waiting.append((different.astype(np.result_type(values, np.float32), copy=False), counts))
        # not each time, as merging takes as long as there are values
        if len(self._waiting) > 1 and sum(len(of) for of, _ in self._waiting[1:]) > _EXACT:
            self._merge()

    def mean(self) -> float:
        """Of at least one value."""
        values, counts = self._merge()
        return float((values.astype(np.float64) * counts).sum() / counts.sum())

    def quantiles(self, fractions: Sequence[float]) -> list[float]:
        """As np.quantile computes them, of at least one value."""
        values, counts = self._merge()
        ends = np.cumsum(counts)
        found = []
        for fraction in fractions:
            place = fraction * (int(ends[-1]) - 1)
            both = values[np.searchsorted(ends, [int(place), min(int(place) + 1, int(ends[-1]) - 1)], "right")]
            found.append(float(np.quantile(both, [place - int(place)])[0]))
        return found

    def histogram(self, num_bins: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Counts [num_bins] and edges [num_bins + 1], from the least value to the quantile of `fraction`; what lies
        above is in the last bin. Of at least one value."""
        values, counts = self._merge()
        low, (high,) = float(values[0]), self.quantiles([fraction])
        if high <= low:
            high = low + 1
        # float32 has not always as many numbers as there are edges between two of its values
        wide = np.clip(values.astype(np.float64), low, high)
        return np.histogram(wide, bins=num_bins, range=(low, high), weights=counts)

    def _merge(self) -> tuple[np.ndarray, np.ndarray]:
        """Different values, ascending, and how often each occurs."""
        values, counts = (np.concatenate(arrays) for arrays in zip(*self._waiting, strict=True))
        if len(self._waiting) > 1:
            values, counts = _added_up(values, counts)
        if self._rounded or len(values) > _EXACT:
            self._rounded = True  # from now on all are, so that it does not matter in which parts they come
            fraction, exponent = np.frexp(values)
            values = np.ldexp(np.rint(np.ldexp(fraction, _BITS)), exponent - _BITS)
            values, counts = _added_up(values, counts)
        self._waiting = [(values, counts)]
        return values, counts


def _added_up(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of values that may repeat, ascending, and the sum of the counts of each."""
    order = np.argsort(values, kind="stable")
    values = values[order]
    first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return values[first], np.add.reduceat(counts[order], first)
