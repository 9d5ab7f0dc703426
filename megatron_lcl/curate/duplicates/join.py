"""Facts of all tasks → which documents and images are removed. Independent of how the corpus was cut into tasks.

Facts are copied into arrays on the disk and mapped, and so are the clusters: in memory is what sorting may take
(`clusters.MEMORY`), and a block of places or removals at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from megatron_lcl.compiled import compiled
from megatron_lcl.curate.duplicates.clusters import MEMORY, difference, equal_keys, find, unite_alike
from megatron_lcl.curate.duplicates.minhash import choose_bands
from megatron_lcl.curate.duplicates.settings import Action, DocumentDuplicates, ImageDuplicates
from megatron_lcl.data.corpus.files import new_array
from megatron_lcl.data.loading.hashes import mix

_DIFFERING = 4
"""Images are compared where at least 4 of the 8 bytes of their 64-bit hashes agree, as they do where at most 4 bits
differ: a key for each choice of 4 (Manku, Jain & Das Sarma, "Detecting near-duplicates for web crawling", 2007, 3.1)"""
_BLOCK = 1 << 14
"""places that are looked at together, of which some are removed"""


@dataclass(frozen=True)
class Removals:
    """What a rule removes from a corpus, in the corpus's order; or a part of it."""

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
) -> Iterator[Removals]:
    """Documents of a corpus that are in it before, or in the corpora `against`, part after part.

    files, against: of `document_facts`, in their corpora's order. scratch: an empty folder; 4 · permutations
    + 8 · bands + 61 bytes a document, and 16 more where sorting takes more than `memory`. value: the estimated Jaccard
    similarity to the document that is named, 1 for the same texts and images; it may be below the threshold where
    others connect the two.
    """
    everything = [*against, *files]
    rows, starts = gather(everything, ("document", "digest", "signature", "shingles"), scratch)
    digest, signature, shingles = rows["digest"], rows["signature"], rows["shingles"]
    parent, first_of_content = same_content(digest, scratch, memory)
    num = signature.shape[1]
    if settings.threshold is not None:
        bands, per_band = choose_bands(settings.threshold, num)
        limit = int(num * (1 - settings.threshold) + 1e-9)
        band_keys = new_array(scratch / "bands.npy", np.uint64, (bands, len(digest)))
        for start, stop in blocks(0, len(digest)):  # all bands of a signature while it is in memory
            for band in range(bands):
                entries = signature[start:stop, band * per_band : (band + 1) * per_band]
                band_keys[band, start:stop] = _key(np.ascontiguousarray(entries))
        for own in band_keys:

            def keys(start: int, stop: int, own: np.ndarray = own) -> tuple[np.ndarray, np.ndarray]:
                found = start + np.flatnonzero(first_of_content[start:stop] & (shingles[start:stop] > 0))
                return own[found], found

            for group in equal_keys(keys, len(digest), scratch / "keys", memory):
                unite_alike(*group, signature, False, limit, parent)

    def value(one: int, other: int) -> float:
        same = not num or (digest[one] == digest[other]).all()
        return 1.0 if same else float((signature[one] == signature[other]).mean())

    shown = new_array(scratch / "row.npy", np.int64, (len(digest),))
    for start, stop in blocks(0, len(digest)):
        shown[start:stop] = np.arange(start, stop)
    places = Places(everything, len(against), starts, rows["document"], None, shown)
    yield from removals_of(places, parent, settings.action, value, scratch)


def join_images(
    files: Sequence[Path],
    settings: ImageDuplicates,
    scratch: Path,
    against: Sequence[Path] = (),
    memory: int = MEMORY,
) -> Iterator[Removals]:
    """Places of images in a corpus whose image stands in it before, or in the corpora `against`, part after part.

    files, against: of `image_facts`, in their corpora's order. scratch: an empty folder; 93 bytes an image and 24 a
    place, and 16 more an image where sorting takes more than `memory`. value: how many of 256 bits of the perceptual
    hash differ from the image that is named, 0 for the same bytes.
    """
    everything = [*against, *files]
    rows, first_image = gather(everything, ("digest", "hash", "detail"), scratch)
    placed, starts = gather(everything, ("document", "item", "image"), scratch)
    digest, long = rows["digest"], rows["hash"][:, 2:]
    parent, first_of_content = same_content(digest, scratch, memory)
    if settings.max_bits is not None:
        short = new_array(scratch / "short.npy", np.uint32, (len(digest), 2))  # contiguous: each choice reads all
        for start, stop in blocks(0, len(digest)):
            short[start:stop] = rows["hash"][start:stop, :2]
        for chosen in itertools.combinations(range(8), 8 - _DIFFERING):
            kept = np.zeros(8, np.uint8)
            kept[list(chosen)] = 255
            mask = kept.view(np.uint32)

            def keys(start: int, stop: int, mask: np.ndarray = mask) -> tuple[np.ndarray, np.ndarray]:
                found = np.flatnonzero(
                    first_of_content[start:stop] & (rows["detail"][start:stop] >= settings.min_detail)
                )
                return _key(short[start:stop][found] & mask), start + found

            for group in equal_keys(keys, len(digest), scratch / "keys", memory):
                unite_alike(*group, long, True, settings.max_bits, parent)

    def value(one: int, other: int) -> float:
        same = (digest[one] == digest[other]).all()
        return 0.0 if same else float(difference(long[one], long[other], True, 256))

    shown = rows_shown(placed["image"], first_image, starts, scratch)
    places = Places(everything, len(against), starts, placed["document"], placed["item"], shown)
    yield from removals_of(places, parent, settings.action, value, scratch)


@dataclass(frozen=True)
class Places:
    """Documents, or images in them, of all files in order."""

    files: Sequence[Path]
    num_against: int
    """files, the first ones, of other corpora"""
    starts: np.ndarray
    """int64 [files + 1]: number of each file's first place, and of all"""
    document: np.ndarray
    item: np.ndarray | None
    """None: the documents themselves"""
    row: np.ndarray
    """which row of the clusters it shows"""

    def item_of(self, place: int) -> int:
        return -1 if self.item is None else int(self.item[place])


def blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """first … last-1 in runs of at most _BLOCK."""
    return ((start, min(last, start + _BLOCK)) for start in range(first, last, _BLOCK))


def rows_shown(image: np.ndarray, first_image: np.ndarray, starts: np.ndarray, scratch: Path) -> np.ndarray:
    """Of every place the row of its image among all files', int64, mapped. image: numbers in a place's own file."""
    shown = new_array(scratch / "row.npy", np.int64, image.shape)
    for first, start, stop in zip(first_image[:-1], starts[:-1], starts[1:], strict=True):
        shown[start:stop] = image[start:stop] + first
    return shown


def removals_of(
    places: Places, parent: np.ndarray, action: Action | None, value: Callable[[int, int], float], scratch: Path
) -> Iterator[Removals]:
    """What is removed of clusters, int64 [rows] as union-find leaves them; value: of two rows. In blocks of places, so
    that memory does not grow with their number: what is kept of all is mapped below `scratch`."""
    first, second = (new_array(scratch / f"{name}.npy", np.int64, parent.shape) for name in ("first", "second"))
    for start, stop in blocks(0, len(parent)):
        first[start:stop] = second[start:stop] = -1
    _first_two(places.row, parent, first, second)

    corpus_of = cache(_corpus_of)

    def name(place: int) -> str:
        corpus = corpus_of(places.files[int(np.searchsorted(places.starts, place, side="right")) - 1])
        document, item = int(places.document[place]), places.item_of(place)
        return f"{corpus}: document {document}{'' if item < 0 else f', piece {item}'}"

    for start, stop in blocks(int(places.starts[places.num_against]), int(places.starts[-1])):
        root = parent[places.row[start:stop]]  # which `_first_two` has made of all rows' parents
        match = first[root]
        of_itself = match == np.arange(start, stop)
        match[of_itself] = second[root[of_itself]] if action == "drop-all" else -1
        removed = start + np.flatnonzero(match >= 0)
        if len(removed):
            matched = match[removed - start]
            yield Removals(
                np.array(places.document[removed]),
                np.full(len(removed), -1, np.int32) if places.item is None else np.array(places.item[removed]),
                np.array(
                    [value(places.row[r], places.row[m]) for r, m in zip(removed, matched, strict=True)], np.float32
                ),
                [name(place) for place in matched],
            )


def _corpus_of(file: Path) -> str:
    """The name of the corpus that a file of facts is of."""
    with np.load(file) as facts:
        return str(facts["corpus"])


def gather(files: Sequence[Path], names: Sequence[str], scratch: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arrays of all files one after another, mapped below `scratch`, and where each file's part begins [files + 1]."""
    with np.load(files[0]) as facts:
        kinds = {name: (facts[name].dtype, facts[name].shape[1:]) for name in names}
    texts = [name for name, (dtype, _) in kinds.items() if dtype.kind == "U"]  # as wide as a file's longest one
    lengths = []
    for file in files:
        with np.load(file) as facts:
            lengths.append(len(facts[names[0]]))
            kinds |= {name: (np.result_type(kinds[name][0], facts[name].dtype), ()) for name in texts}
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    arrays: dict[str, np.ndarray] = {
        name: new_array(scratch / f"{name}.npy", dtype, (int(starts[-1]), *shape))
        for name, (dtype, shape) in kinds.items()
    }
    for file, start, stop in zip(files, starts[:-1], starts[1:], strict=True):
        with np.load(file) as facts:
            for name, array in arrays.items():
                array[start:stop] = facts[name]
    return arrays, starts


def same_content(digest: np.ndarray, scratch: Path, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of rows with the same digest, uint32 [N, 4]: int64 [N], mapped, for `clusters.find` and `unite`; and
    which rows are the first with theirs, bool [N], mapped. Only these are compared with others: what stands in the
    corpus often, or in many ranges, is one of the first `clusters.LIMIT` of a key only once."""
    first = new_array(scratch / "first-of-content.npy", np.bool_, (len(digest),))
    parent = new_array(scratch / "parent.npy", np.int64, (len(digest),))
    for start, stop in blocks(0, len(digest)):
        parent[start:stop] = np.arange(start, stop)

    def keys(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return _key(digest[start:stop]), np.arange(start, stop)

    for group in equal_keys(keys, len(digest), scratch / "keys", memory):
        unite_alike(*group, digest, False, 0, parent)
    for start, stop in blocks(0, len(digest)):
        first[start:stop] = parent[start:stop] == np.arange(start, stop)
    return parent, first


@compiled
def _key(entries: np.ndarray) -> np.ndarray:
    """uint64 [N], a hash of each row, uint32 [N, K]."""
    out = np.zeros(len(entries), np.uint64)
    for k in range(len(entries)):
        for entry in entries[k]:
            out[k] = mix(out[k], entry)
    return out


@compiled
def _first_two(shown: np.ndarray, parent: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """The first two places of each cluster, by its first row, and let every row name this one."""
    for row in range(len(parent)):
        parent[row] = find(parent, row)
    for place in range(len(shown)):
        root = parent[shown[place]]
        if first[root] < 0:
            first[root] = place
        elif second[root] < 0:
            second[root] = place
