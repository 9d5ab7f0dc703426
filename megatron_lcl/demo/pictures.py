"""A picture with its name, and how alike two pictures are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from megatron_lcl.data.corpus.perceptual_hash import perceptual_hash
from megatron_lcl.data.corpus.rgb import decode_rgb
from megatron_lcl.data.corpus.thumbnails import are_alike, thumbnail

MAX_BITS = 10
"""of 64, in which the perceptual hashes of two drawings of one name differ at most where one redraws the other"""
MAX_RMS = 11.0
"""levels of 256, by which 16x16 thumbnails of two pictures of any names differ at most where they are one picture"""
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Picture:
    """What an artist drew for a name."""

    artist: str
    name: str
    """the label, as it stands in texts"""
    about: str
    """what else is said of it: tags, or a description"""
    kind: str
    """one of a few, for probes"""
    topic: str
    """pictures of one topic stand together in documents"""
    file: str
    """its path below the documents' folder"""
    data: bytes = field(repr=False)
    """PNG"""

    @property
    def key(self) -> str:
        """Identifies it, and orders it in a way that has nothing to do with its name."""
        return xxhash.xxh3_64_hexdigest(f"{self.artist}\0{self.file}".encode())


def is_chosen(name: str, fraction: float, purpose: str) -> bool:
    """Whether a name is among the `fraction` of all names that a hash chooses; each purpose chooses others."""
    return xxhash.xxh3_64_intdigest(f"{purpose}\0{name}".encode()) < fraction * 2.0**64


def near_duplicates(pictures: Sequence[Picture], others: Iterable[Picture]) -> list[int]:
    """Indices of `pictures` that have a near-duplicate among the others.

    It is one where both have the same name and their hashes differ in at most MAX_BITS bits (a redrawing), or where
    their thumbnails differ by less than MAX_RMS (the same picture). The hash alone is not enough where names differ:
    it finds a red triangle like the German flag, as simple drawings have few bits that say anything.
    """
    ours, theirs = list(pictures), list(others)
    if not ours or not theirs:
        return []
    names = {name: k for k, name in enumerate(dict.fromkeys(p.name for p in (*ours, *theirs)))}
    name, bits, thumbnails = _features(ours, names)
    their_name, their_bits, their_thumbnails = _features(theirs, names)
    found: list[int] = []
    for start in range(0, len(ours), _ROWS):
        rows = slice(start, start + _ROWS)
        differing = (bits.shape[1] - bits[rows] @ their_bits.T) / 2  # of ±1
        near = (differing <= MAX_BITS) & (name[rows, None] == their_name)
        near |= are_alike(thumbnails[rows], their_thumbnails, MAX_RMS)
        found += (start + np.flatnonzero(near.any(1))).tolist()
    return found


def _features(pictures: list[Picture], names: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of N pictures: names int [N], hashes float32 [N, 64] of ±1, and their `thumbnail`, [N, 768]."""
    bits = np.empty((len(pictures), 64), np.float32)
    thumbnails = np.empty((len(pictures), 16 * 16 * 3), np.float32)
    for k, picture in enumerate(pictures):
        image = decode_rgb(picture.data)
        bits[k] = np.where(perceptual_hash(image), 1, -1)
        thumbnails[k] = thumbnail(image)
    return np.array([names[p.name] for p in pictures]), bits, thumbnails
