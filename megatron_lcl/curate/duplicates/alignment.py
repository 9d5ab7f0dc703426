"""Do two pictures show the same, one of them perhaps flipped, cropped a little, or partly covered?

Both are stretched to a square. The first is laid over the second by an affine map that maximizes the correlation of
their gray levels (Evangelidis & Psarakis, "Parametric image alignment using enhanced correlation coefficient
maximization", 2008; OpenCV's), starting from where the candidate's hash was taken. Then their blocks are compared one
by one, so that a text bar or a logo costs the blocks that it covers and no more. Gray levels are compared as they are:
without their means, a dark surface with an edge would be the same as a bright one. So are colors, unless the first
picture has none: it may have been made gray.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

SIDE = 64
"""pixels a side of the pictures"""
COLOR_SIDE = 16
"""cells a side, of whose colors the means are known"""
_BLOCK = 8
_CELL = 4
"""pixels a side of the cells that are compared before the alignment"""
_KEPT = 0.8
"""of the cells, those that differ least: the others may be covered"""
_MIN_EXPLAINED = 0.3
"""share of their variance that the picture has to explain, before it is aligned"""
_ITERATIONS, _PRECISION = 20, 1e-3
_FILTER = 5
"""pixels, of the Gaussian that the alignment blurs both with"""
_MAX_SHIFT = 5.0
"""pixels, by which the alignment may move a corner from the first guess: 8 % of a side"""
_DETAIL = 3.0
"""levels: blocks of a smaller standard deviation are blank"""
_BLUR = 3
"""pixels, of the Gaussian before blocks are compared: half a pixel of misalignment in fine texture is no difference"""
_LEVELS, _SHARE = 5.0, 0.6
"""Blank blocks are the same where they differ by at most so many levels (root mean square), others where they do by at
most so much of their standard deviation"""
_MIN_BLOCKS, _STRICT_SHARE = 6, 0.4
"""of 64, which are not blank; pictures with fewer, or with all of them in one row or column, as of a surface with an
edge, are the same only where every block differs by at most so much of its standard deviation, or by _LEVELS"""
_COLOR = 16.0
"""levels, by which the mean colors of blocks that are the same differ at most"""
_GRAY = 6
"""levels, within which all colors of a gray picture are"""
_IDENTITY = np.eye(2, 3, dtype=np.float32)
_CORNERS = np.array([[0, SIDE - 1, 0, SIDE - 1], [0, 0, SIDE - 1, SIDE - 1], [1, 1, 1, 1]], np.float32)


class Picture(NamedTuple):
    """A picture, stretched to a square."""

    gray: np.ndarray
    """uint8 [SIDE, SIDE]"""
    color: np.ndarray
    """Cb and Cr of JFIF (ITU-T T.871), without color 128: uint8 [COLOR_SIDE, COLOR_SIDE, 2]"""

    def flipped(self) -> Picture:
        return Picture(np.ascontiguousarray(self.gray[:, ::-1]), self.color[:, ::-1])


def agreement(picture: Picture, other: Picture, start: np.ndarray, least: float = 0.0) -> float:
    """The share, 0 … 1, of the blocks of `other` that `picture` shows; the lower one of all blocks and of those that
    are not blank. 0 where it is less than `least`, for which colors need not always be compared.

    start: float32 [2, 3], the first guess of the map from pixels in `picture`, (column, row, 1), to pixels in `other`.
    Also compared as they are: of a picture that is much the same everywhere, the hash of a part may be the nearest one
    though the picture is not cropped.
    """
    share = _share(picture, other, _IDENTITY, least)
    if _explained(picture.gray, _warped(other.gray, start)) < _MIN_EXPLAINED:
        return share
    if (start != _IDENTITY).any():
        share = max(share, _share(picture, other, start, least))
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, _ITERATIONS, _PRECISION)
    try:
        everywhere = np.full_like(picture.gray, 255)
        _, found = cv2.findTransformECC(
            picture.gray, other.gray, start.copy(), cv2.MOTION_AFFINE, criteria, everywhere, _FILTER
        )
    except cv2.error:  # it does not converge, as for most pictures that are not the same
        return share
    if np.abs((found - start) @ _CORNERS).max() > _MAX_SHIFT:
        return share
    return max(share, _share(picture, other, found, least))


def _warped(picture: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """uint8 [SIDE, SIDE, …] → float32, laid under the picture that `warp` maps to it."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(picture.astype(np.float32), warp, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _explained(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of the variance of the cells that is the same in both, but for those that differ most."""
    ours, theirs = _blocks(ours, _CELL).mean(1, dtype=np.float32), _blocks(theirs, _CELL).mean(1)
    error = ours - theirs
    error = np.abs(error - np.median(error))
    kept = np.argsort(error, kind="stable")[: round(_KEPT * len(error))]
    return float(1 - (error[kept] ** 2).mean() / max(float(theirs.var()), 1e-6))


def _share(picture: Picture, other: Picture, warp: np.ndarray, least: float) -> float:
    ours, theirs = (
        _blocks(cv2.GaussianBlur(gray, (_BLUR, _BLUR), 0), _BLOCK)
        for gray in (picture.gray.astype(np.float32), _warped(other.gray, warp))
    )
    spread = theirs.std(1)
    error = np.sqrt(((ours - theirs) ** 2).mean(1))
    detailed = spread >= _DETAIL
    square = detailed.reshape(SIDE // _BLOCK, -1)
    is_edge = min(square.any(0).sum(), square.any(1).sum()) < 2
    if detailed.sum() < _MIN_BLOCKS or is_edge:
        same, counted = error <= np.maximum(_STRICT_SHARE * spread, _LEVELS), None
    else:
        same, counted = error <= np.where(detailed, _SHARE * spread, _LEVELS), detailed
    share = _share_of(same, counted)
    if share == 0 or share < least:
        return 0.0
    share = _share_of(same & _same_colors(picture.color, other.color, warp), counted)
    return share if share >= least else 0.0


def _share_of(same: np.ndarray, detailed: np.ndarray | None) -> float:
    """Of the blocks; without `detailed`, 1 only where all are the same."""
    return float(same.all() if detailed is None else min(same.mean(), same[detailed].mean()))


def _same_colors(ours: np.ndarray, theirs: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """Of every block whether it has the same color in both, bool [blocks]."""
    cell = SIDE // COLOR_SIDE
    first, second = (color.repeat(cell, 0).repeat(cell, 1) for color in (ours, theirs))
    one, other = (
        np.stack([_blocks(color[..., k], _BLOCK).mean(1) for k in (0, 1)]) for color in (first, _warped(second, warp))
    )
    is_gray = np.abs(one - 128).max() <= _GRAY
    return (np.hypot(*(one - other)) <= _COLOR) | is_gray


def _blocks(picture: np.ndarray, size: int) -> np.ndarray:
    """[SIDE, SIDE] → [blocks, pixels]"""
    side = SIDE // size
    return picture.reshape(side, size, side, size).swapaxes(1, 2).reshape(side * side, -1)
