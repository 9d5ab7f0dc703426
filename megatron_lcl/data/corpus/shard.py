"""One shard of a corpus, for readers: its pieces and images, each checked against the files as it is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_lcl.data.corpus.corpus_manifest import ARROW, IMAGES, NAMES, TOKENS
from megatron_lcl.data.corpus.image_columns import read_columns
from megatron_lcl.data.corpus.indexed import IMAGE, damaged_file, read_indexed
from megatron_lcl.data.corpus.names import Names
from megatron_lcl.data.corpus.remote import Remote
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists


class Shard:
    """One shard, memory-mapped. All arrays are read-only views. Of a corpus in object storage (`remote`) the tokens and
    images are read when they are asked for.

    lengths int32 [num_pieces], modes int8 [num_pieces]: 0 text, 1 image
    document_offsets int64 [num_documents+1], piece numbers
    similarity float32 [num_placements], NaN in natural order; a placement is a piece of mode 1, in order
    matched_text int32 [num_placements], -1 in natural order
    image_width, image_height int32 [num_images], pixels as shown
    image_format int8 [num_images], an index into FORMATS; image_xxh3 uint8 [num_images, 16]
    """

    def __init__(self, folder: Path, number: int, remote: Remote | None = None) -> None:
        self.number, self._remote = number, remote
        self._where = remote.url if remote else str(folder)
        self._names_path = folder / NAMES.format(number)
        tokens, images = TOKENS.format(number), IMAGES.format(number)
        self.tokens = read_indexed(folder / tokens, remote.blocks(f"{tokens}.bin") if remote else None)
        self.images = read_indexed(folder / images, remote.blocks(f"{images}.bin") if remote else None)
        images, placements = read_columns(folder / (IMAGES.format(number) + ARROW))
        self.image_width: np.ndarray = images.field("width").to_numpy()
        self.image_height: np.ndarray = images.field("height").to_numpy()
        self.image_format: np.ndarray = images.field("format").to_numpy()
        digests = images.field("xxh3").buffers()[1]
        self.image_xxh3 = np.frombuffer(digests, np.uint8, 16 * len(images)).reshape(-1, 16)
        self.similarity: np.ndarray = placements.field("similarity").to_numpy()
        self.matched_text: np.ndarray = placements.field("matched_text").to_numpy()

    @property
    def lengths(self) -> np.ndarray:
        return self.tokens.lengths

    @property
    def modes(self) -> np.ndarray:
        return self.tokens.modes

    @property
    def document_offsets(self) -> np.ndarray:
        return self.tokens.documents

    @property
    def num_documents(self) -> int:
        return len(self.tokens.documents) - 1

    @property
    def num_pieces(self) -> int:
        return len(self.tokens.lengths)

    @property
    def num_images(self) -> int:
        return len(self.images.lengths)

    @property
    def image_sizes(self) -> np.ndarray:
        """int32 [num_images], encoded bytes of each image."""
        return self.images.lengths

    @cached_property
    def placement_of(self) -> np.ndarray:
        """int32 [num_pieces]: for a piece of mode 1 its number among the placements; for a text, of the next one."""
        return np.cumsum(self.modes, dtype=np.int32) - self.modes

    @cached_property
    def names(self) -> Names | None:
        """Where each document came from; None in a corpus of an earlier release."""
        if self._remote is not None and self._names_path.name in self._remote.files:
            self._remote.copy([self._names_path.name])
        return Names(self._names_path, self.num_documents) if exists(self._names_path) else None

    def piece(self, k: int) -> np.ndarray | int:
        """Piece `k`: int32 token ids of a text, or the index of an image in this shard. UserError where it is none."""
        values = self.tokens.sequence(k)
        if self.modes[k] != IMAGE:
            return values
        self.check_ids(values, self.num_images, k)
        return int(values[0])

    def check_ids(self, ids: np.ndarray, num: int, pieces: int | np.ndarray) -> None:
        """UserError where one of some elements, int32 [N], is not in 0 … num-1: as an index, a negative one would be
        taken for another.

        pieces: those that they are of, int or int64 [N].
        """
        if len(ids) and ids.view(np.uint32).max() >= num:  # a negative one is above 2^31 there
            at = int(np.argmax(ids.view(np.uint32) >= num))
            piece = np.broadcast_to(pieces, len(ids))[at]
            kind = "image" if self.modes[piece] == IMAGE else "token id"
            raise self.damaged(self.document_of(piece), f"{kind} {ids[at]} is out of range, which ends at {num - 1}")

    def check_modes(self, modes: np.ndarray, pieces: Sequence[int] | np.ndarray) -> None:
        """UserError where one of some modes, int8 [N], of pieces is neither TEXT nor IMAGE."""
        if len(modes) and modes.view(np.uint8).max() > IMAGE:
            at = int(np.argmax(modes.view(np.uint8)))
            raise self.damaged(self.document_of(pieces[at]), f"a piece of mode {modes[at]}, which does not exist")

    def document_of(self, piece: int) -> int:
        """The document that a piece is of, by their numbers in the shard."""
        return int(np.searchsorted(self.document_offsets, piece, "right")) - 1

    def bounds(self, local: int) -> tuple[int, int]:
        """The pieces start … stop-1 of a document, by its number in the shard. UserError where they cannot be."""
        start, stop = [*self.document_offsets[local : local + 2].tolist(), -1][:2]
        if not 0 <= start <= stop <= self.num_pieces:
            raise self.damaged(local, f"its pieces are {start:,} to {stop:,} of {self.num_pieces:,}")
        return start, stop

    def damaged(self, local: int, what: str) -> UserError:
        """The error of a document, by its number in the shard, whose pieces cannot be as the files have them."""
        return damaged_file(f"{self._where}, shard {self.number}, document {local}: {what}", self._where)

    def pieces(self, start: int, stop: int) -> np.ndarray:
        """int32 elements of pieces start … stop-1 one after another (`lengths` tells them apart)."""
        return self.tokens.sequences(start, stop)

    def image(self, j: int) -> memoryview:
        """Encoded bytes of image `j`."""
        return self.images.sequence(j).data
