"""Protects that thumbnails are compared exactly: one level of one channel decides, in any order of sums."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pillow

from megatron_lcl.data.corpus.thumbnails import EXACT, are_alike, thumbnail

MAX_RMS = 11.0
LIMIT = 768 * 121
FIRST = {-1: [15, 4, 11], 0: [11, 11, 11], 1: [18, 6, 2]}
"""differences whose squares, with those of 765 of 11, are LIMIT and so much more"""


@pytest.mark.parametrize(("low", "high"), [(18, 255), (200, 255), (18, 60)])
def test_pictures_at_the_limit(low: int, high: int) -> None:
    rng = np.random.default_rng(low + high)
    ours = rng.integers(low, high + 1, (90, 768))
    more = np.arange(90) % 3 - 1
    theirs = ours - [rng.permutation([*FIRST[int(m)], *[11] * 765]) for m in more]
    distances = ((ours[:, None] - theirs) ** 2).sum(2)
    assert (np.diag(distances) == LIMIT + more).all()
    a, b = (
        np.stack([thumbnail(Pillow.fromarray(row.reshape(16, 16, 3).astype(np.uint8))) for row in rows])
        for rows in (ours, theirs)
    )
    for _ in range(5):
        columns = rng.permutation(768)
        assert (are_alike(a[:, columns], b[:, columns], MAX_RMS) == (distances < LIMIT)).all()


def test_no_sum_is_too_large() -> None:
    """Of pictures that differ as much as two can, or are as bright or as dark."""
    ends = np.stack([thumbnail(Pillow.new("RGB", (16, 16), color)) for color in ("black", "white", "red")])
    assert np.abs(ends).max() ** 2 * 768 < EXACT
    assert are_alike(ends, ends, MAX_RMS).tolist() == np.eye(3, dtype=bool).tolist()
