"""Facts of all tasks → which documents and images are removed. Independent of how the corpus was cut into tasks.

Facts are copied into arrays on the disk and mapped; in memory are about 60 bytes a document, or a place of an image,
and what sorting may take (`clusters.MEMORY`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numba
import numpy as np

from megatron_lcl.curate.documents import address
from megatron_lcl.curate.duplicates.clusters import MEMORY, difference, equal_keys, find, unite_alike
from megatron_lcl.curate.duplicates.minhash import choose_bands
from megatron_lcl.curate.duplicates.settings import Action, DocumentDuplicates, ImageDuplicates
from megatron_lcl.data.corpus.files import new_array
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.loading.hashes import mix

_DIFFERING = 4
"""Images are compared where at least 4 of the 8 bytes of their 64-bit hashes agree, as they do where at most 4 bits
differ: a key for each choice of 4 (Manku, Jain & Das Sarma, "Detecting near-duplicates for web crawling", 2007, 3.1)"""


@dataclass(frozen=True)
class Removals:
    """What a rule removes from a corpus, in the corpus's order."""

    document: np.ndarray
    """int64 [R], number in the corpus"""
    item: np.ndarray
    """int32 [R], index of the piece in the document; -1: the document"""
    value: np.ndarray
    """float32 [R], how alike it is to what it matched: see the join"""
    matched: list[str] = field(repr=False)
    """what stays, or is removed with it, or the evaluation image"""

    def __len__(self) -> int:
        return len(self.document)


def join_documents(
    files: Sequence[Path],
    settings: DocumentDuplicates,
    scratch: Path,
    against: Sequence[Path] = (),
    memory: int = MEMORY,
) -> Removals:
    """Documents of a corpus that are in it before, or in the corpora `against`.

    files, against: of `document_facts`, in their corpora's order. scratch: an empty folder; 4 · permutations + 28 bytes
    a document. value: the estimated Jaccard similarity to the document that is named, 1 for the same texts and images;
    it may be below the threshold where others connect the two.
    """
    everything = [*against, *files]
    rows, starts = gather(everything, ("document", "digest", "signature", "shingles"), scratch)
    digest, signature, shingles = rows["digest"], rows["signature"], rows["shingles"]
    parent = same_content(digest, memory)
    num = signature.shape[1]
    if settings.threshold is not None:
        bands, per_band = choose_bands(settings.threshold, num)
        limit = int(num * (1 - settings.threshold) + 1e-9)
        for band in range(bands):
            part = slice(band * per_band, (band + 1) * per_band)

            def keys(start: int, stop: int, part: slice = part) -> tuple[np.ndarray, np.ndarray]:
                found = np.flatnonzero(shingles[start:stop])
                return _key(signature[start:stop, part][found]), start + found

            for group in equal_keys(keys, len(digest), memory):
                unite_alike(*group, signature, False, limit, parent)

    def value(one: int, other: int) -> float:
        same = not num or (digest[one] == digest[other]).all()
        return 1.0 if same else float((signature[one] == signature[other]).mean())

    item = np.full(len(digest), -1, np.int32)
    places = Places(everything, len(against), starts, rows["document"], item, np.arange(len(digest)))
    return removals_of(places, parent, settings.action, value)


def join_images(
    files: Sequence[Path],
    settings: ImageDuplicates,
    scratch: Path,
    against: Sequence[Path] = (),
    memory: int = MEMORY,
) -> Removals:
    """Places of images in a corpus whose image stands in it before, or in the corpora `against`.

    files, against: of `image_facts`, in their corpora's order. scratch: an empty folder; 60 bytes an image and 16 a
    place. value: how many of 256 bits of the perceptual hash differ from the image that is named, 0 for the same bytes.
    """
    everything = [*against, *files]
    rows, first_image = gather(everything, ("digest", "hash", "detail"), scratch)
    placed, starts = gather(everything, ("document", "item", "image"), scratch)
    digest, short, long = rows["digest"], rows["hash"][:, :2], rows["hash"][:, 2:]
    parent = same_content(digest, memory)
    if settings.max_bits is not None:
        for chosen in itertools.combinations(range(8), 8 - _DIFFERING):
            kept = np.zeros(8, np.uint8)
            kept[list(chosen)] = 255
            mask = kept.view(np.uint32)

            def keys(start: int, stop: int, mask: np.ndarray = mask) -> tuple[np.ndarray, np.ndarray]:
                found = np.flatnonzero(rows["detail"][start:stop] >= settings.min_detail)
                return _key(short[start:stop][found] & mask), start + found

            for group in equal_keys(keys, len(digest), memory):
                unite_alike(*group, long, True, settings.max_bits, parent)

    def value(one: int, other: int) -> float:
        same = (digest[one] == digest[other]).all()
        return 0.0 if same else float(difference(long[one], long[other], True, 256))

    image = placed["image"] + np.repeat(first_image[:-1], np.diff(starts))
    places = Places(everything, len(against), starts, placed["document"], placed["item"], image)
    return removals_of(places, parent, settings.action, value)


@dataclass(frozen=True)
class Places:
    """Documents, or images in them, of all files in order."""

    files: Sequence[Path]
    num_against: int
    """files, the first ones, of other corpora"""
    starts: np.ndarray
    """int64 [files + 1]: number of each file's first place, and of all"""
    document: np.ndarray
    item: np.ndarray
    row: np.ndarray
    """which row of the clusters it shows"""


def removals_of(
    places: Places, parent: np.ndarray, action: Action | None, value: Callable[[int, int], float]
) -> Removals:
    """What is removed of clusters, int64 [rows] as union-find leaves them; value: of two rows."""
    _to_roots(parent)
    label = parent[places.row]
    order = np.argsort(label, kind="stable")
    new = np.flatnonzero(np.diff(label[order], prepend=-1))  # in order: where each cluster begins
    size = np.diff(np.append(new, len(label)))
    match = np.full(len(label), -1)
    several = new[size > 1]
    match[order] = np.repeat(order[new], size)
    match[order[new]] = -1  # the first of each cluster stays
    if action == "drop-all":
        match[order[several]] = order[several + 1]
    removed = int(places.starts[places.num_against]) + np.flatnonzero(match[places.starts[places.num_against] :] >= 0)

    @cache
    def opened(file: int) -> Corpus:
        return Corpus(_corpus_of(places.files[file]))

    def name(place: int) -> str:
        corpus = opened(int(np.searchsorted(places.starts, place, side="right")) - 1)
        document, item = int(places.document[place]), int(places.item[place])
        return f"{address(corpus)}: document {document}{'' if item < 0 else f', piece {item}'}"

    return Removals(
        np.array(places.document[removed]),
        np.array(places.item[removed]),
        np.array([value(places.row[r], places.row[match[r]]) for r in removed], np.float32),
        [name(match[r]) for r in removed],
    )


def _corpus_of(file: Path) -> str:
    with np.load(file) as facts:
        return str(facts["corpus"])


def gather(files: Sequence[Path], names: Sequence[str], scratch: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arrays of all files one after another, mapped below `scratch`, and where each file's part begins [files + 1]."""
    lengths = []
    for file in files:
        with np.load(file) as facts:
            lengths.append(len(facts[names[0]]))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    arrays: dict[str, np.ndarray] = {}
    with np.load(files[0]) as facts:
        for name in names:
            shape = (int(starts[-1]), *facts[name].shape[1:])
            arrays[name] = new_array(scratch / f"{name}.npy", facts[name].dtype, shape)
    for file, start, stop in zip(files, starts[:-1], starts[1:], strict=True):
        with np.load(file) as facts:
            for name, array in arrays.items():
                array[start:stop] = facts[name]
    return arrays, starts


def same_content(digest: np.ndarray, memory: int) -> np.ndarray:
    """Clusters of rows with the same digest, uint32 [N, 4]: int64 [N], for `clusters.find` and `unite`."""
    parent = np.arange(len(digest))

    def keys(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return _key(digest[start:stop]), np.arange(start, stop)

    for group in equal_keys(keys, len(digest), memory):
        unite_alike(*group, digest, False, 0, parent)
    return parent


@numba.njit(cache=True, nogil=True)
def _key(entries: np.ndarray) -> np.ndarray:
    """uint64 [N], a hash of each row, uint32 [N, K]."""
    out = np.zeros(len(entries), np.uint64)
    for k in range(len(entries)):
        for entry in entries[k]:
            out[k] = mix(out[k], entry)
    return out


@numba.njit(cache=True, nogil=True)
def _to_roots(parent: np.ndarray) -> None:
    """Let every row name the first of its cluster."""
    for row in range(len(parent)):
        parent[row] = find(parent, row)
