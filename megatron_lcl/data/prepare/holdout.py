"""Which documents to hold out, so that no held-out image has a near-duplicate in training.

Documents are joined where they come from one page, or where their images are near-duplicates; whole groups are held
out.
Two images are near-duplicates where one of three agrees, all computed on the image as models see it (`decode_rgb`):

* 16x16 RGB thumbnails differ by less than 11 levels (root mean square);
* difference hashes (64 bits: is a pixel of a 9x8 gray thumbnail darker than its right neighbor) differ in at most 5;
* 32x32 maps of edge strength correlate by more than 0.75, which also sees through changed colors and contrast.

All three compare whole numbers whose sums float32 has exactly, so that every processor finds the same; those of edges
are rounded from a norm that does not depend on the order of its sum.

On the GIMP manual that joins everything that still shows its most repeated photograph (124 filtered variants, on pages
that also share the original) and leaves about 70 of 464 pages in small groups.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash
from PIL import Image as Pillow

from megatron_lcl.data.corpus.document import Document
from megatron_lcl.data.corpus.probe import BadImage, probe
from megatron_lcl.data.corpus.rgb import decode_rgb
from megatron_lcl.data.corpus.thumbnails import are_alike, thumbnail
from megatron_lcl.errors import UserError

MAX_RMS = 11.0
MAX_BITS = 5
MIN_EDGE_CORRELATION = 0.75
MAX_IMAGES = 200_000
"""every image is compared with every other"""
_BLOCK = 2048
_EDGES_NORM = 4000
"""its square, and so every sum of products, is below `thumbnails.EXACT`, with what rounding may add (16)"""


class _Features(NamedTuple):
    thumbnail: np.ndarray
    """`thumbnails.thumbnail`"""
    bits: np.ndarray
    """float32 [64] of ±1"""
    edges: np.ndarray
    """float32 [1024], whole numbers of zero mean and the norm _EDGES_NORM, both but for rounding"""


class Described(NamedTuple):
    """Of a document what decides on its group."""

    group: str
    shared: list[bytes]
    """hashes of images by which it is joined to others"""
    images: list[tuple[bytes, _Features | None]]
    """hash and features of its images; None also where they were given before"""


class Describer:
    """Describes documents, each image once. One in every process."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def describe(self, document: Document) -> Described:
        shared = [bytes.fromhex(digest) for digest in document.metadata.get("shares", ())]
        images: list[tuple[bytes, _Features | None]] = []
        for image in document.images:
            digest = xxhash.xxh3_128_digest(image.data)
            images.append((digest, None if digest in self._seen else _features(image.data)))
            self._seen.add(digest)
        return Described(group_name(document), shared, images)


@dataclass
class Grouping:
    """Documents and images seen so far; `held_out` divides them."""

    _group_of: dict[str, int] = field(default_factory=dict)
    _image_of: dict[bytes, int] = field(default_factory=dict)
    _edges: list[tuple[int, int]] = field(default_factory=list)
    """(group, image)"""
    _features: list[_Features | None] = field(default_factory=list)

    def add(self, described: Described) -> None:
        """Take a document in: its group, its images, and what it shares with others."""
        group = self._group_of.setdefault(described.group, len(self._group_of))
        for digest in described.shared:
            self._edges.append((group, self._image(digest, None)))
        for digest, features in described.images:
            self._edges.append((group, self._image(digest, features)))

    def _image(self, digest: bytes, features: _Features | None) -> int:
        if digest not in self._image_of:
            if len(self._image_of) >= MAX_IMAGES:
                raise UserError(
                    f"over {MAX_IMAGES:,} different images are too many to hold documents out, for which all are "
                    "compared with all; take fewer documents",
                    {
                        "--held-out": ", or leave out --held-out, and preprocess some of the files into a corpus of "
                        "their own (docs/data.md)"
                    },
                )
            self._image_of[digest] = len(self._image_of)
            self._features.append(None)
        number = self._image_of[digest]
        if self._features[number] is None:  # a page named it by its hash before
            self._features[number] = features
        return number

    def groups(self) -> list[list[str]]:
        """Names of documents' groups, joined by near-duplicate images; the largest first."""
        from scipy.sparse import coo_array  # slow to import, and few runs come here
        from scipy.sparse.csgraph import connected_components

        num = len(self._group_of)
        if not num:
            return []
        edges = [(g, num + i) for g, i in self._edges]
        edges += [(num + i, num + j) for i, j in self._near_duplicates()]
        rows, columns = np.array(edges, np.int64).reshape(-1, 2).T
        size = num + len(self._image_of)
        graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(size, size))
        _, labels = connected_components(graph, directed=False)
        joined: dict[int, list[str]] = {}
        for name, group in self._group_of.items():
            joined.setdefault(int(labels[group]), []).append(name)
        return sorted(joined.values(), key=lambda names: (-len(names), names))

    def _near_duplicates(self) -> Iterable[tuple[int, int]]:
        known = [(i, features) for i, features in enumerate(self._features) if features is not None]
        if not known:
            return
        numbers = [i for i, _ in known]
        thumbnails, bits, edges = (np.stack(rows) for rows in zip(*(features for _, features in known), strict=True))
        for start in range(0, len(known), _BLOCK):
            block = slice(start, start + _BLOCK)
            near = are_alike(thumbnails[block], thumbnails, MAX_RMS)
            near |= bits[block] @ bits.T >= bits.shape[1] - 2 * MAX_BITS  # of ±1: length - 2 · differing bits
            near |= edges[block] @ edges.T > MIN_EDGE_CORRELATION * _EDGES_NORM**2
            for i, j in zip(*np.nonzero(near), strict=True):
                if start + i < j:
                    yield numbers[start + i], numbers[j]

    def held_out(self, fraction: float, seed: int = 0) -> set[str]:
        """Names of groups to hold out: whole small groups in a seeded order, up to `fraction` of the names,
        but one at least and never all.

        A group that would overshoot is skipped, so the largest ones stay in training. Raises UserError where
        nothing can be held out.
        """
        num = len(self._group_of)
        target = min(max(1, round(fraction * num)), num - 1)

        def order(names: list[str]) -> str:
            return xxhash.xxh3_128_hexdigest(f"{seed}\0{min(names)}".encode())

        chosen: set[str] = set()
        groups = self.groups()
        largest = max(1, target // 10)
        for names in sorted((g for g in groups if len(g) <= largest), key=order):
            if len(chosen) + len(names) <= target:
                chosen.update(names)
        if not chosen:
            raise _nothing_to_hold_out(num, groups, fraction, largest)
        return chosen


def _nothing_to_hold_out(num: int, groups: list[list[str]], fraction: float, largest: int) -> UserError:
    """The error for `num` documents, those of one `group_name` counted once, which are joined into one group, or into
    groups that are all larger than `largest`."""
    counted = "documents (those of one page, book or image count as one)"
    if num < 2:
        said = "there is one document alone, or all are of one page, book or image"
    elif len(groups) == 1:
        said = f"equal or near-duplicate images join all {num:,} {counted} into one group"
    else:
        said = (
            f"equal or near-duplicate images join {num:,} {counted} into {len(groups):,} groups, the smallest "
            f"of {len(groups[-1]):,}; with a fraction of {fraction:g} only groups of up to {largest:,} (a tenth "
            "of it) are"
        )
    enough = math.ceil(1000 * len(groups[-1]) / num) / 100 if groups else 1.0
    larger = f", or a larger --held-out-fraction ({enough:g})" if enough < 1 else ""
    return UserError(
        f"nothing to hold out: {said}; give more or other documents",
        {"--held-out": f"{larger}, or leave out --held-out"},
    )


def group_name(document: Document) -> str:
    """Documents of one group are held out, or not, together: the page of an HTML document, else the document itself.

    A number names the group that its digits name. TypeError for anything else that is not a string.
    """
    group = document.metadata.get("group")
    name = document.name if group in (None, "") or group is False else group
    if not isinstance(name, str | int):  # a list's text would do, and join nothing
        raise TypeError(f"a document's group, or name, is {name!r}, not a str")
    return str(name)


def groups_hash(groups: Iterable[str]) -> str:
    """XXH3-128 of names of groups: what tells one choice of documents to hold out from another."""
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(groups)).encode())


def _features(data: bytes) -> _Features | None:
    """What near-duplicates share; None for an image that does not decode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            probe(data)
            color = decode_rgb(data, 128)
        except BadImage:
            return None
    box = Pillow.Resampling.BOX
    gray = color.convert("L").resize((64, 64), box)
    row = np.asarray(gray.resize((9, 8), box), np.int16)
    vertical, horizontal = np.gradient(np.asarray(gray, np.float32))
    # squares of halves of levels are exact, and so are float64's sums of float32
    strength = np.sqrt(vertical**2 + horizontal**2).astype(np.float64)
    edges = strength.reshape(32, 2, 32, 2).mean((1, 3)).ravel()
    edges -= edges.mean()
    return _Features(
        thumbnail(color),
        np.where(row[:, 1:] > row[:, :-1], 1, -1).astype(np.float32).ravel(),
        # no BLAS, whose order of sums is the processor's
        np.rint(_EDGES_NORM * edges / (math.sqrt(math.fsum(edges**2)) + 1e-3)).astype(np.float32),
    )
