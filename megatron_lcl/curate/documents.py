"""A corpus's documents as rules see them, and the ranges of them that are worked on together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from megatron_lcl.data.corpus.indexed import TEXT
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.prepare.cut import task_size
from megatron_lcl.data.prepare.preprocess import SHARD_BYTES

MAX_PIECES = 1 << 20
"""a range has no more texts and images"""
_BLOCK = 1 << 14
"""documents whose sizes are added up at once"""
Gone = Mapping[int, Collection[int]]
"""of documents, by their number in the corpus, the items that rules of single items remove"""
NOTHING: Gone = MappingProxyType({})


@dataclass(frozen=True)
class Range:
    """Documents first … last-1 of a shard, a task of either pass."""

    number: int
    """of the task"""
    shard: int
    first: int
    last: int
    size: int
    """bytes of tokens and images"""

    def start(self, corpus: Corpus) -> int:
        """Number of its first document in the corpus."""
        return int(corpus.document_starts[self.shard]) + self.first


def range_size(corpus: Corpus, task_bytes: int) -> int:
    """Bytes of tokens and images of a range: `task_bytes`, of a large corpus more (`task_size`)."""
    counts = corpus.manifest["counts"]
    return task_size(4 * counts["tokens"] + counts["image_bytes"], task_bytes, SHARD_BYTES)


def ranges(corpus: Corpus, task_bytes: int) -> list[Range]:
    """All documents, in runs of about `range_size`, within a shard, by their sizes alone."""
    found: list[Range] = []
    size = range_size(corpus, task_bytes)
    for number, shard in enumerate(corpus.shards):
        offsets, ends = shard.document_offsets, bytes_before(shard)
        first = 0
        while first < shard.num_documents:
            last = min(
                int(np.searchsorted(ends, ends[first] + size)),
                int(np.searchsorted(offsets, offsets[first] + MAX_PIECES)),
                shard.num_documents,
            )
            last = max(last, first + 1)
            found.append(Range(len(found), number, first, last, int(ends[last] - ends[first])))
            first = last
    return found


def bytes_before(shard: Shard) -> np.ndarray:
    """int64 [documents + 1]: bytes of tokens and images of all documents before each, and of all."""
    offsets, num = shard.document_offsets, shard.num_documents
    found = np.zeros(num + 1, np.int64)
    for first in range(0, num, _BLOCK):
        last = min(first + _BLOCK, num)
        start, stop = offsets[[first, last]].tolist()
        is_image, images = _images_of(shard, start, stop)
        sizes = 4 * np.where(is_image, 1, shard.lengths[start:stop]).astype(np.int64)
        sizes[is_image] += shard.image_sizes[images]
        sums = np.concatenate([[0], np.cumsum(sizes)])
        found[first + 1 : last + 1] = found[first] + sums[offsets[first + 1 : last + 1] - start]
    return found


def _images_of(shard: Shard, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the pieces start … stop-1 which are images, bool, and these images' indices in the shard."""
    is_image = shard.modes[start:stop] != TEXT
    if not is_image.any():
        return is_image, np.empty(0, np.int32)
    ends = np.cumsum(shard.lengths[start:stop], dtype=np.int64)
    images = shard.pieces(start, stop)[ends[is_image] - 1]
    shard.check_ids(images, shard.num_images, start + np.flatnonzero(is_image))
    return is_image, images


def places(corpus: Corpus, task: Range, gone: Gone = NOTHING) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where images stand in documents of a range: number of the document in the corpus int64 [K], index of the piece in
    the document int32 [K], number of the image in the shard int32 [K]. Without the items that are gone."""
    part = corpus.shard(task.shard)
    offsets = part.document_offsets[task.first : task.last + 1]
    start, stop = offsets[[0, -1]].tolist()
    is_image, shown = _images_of(part, start, stop)
    piece = start + np.flatnonzero(is_image)
    local = np.searchsorted(offsets, piece, side="right") - 1
    document, item = task.start(corpus) + local.astype(np.int64), (piece - offsets[local]).astype(np.int32)
    if gone:
        stays = [i not in gone.get(d, ()) for d, i in zip(document.tolist(), item.tolist(), strict=True)]
        document, item, shown = (array[np.array(stays, bool)] for array in (document, item, shown))
    return document, item, shown


class Source:
    """A document of the corpus that is curated. Its items are its texts and images, counted from 0 in reading order."""

    def __init__(self, corpus: Corpus, shard: Shard, local: int, name: str) -> None:
        self.shard, self.local = shard, local
        self.number = int(corpus.document_starts[shard.number]) + local
        """in the corpus"""
        self.name = name
        """where it came from; "" where that is not known"""
        self.start, stop = shard.document_offsets[local : local + 2].tolist()
        self.is_text: list[bool] = (shard.modes[self.start : stop] == TEXT).tolist()
        self.kept: list[int] = list(range(stop - self.start))
        """the items that no rule has removed so far"""
        self.matches: Mapping[int, tuple[float, int]] | None = None
        """similarity of an image and number of its text, by item, where they are new"""
        self._corpus = corpus
        self._texts: dict[int, str] = {}

    def text(self, item: int) -> str:
        """A text, decoded at most once."""
        if item not in self._texts:
            self._texts[item] = self._corpus.tokenizer.decode(self.ids(item))
        return self._texts[item]

    def ids(self, item: int) -> np.ndarray:
        """int32 token ids of a text."""
        return self.shard.pieces(self.start + item, self.start + item + 1)

    def image(self, item: int) -> int:
        """Index of an image in the shard: of `shard.image(j)`, `shard.image_width[j]`, `shard.image_xxh3[j]` …"""
        index = self.shard.piece(self.start + item)
        assert isinstance(index, int)
        return index

    def placement(self, item: int) -> int:
        """Of an image: index into `shard.similarity` and `shard.matched_text`."""
        return int(self.shard.placement_of[self.start + item])

    def match(self, item: int) -> tuple[float, int]:
        """Of an image: similarity, NaN where it has none; number of the text it is matched to, -1 for none."""
        if self.matches is not None:
            return self.matches[item]
        placement = self.placement(item)
        return float(self.shard.similarity[placement]), int(self.shard.matched_text[placement])

    @property
    def kept_texts(self) -> list[int]:
        return [item for item in self.kept if self.is_text[item]]

    @property
    def kept_images(self) -> list[int]:
        return [item for item in self.kept if not self.is_text[item]]

    @cached_property
    def number_of_text(self) -> list[int]:
        """Of each item the number of texts before it, by which `matched_text` names them."""
        return (np.cumsum(self.is_text) - self.is_text).tolist()

    def without(self, items: Collection[int]) -> None:
        """Remove items."""
        if items:
            self.kept = [item for item in self.kept if item not in items]


def address(corpus: Corpus) -> str:
    """By which another process opens it."""
    return corpus.where if corpus.remote else str(corpus.path)


@contextmanager
def read_ahead(corpus: Corpus, task: Range, images: bool) -> Iterator[None]:
    """Of a corpus in object storage: have a range's texts, and its images if need be, here until the end."""
    shard = corpus.shard(task.shard)
    texts, pictures = shard.tokens.blocks, shard.images.blocks
    if texts is None or pictures is None:
        yield
        return
    start, stop = shard.document_offsets[[task.first, task.last]].tolist()
    texts.ahead([shard.tokens.span(start, stop)], task.number)
    if images:
        shown = np.unique(_images_of(shard, start, stop)[1]).tolist()
        pictures.ahead([shard.images.span(j, j + 1) for j in shown], task.number)
    try:
        yield
    finally:
        texts.release(task.number)
        pictures.release(task.number)


def documents(corpus: Corpus, task: Range) -> Iterator[Source]:
    """The documents of a range, in order."""
    shard = corpus.shard(task.shard)
    names = shard.names.between(task.first, task.last) if shard.names else iter([""] * (task.last - task.first))
    for local, name in zip(range(task.first, task.last), names, strict=True):
        yield Source(corpus, shard, local, name)
