"""The hashes by which an image of a corpus finds the evaluation image that it is made of.

A perceptual hash of the whole picture survives resizing and recompression. For a flip, the evaluation image is also
hashed flipped; for a crop, so are parts of it, from which no crop of up to a tenth of the area is far; for a text bar
or a logo, so are its four outer thirds, one of which stays uncovered wherever it is put. An image of the corpus needs
five hashes then: the whole and the thirds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image as Pillow

from megatron_lcl.compiled import compiled
from megatron_lcl.data.corpus.perceptual_hash import perceptual_hash

Rectangle = tuple[float, float, float, float]
"""left, top, right, bottom, as shares of the sides"""
_C = 0.05
"""what a part lacks at a side; the whole is a part too, so that none of up to 0.1 is further than half of it"""
WHOLE: Rectangle = (0, 0, 1, 1)
PARTS: tuple[Rectangle, ...] = (
    WHOLE,
    (_C / 2, _C / 2, 1 - _C / 2, 1 - _C / 2),
    *((_C * x, _C * y, 1 - _C * (1 - x), 1 - _C * (1 - y)) for x in (0, 1) for y in (0, 1)),
    (1.5 * _C, 0, 1, 1),
    (0, 1.5 * _C, 1, 1),
    (0, 0, 1 - 1.5 * _C, 1),
    (0, 0, 1, 1 - 1.5 * _C),
)
THIRDS: tuple[Rectangle, ...] = ((0, 0, 1, 1 / 3), (0, 2 / 3, 1, 1), (0, 0, 1 / 3, 1), (2 / 3, 0, 1, 1))
ASKED = (WHOLE, *THIRDS)
"""hashed of an image of the corpus"""
KEPT = (*PARTS, *THIRDS)
"""hashed of an evaluation image, and of it flipped"""


class View(NamedTuple):
    """How an image of the corpus would show an evaluation image."""

    asked: int
    """which of ASKED it is compared with"""
    flipped: bool
    shown: Rectangle
    """the part of the evaluation image, not flipped"""


def _views() -> tuple[View, ...]:
    views = []
    for flipped in (False, True):
        for left, top, right, bottom in PARTS:
            views.append(
                View(0, flipped, (1 - right, top, 1 - left, bottom) if flipped else (left, top, right, bottom))
            )
        views += [View(1 + k, flipped, WHOLE) for k in range(len(THIRDS))]
    return tuple(views)


COMPARED = _views()
"""what each of KEPT, and then each of KEPT of the flipped picture, stands for"""
_MARGIN = 128.0
"""of a coefficient above the median: what white noise of two levels gives. Regular patterns, gradients and symmetric
pictures have many coefficients of about zero, and so has their median: without a margin noise would set their bits"""
_U = np.uint64


def view_hashes(
    pixels: np.ndarray, rectangles: tuple[Rectangle, ...], min_detail: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of parts of a gray picture, uint8 [S, S]: hashes uint64 [V], and whether a part has detail enough, bool [V]."""
    image, side = Pillow.fromarray(pixels), len(pixels)
    bits, detailed = [], []
    for rectangle in rectangles:
        left, top, right, bottom = (round(side * edge) for edge in rectangle)
        part = image.crop((left, top, right, bottom))
        bits.append(perceptual_hash(part, margin=_MARGIN))
        detailed.append(np.asarray(part).std() >= min_detail)
    return np.packbits(bits, axis=1).view(_U).ravel(), np.array(detailed)


@compiled
def nearest(
    asked: np.ndarray, asked_ok: np.ndarray, kept: np.ndarray, kept_ok: np.ndarray, by: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each of N evaluation images: by how many bits its nearest view is nearer than its radius, int64 [N] (negative:
    none is near), and which view that is, int64 [N].

    asked uint64 [A], kept uint64 [N, V]; `_ok`: whether they are to be compared; by int64 [V]: which of A each of V is
    compared with; radius int64 [V].
    """
    slack, view = np.full(len(kept), -65), np.zeros(len(kept), np.int64)
    for n in range(len(kept)):
        for v in range(kept.shape[1]):
            if not (kept_ok[n, v] and asked_ok[by[v]]):
                continue
            x = kept[n, v] ^ asked[by[v]]
            x = x - ((x >> _U(1)) & _U(0x5555555555555555))
            x = (x & _U(0x3333333333333333)) + ((x >> _U(2)) & _U(0x3333333333333333))
            x = (x + (x >> _U(4))) & _U(0x0F0F0F0F0F0F0F0F)
            distance = np.int64((x * _U(0x0101010101010101)) >> _U(56))
            if radius[v] - distance > slack[n]:
                slack[n], view[n] = radius[v] - distance, v
    return slack, view


def first_guess(shown: Rectangle, side: int) -> np.ndarray:
    """float32 [2, 3]: the map of pixels (column, row, 1) of a square picture of `side` pixels to those of the square of
    which it shows a part."""
    left, top, right, bottom = shown
    width, height = right - left, bottom - top
    return np.array([[width, 0, side * left + (width - 1) / 2], [0, height, side * top + (height - 1) / 2]], np.float32)
