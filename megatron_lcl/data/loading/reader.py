"""A pack's number → its PackedBatch: the documents that the pack index names, cut, decoded and put into slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.tokenizer import Tokenizer
from megatron_lcl.data.loading.batch import RUNS, PackedBatch, integer_sizes, max_runs
from megatron_lcl.data.loading.chunks import Pack, range_of
from megatron_lcl.data.loading.crops import decode_train
from megatron_lcl.data.loading.hashes import shuffled, uniform
from megatron_lcl.data.loading.images import decode_eval
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.data.loading.sequence import IMAGE_ROW, PIECE, SEQUENCE, START, STOP
from megatron_lcl.data.loading.sequential_index import SequentialIndex
from megatron_lcl.data.loading.source import Source, key


@dataclass(frozen=True, slots=True)
class ImageOrigin:
    """Where the image of a slot came from."""

    slot: int
    """image slot inside the pack"""
    shard: int
    image: int
    """index of the stored image in its shard"""
    name: str
    soi: int
    """row of its `<soi>` inside the pack"""
    start: int
    """row of its first placeholder inside the pack, in the caption where pairs have captions; -1: it has none"""
    pair: bool
    """it takes part in the contrast, if it decodes"""


@dataclass(frozen=True, slots=True)
class SequenceOrigin:
    """Where a sequence of a pack came from, and which rows of the pack it has."""

    corpus: str
    """the corpus's folder"""
    document: int
    """number in the corpus"""
    epoch: int
    part: int
    """0, or the index of the piece of a document that was cut, or of what was left of one when a phase ended"""
    start: int
    stop: int
    target_start: int
    """row from which on next tokens are targets; `stop`: it has none"""
    images: tuple[ImageOrigin, ...]
    """those whose `<soi>` is its own; none in a caption, which has the placeholders of the one before it"""


class PackReader(Dataset[PackedBatch]):
    """Assembles packs: `reader[(n, m)]` is the batch of packs n and m. A pure function of its arguments.

    kept_patches: (K, P): K of an image's P patches stay, drawn from (seed, pack, slot); None: all. num_placeholders: of
    an image, in sequences that have them.
    """

    def __init__(
        self,
        index: PackIndex | SequentialIndex,
        data: Data,
        num_placeholders: int,
        image_size: int,
        context_length: int,
        *,
        train: bool,
        sequences: Sequences,
        kept_patches: tuple[int, int] | None = None,
    ) -> None:
        self.index, self.data = index, data
        self.num_placeholders, self.image_size = num_placeholders, image_size
        self.kept_patches = kept_patches
        self.train, self.sequences = train, sequences
        self.context_length = context_length
        self.progress: torch.Tensor | None = None
        """int64 [workers], shared by them: the pack that each is at, or -1"""

    def __getitem__(self, packs: tuple[int, ...]) -> PackedBatch:
        T, I, size = self.data.tokens_per_pack, self.index.images_per_pack, self.image_size  # noqa: E741
        B, R = len(packs), max_runs(T, self.context_length)
        K, P = self.kept_patches or (0, self.num_placeholders)
        sizes = integer_sizes(B, T, I, R, K)
        parts = torch.full([sum(sizes.values())], -1, dtype=torch.int32).split(list(sizes.values()))
        integers = dict(zip(sizes, parts, strict=True))  # in one block of shared memory
        arrays = {name: part.numpy() for name, part in integers.items()}
        tokens, positions, targets = arrays["tokens"], arrays["positions"], arrays["targets"]
        target_positions = arrays["target_positions"]
        image_start, image_soi, image_valid = arrays["image_start"], arrays["image_soi"], arrays["image_valid"]
        tokens[:] = positions[:] = image_valid[:] = 0
        if K:
            kept = arrays["kept_patches"].reshape(B * I, K)
            for slot in range(B * I):
                kept[slot] = draw_patches(self.data.seed, packs[slot // I], slot % I, P, K)
        images = torch.zeros(B * I, 3, size, size, dtype=torch.uint8)
        pixels = images.numpy()
        bad: list[tuple[int, str]] = []
        starts, num_tokens = [0], 0
        for b, number in enumerate(packs):
            self._report(number)
            pack = self.index[number]
            row = b * T
            for origin in self._sequences(pack, tokens[row : row + T]):
                start, stop = row + origin.start, row + origin.stop
                positions[start:stop] = np.arange(stop - start)
                self._targets(origin, tokens[start:stop], targets[start:stop])
                starts.append(stop)
                for image in origin.images:
                    slot = b * I + image.slot
                    try:
                        pixels[slot] = self._pixels(pack, origin, image)
                    except BadImage as error:
                        bad.append((slot, f"{image.name}: {error}"))
                        continue
                    image_valid[slot] = 1
                    image_soi[slot] = row + image.soi if image.pair else -1
                    image_start[slot] = row + image.start if image.start >= 0 else -1
            num_tokens += starts[-1] - row
            while starts[-1] < row + T:  # what is left, in runs that attention can take
                starts.append(min(starts[-1] + self.context_length, row + T))
        self._report(-1)
        rows = np.flatnonzero(targets >= 0)
        target_positions[: len(rows)] = rows
        filled = min(B * R, -(-(len(starts) - 1) // RUNS) * RUNS)
        starts += [B * T] * (filled + 1 - len(starts))
        arrays["cu_seqlens"][: filled + 1] = starts
        integers["cu_seqlens"] = integers["cu_seqlens"][: filled + 1]
        return PackedBatch(
            **integers,
            images=images,
            num_targets=len(rows),
            num_pairs=int((image_soi >= 0).sum()),
            num_images=int(image_valid.sum()),
            num_tokens=num_tokens,
            max_seqlen=int(np.diff(starts).max()),
            num_patches=K or P,
            num_bad_images=len(bad),
            packs=tuple(packs),
            bad_images=tuple(bad),
        )

    def provenance(self, number: int) -> list[SequenceOrigin]:
        """The sequences of pack `number`, in order."""
        return self._sequences(self.index[number], np.zeros(self.data.tokens_per_pack, np.int32))

    def _sequences(self, pack: Pack, tokens: np.ndarray) -> list[SequenceOrigin]:
        """Write the pack's token ids into tokens [T] and say what they are."""
        origins = []
        row = slot = 0
        for entry in pack.entries:
            source = pack.sources[entry["corpus"]]
            document, epoch, part = int(entry["document"]), int(entry["epoch"]), int(entry["part"])
            images: list[ImageOrigin] = []
            start = row
            special = source.corpus.tokenizer
            where = source.corpus.where, document, epoch, part
            rows, begins, ends, first_piece, shard = source.arranged(document, epoch, *range_of(entry))
            rows = rows[rows[:, SEQUENCE] == part]
            if self.sequences.captions and not self.sequences.doubled:
                (_, written, begin, end), (_, pictured, _, _) = rows.tolist()
                text = _text(shard, first_piece + written, begin, end, special)
                row = self._put_caption(tokens, start, text, special)
                stored = int(shard.piece(first_piece + pictured))
                name = _image_name(source, shard, stored)
                seen = ImageOrigin(slot, shard.number, stored, name, start + 1, start + 2, pair=False)
                origins.append(SequenceOrigin(*where, start, row, row - len(text) - 2, (seen,)))
                slot += 1
                continue
            if begins:
                tokens[row] = special.sot
                row += 1
            has_text = False
            for r in rows:
                k = first_piece + int(r[PIECE])
                if r[STOP] != IMAGE_ROW:
                    text = _text(shard, k, r[START], r[STOP], special)
                    tokens[row : row + len(text)] = text
                    row += len(text)
                    has_text = has_text or len(text) > 0
                    continue
                pair = self.sequences.contrast and (has_text or (self.data.contrast_leading_images and row > start))
                stored = int(shard.piece(k))
                name = _image_name(source, shard, stored)
                soi, first = row, -1
                tokens[row] = special.soi
                row += 1
                if self.sequences.interleaved:
                    first = row
                    row = self._put_image(tokens, row, special)
                elif self.sequences.captions:
                    first = row + 2  # behind the caption's `<sot> <soi>`
                images.append(ImageOrigin(slot, shard.number, stored, name, soi, first, pair))
                slot += 1
            if ends:
                tokens[row] = special.eot
                row += 1
            # where pairs have captions, targets are theirs
            targets = start if self.sequences.targets and not self.sequences.captions else row
            origins.append(SequenceOrigin(*where, start, row, targets, tuple(images)))
            if self.sequences.captions:
                start = row
                row = self._put_caption(tokens, start, text, special)
                origins.append(SequenceOrigin(*where, start, row, row - len(text) - 2, ()))
        return origins

    def _put_caption(self, tokens: np.ndarray, row: int, text: np.ndarray, special: Tokenizer) -> int:
        """Write a pair's caption from a row on; the row after it. Targets are those from `<eoi>` on."""
        tokens[row : row + 2] = special.sot, special.soi
        row = self._put_image(tokens, row + 2, special)
        tokens[row : row + len(text)] = text
        tokens[row + len(text)] = special.eot
        return row + len(text) + 1

    def _put_image(self, tokens: np.ndarray, row: int, special: Tokenizer) -> int:
        """Write the placeholders of an image and `<eoi>` from a row on; the row after them."""
        tokens[row : row + self.num_placeholders] = special.placeholder
        tokens[row + self.num_placeholders] = special.eoi
        return row + self.num_placeholders + 1

    def _targets(self, origin: SequenceOrigin, tokens: np.ndarray, targets: np.ndarray) -> None:
        """targets of one sequence from its tokens: the next id unless that is a placeholder or `<eoi>`."""
        first = origin.target_start - origin.start
        targets[first:-1] = tokens[first + 1 :]
        for image in origin.images:
            if (soi := image.soi - origin.start) >= first:
                targets[soi : soi + self.num_placeholders + 1] = -1

    def _pixels(self, pack: Pack, origin: SequenceOrigin, image: ImageOrigin) -> np.ndarray:
        corpus = next(s.corpus for s in pack.sources if s.corpus.where == origin.corpus)
        data = corpus.shard(image.shard).image(image.image)
        if not self.train:
            return decode_eval(data, self.image_size)
        seed, turn = key(self.data.seed, pack.number, image.slot), iter(range(1 << 30))
        return decode_train(
            data, self.image_size, lambda: uniform(seed, next(turn)), self.data.crop_scale, self.data.crop_ratio
        )

    def _report(self, pack: int) -> None:
        """Say which pack this worker is at, for the message should it be killed."""
        worker = torch.utils.data.get_worker_info()
        if self.progress is not None and worker is not None:
            self.progress[worker.id] = pack


def draw_patches(seed: int, pack: int, slot: int, num_patches: int, num_kept: int) -> np.ndarray:
    """The patches that stay of the image in a slot of a pack, ascending int64 [num_kept]: any subset is as likely."""
    return np.sort(shuffled(key(seed, pack, slot, _PATCHES), num_patches, 0, num_kept))


_PATCHES = 1 << 40
"""what an image's patches are drawn by, beside the numbers by which its crop is"""


def _text(shard: Shard, k: int, start: int, stop: int, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids start … stop-1 of the text that piece `k` is. UserError where one is not of the base vocabulary: the
    embeddings have no such row, or it is that of a special token."""
    text = shard.piece(k)
    assert isinstance(text, np.ndarray)
    shard.check_ids(text[start:stop], tokenizer.base_size, k)
    return text[start:stop]


def _image_name(source: Source, shard: Shard, image: int) -> str:
    return f"{source.corpus.where}, shard {shard.number}, image {image}"
