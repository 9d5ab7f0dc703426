"""Small versions of pictures, compared by whole numbers: every processor finds the same ones alike."""

from __future__ import annotations

import numpy as np
from PIL import Image as Pillow

_SIDE = 16
_MIDDLE = 128
EXACT = 1 << 24
"""float32 has every whole number up to here: sums of products that stay below are the same in any order"""


def thumbnail(image: Pillow.Image) -> np.ndarray:
    """float32 [768]: 16x16 pixels of an RGB image, in levels less 128, so that sums of products are below EXACT."""
    small = image.resize((_SIDE, _SIDE), Pillow.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() - _MIDDLE


def are_alike(ours: np.ndarray, theirs: np.ndarray, max_rms: float) -> np.ndarray:
    """bool [N, M]: which of N and M thumbnails differ by less than `max_rms` levels of 256 (root mean square), which is
    a whole number below 100.

    |a - b|² < limit is taken as a·b - |b|²/2 > |a|²/2 - limit/2. The right side has no more than one binary digit after
    the point and is below EXACT / 2, and so are left sides that are greater, so both are exact where it matters.
    """
    left = ours @ theirs.T
    left -= _half_square(theirs)
    return left > _half_square(ours)[:, None] - ours.shape[1] * max_rms**2 / 2


def _half_square(thumbnails: np.ndarray) -> np.ndarray:
    return (thumbnails**2).sum(1) / 2
