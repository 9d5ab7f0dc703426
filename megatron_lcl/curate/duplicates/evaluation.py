"""Which images of a corpus are evaluation images, also resized, recompressed, flipped, cropped or covered a little.

Two stages. Candidates: evaluation images with a view (`views`) whose 64-bit hash is near that of the image, which is
compared with all of them. Then the picture is laid over each candidate, and their blocks are compared (`alignment`);
the image is taken for the evaluation image of which it shows the most, if that is enough.

First `evaluation_facts` of all evaluation images, in tasks, and `write_index` of them. Then `contamination_facts` of
the corpus, in tasks, each of which maps the index; and `join_evaluation`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from PIL import Image as Pillow

from megatron_lcl.curate.documents import NOTHING, Gone, Range, address, places
from megatron_lcl.curate.duplicates.alignment import COLOR_SIDE, SIDE, Picture, agreement
from megatron_lcl.curate.duplicates.facts import THUMBNAIL, Facts, gray_square
from megatron_lcl.curate.duplicates.join import Removals, gather
from megatron_lcl.curate.duplicates.settings import Decontamination
from megatron_lcl.curate.duplicates.views import ASKED, COMPARED, KEPT, first_guess, nearest, view_hashes
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.rgb import decode_rgb
from megatron_lcl.data.corpus.store import Corpus, is_corpus, open_corpus
from megatron_lcl.errors import UserError

if TYPE_CHECKING:
    from megatron_lcl.evaluate.image_set import Blob

MAX_CANDIDATES = 64
"""that are laid over an image, the nearest ones; more have only pictures like many others"""
_INDEX = ("hash", "detailed", "thumbnail", "color", "digest", "name")


class EvaluationImages:
    """Images of a corpus, a WebDataset, captions' JSON (as `evaluate` reads them), or all in and below a folder.

    UserError where there is no such set.
    """

    def __init__(self, source: str | Path) -> None:
        self._corpus = open_corpus(source) if is_corpus(source) else None
        if self._corpus is not None:
            counts = [shard["images"] for shard in self._corpus.manifest["shards"]]
            self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
            return
        from megatron_lcl.evaluate.sources import all_pictures  # imports torch

        self._blobs: Sequence[Blob] = all_pictures(Path(source))

    def __len__(self) -> int:
        return len(self._blobs) if self._corpus is None else int(self._starts[-1])

    def read(self, number: int) -> tuple[str, bytes]:
        """Name and encoded bytes of an image."""
        if self._corpus is None:
            return self._blobs[number].name, self._blobs[number].read()
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        local = number - int(self._starts[shard])
        name = f"{address(self._corpus)}: shard {shard}, image {local}"
        return name, bytes(self._corpus.shard(shard).image(local))


@functools.lru_cache(1)
def open_set(source: str | Path) -> EvaluationImages:
    """An evaluation set, listed once for all of its tasks in a process."""
    return EvaluationImages(source)


def evaluation_facts(source: str | Path, first: int, last: int, settings: Decontamination) -> Facts:
    """Of the N images first … last-1 of an `EvaluationImages`:

    hash uint64 [N, V] and detailed bool [N, V] of its views; thumbnail uint8 [N, SIDE, SIDE] and color uint8
    [N, COLOR_SIDE, COLOR_SIDE, 2], its `Picture`; digest uint64 [N], XXH3 of its bytes; name. An image that does not
    decode has no detail, and is only found by its bytes.
    """
    images = open_set(source)
    num, views = last - first, len(COMPARED)
    hashes, detailed = np.zeros((num, views), np.uint64), np.zeros((num, views), bool)
    thumbnails, digests = np.zeros((num, SIDE, SIDE), np.uint8), np.zeros(num, np.uint64)
    colors = np.zeros((num, COLOR_SIDE, COLOR_SIDE, 2), np.uint8)
    names = []
    for k in range(num):
        name, data = images.read(first + k)
        names.append(name)
        digests[k] = xxhash.xxh3_64_intdigest(data)
        try:
            pixels, picture = _pictures(data)
        except BadImage:
            continue
        seen = [view_hashes(p, KEPT, settings.min_detail) for p in (pixels, np.ascontiguousarray(pixels[:, ::-1]))]
        hashes[k], detailed[k] = (np.concatenate(arrays) for arrays in zip(*seen, strict=True))
        thumbnails[k], colors[k] = picture
    return {
        "hash": hashes,
        "detailed": detailed,
        "thumbnail": thumbnails,
        "color": colors,
        "digest": digests,
        "name": np.array(names, np.str_),
    }


def write_index(files: Sequence[Path], folder: Path) -> None:
    """The index of all evaluation images in an empty folder, from the files of `evaluation_facts`: 4.9 kB an image."""
    if not files:
        raise UserError("no evaluation images to compare with; name their folders")
    gather(files, _INDEX, folder)


@functools.lru_cache(1)
def open_index(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of `write_index`: its arrays, mapped, and the order of the digests; opened once in a process."""
    index = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _INDEX}
    index["hash"], index["detailed"] = np.array(index["hash"]), np.array(index["detailed"])
    return index, np.argsort(index["digest"], kind="stable")


class Finder:
    """Finds which evaluation image of the index in a folder an image is."""

    def __init__(self, folder: Path, settings: Decontamination) -> None:
        self._index, self._order = open_index(Path(folder))
        self._settings = settings
        self._asked = np.array([view.asked for view in COMPARED])
        self._radius = np.where(self._asked == 0, settings.whole_bits, settings.third_bits)

    def find(self, data: bytes) -> tuple[int, float] | None:
        """(number of the evaluation image, the share of it that the image shows) of an encoded image; None: it is none.

        The share is 1 for the same bytes. BadImage if it does not decode.
        """
        digest = np.uint64(xxhash.xxh3_64_intdigest(data))
        at = int(np.searchsorted(self._index["digest"], digest, sorter=self._order))
        if at < len(self._order) and self._index["digest"][self._order[at]] == digest:
            return int(self._order[at]), 1.0
        pixels, picture = _pictures(data)
        best: tuple[int, float] | None = None
        for number, view in self.candidates(pixels):
            other = Picture(self._index["thumbnail"][number], self._index["color"][number])
            laid = picture.flipped() if COMPARED[view].flipped else picture
            share = agreement(laid, other, first_guess(COMPARED[view].shown, SIDE), self._settings.min_agreement)
            if share and (best is None or share > best[1]):
                best = number, share
        return best

    def candidates(self, pixels: np.ndarray) -> list[tuple[int, int]]:
        """(evaluation image, its nearest view) of those that are near a picture, uint8 [THUMBNAIL, THUMBNAIL]; the
        nearest first."""
        asked, asked_detail = view_hashes(pixels, ASKED, self._settings.min_detail)
        slack, view = nearest(
            asked, asked_detail, self._index["hash"], self._index["detailed"], self._asked, self._radius
        )
        near = np.flatnonzero(slack >= 0)
        near = near[np.argsort(-slack[near], kind="stable")][:MAX_CANDIDATES]
        return [(int(number), int(view[number])) for number in near]


def contamination_facts(
    corpus: Corpus, task: Range, index: Path, settings: Decontamination, gone: Gone = NOTHING
) -> Facts:
    """Of the K places, in the documents of a range, of evaluation images, without the items that are gone:

    document int64 [K], number in the corpus; item int32 [K], index of the piece in the document; evaluation int64 [K],
    number in the index (the folder of `write_index`); value float32 [K], the share of its blocks that agree.
    """
    finder, part = Finder(index, settings), corpus.shard(task.shard)
    document, item, shown = places(corpus, task, gone)
    images, place = np.unique(shown, return_inverse=True)
    evaluation, value = np.full(len(images), -1, np.int64), np.zeros(len(images), np.float32)
    for k, image in enumerate(images):
        try:
            found = finder.find(bytes(part.image(int(image))))
        except BadImage:
            continue
        if found is not None:
            evaluation[k], value[k] = found
    is_one = evaluation[place] >= 0
    return {
        "document": document[is_one],
        "item": item[is_one],
        "evaluation": evaluation[place][is_one],
        "value": value[place][is_one],
    }


def join_evaluation(files: Sequence[Path], index: Path) -> Removals:
    """All places of evaluation images, from files of `contamination_facts` in the corpus's order, each with the name of
    the evaluation image. value: the share, 0 … 1, of its blocks that agree."""
    columns: dict[str, list[np.ndarray]] = {"document": [], "item": [], "evaluation": [], "value": []}
    for file in files:
        with np.load(file) as facts:
            for name, arrays in columns.items():
                arrays.append(facts[name])
    document, item, evaluation, value = (np.concatenate(arrays) for arrays in columns.values())
    names = open_index(Path(index))[0]["name"]
    return Removals(document, item, value, [str(names[number]) for number in evaluation])


def _pictures(data: bytes) -> tuple[np.ndarray, Picture]:
    """Of an encoded image: gray levels, uint8 [THUMBNAIL, THUMBNAIL], and what is laid over others. BadImage if it does
    not decode."""
    image = decode_rgb(data, 2 * THUMBNAIL)
    pixels, step = gray_square(image), THUMBNAIL // SIDE
    gray = (pixels.reshape(SIDE, step, SIDE, step).mean((1, 3)) + 0.5).astype(np.uint8)
    cells = image.resize((COLOR_SIDE, COLOR_SIDE), Pillow.Resampling.BOX)
    return pixels, Picture(gray, np.asarray(cells.convert("YCbCr"))[..., 1:])
