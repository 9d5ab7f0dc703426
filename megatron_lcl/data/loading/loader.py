"""Pack index × corpora → PackedBatch, in this process or in worker processes that survive the main one's signals."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.store import Shard
from megatron_lcl.data.corpus.tokenizer import Tokenizer
from megatron_lcl.data.loading.ahead import Turns
from megatron_lcl.data.loading.bad_images import BadImages
from megatron_lcl.data.loading.batch import PackedBatch, integer_sizes, num_runs
from megatron_lcl.data.loading.hashes import shuffled, uniform
from megatron_lcl.data.loading.images import decode_eval, decode_train
from megatron_lcl.data.loading.ledger import Ledger, Reading, open_ledger
from megatron_lcl.data.loading.pack_index import Pack, PackIndex, SequentialIndex
from megatron_lcl.data.loading.sequence import (
    IMAGE_ROW,
    INTERLEAVED,
    PIECE,
    SEQUENCE,
    START,
    STOP,
    Sequences,
    arrange,
    has_ends,
)
from megatron_lcl.data.loading.source import Source, key, open_source, plain
from megatron_lcl.errors import UserError


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
    """0, or the index of the piece of a document that was cut"""
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
        self.max_seqlen = min(context_length, data.tokens_per_pack)
        self.progress: torch.Tensor | None = None

    def __getitem__(self, packs: tuple[int, ...]) -> PackedBatch:
        T, I, size = self.data.tokens_per_pack, self.index.images_per_pack, self.image_size  # noqa: E741
        B, R = len(packs), num_runs(self.data.tokens_per_pack, self.max_seqlen)
        K, P = self.kept_patches or (0, self.num_placeholders)
        sizes = integer_sizes(B, T, I, R, K)
        parts = torch.full([sum(sizes.values())], -1, dtype=torch.int32).split(list(sizes.values()))
        integers = dict(zip(sizes, parts, strict=True))  # in one block of shared memory
        arrays = {name: part.numpy() for name, part in integers.items()}
        tokens, positions, targets = arrays["tokens"], arrays["positions"], arrays["targets"]
        runs, target_positions = arrays["cu_seqlens"], arrays["target_positions"]
        image_start, image_soi, image_valid = arrays["image_start"], arrays["image_soi"], arrays["image_valid"]
        tokens[:] = positions[:] = image_valid[:] = 0
        if K:
            kept = arrays["kept_patches"].reshape(B * I, K)
            for slot in range(B * I):
                kept[slot] = draw_patches(self.data.seed, packs[slot // I], slot % I, P, K)
        runs[-1] = B * T
        images = torch.zeros(B * I, 3, size, size, dtype=torch.uint8)
        pixels = images.numpy()
        bad: list[tuple[int, str]] = []
        num_tokens = 0
        for b, number in enumerate(packs):
            self._report(number)
            pack = self.index[number]
            row, starts = b * T, [b * T]
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
                starts.append(min(starts[-1] + self.max_seqlen, row + T))
            runs[b * R : (b + 1) * R] = row + T
            runs[b * R : b * R + len(starts)] = starts
        self._report(-1)
        rows = np.flatnonzero(targets >= 0)
        target_positions[: len(rows)] = rows
        return PackedBatch(
            **integers,
            images=images,
            num_targets=len(rows),
            num_pairs=int((image_soi >= 0).sum()),
            num_images=int(image_valid.sum()),
            num_tokens=num_tokens,
            max_seqlen=self.max_seqlen,
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
            rows, begins, ends, first_piece, shard = self._rows(source, document, epoch, part)
            if self.sequences.captions and not self.sequences.doubled:
                (_, written, begin, end), (_, pictured, _, _) = rows.tolist()
                text = shard.piece(first_piece + written)[begin:end]  # type: ignore[index]
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
                piece = shard.piece(first_piece + int(r[PIECE]))
                if r[STOP] != IMAGE_ROW:
                    text = piece[r[START] : r[STOP]]  # type: ignore[index]
                    tokens[row : row + len(text)] = text
                    row += len(text)
                    has_text = has_text or len(text) > 0
                    continue
                pair = self.sequences.contrast and (has_text or (self.data.contrast_leading_images and row > start))
                name = _image_name(source, shard, int(piece))
                soi, first = row, -1
                tokens[row] = special.soi
                row += 1
                if self.sequences.interleaved:
                    first = row
                    row = self._put_image(tokens, row, special)
                elif self.sequences.captions:
                    first = row + 2  # behind the caption's `<sot> <soi>`
                images.append(ImageOrigin(slot, shard.number, int(piece), name, soi, first, pair))
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

    def _rows(self, source: Source, document: int, epoch: int, part: int) -> tuple[np.ndarray, bool, bool, int, Shard]:
        """The rows of one sequence (see `arrange`), whether `<sot>` and `<eot>` are around it, the piece that row
        piece 0 is, and its shard."""
        k, local = source.corpus.locate(document)
        shard = source.corpus.shard(k)
        a, b = (int(x) for x in shard.document_offsets[local : local + 2])
        modes = plain(shard.modes[a:b])
        p = int(source.placements[document])
        q = p + int(modes.sum())
        arrays = plain(shard.lengths[a:b]), modes, plain(shard.similarity[p:q]), plain(shard.matched_text[p:q])
        rules = source.rules_of(k)
        rows = arrange(*arrays, source.document_key(document, epoch), rules)
        return rows[rows[:, SEQUENCE] == part], *has_ends(rows, modes, rules), a, shard

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
            self.progress[worker.id, 0], self.progress[worker.id, 1] = os.getpid(), pack


def draw_patches(seed: int, pack: int, slot: int, num_patches: int, num_kept: int) -> np.ndarray:
    """The patches that stay of the image in a slot of a pack, ascending int64 [num_kept]: any subset is as likely."""
    return np.sort(shuffled(key(seed, pack, slot, _PATCHES), num_patches, 0, num_kept))


_PATCHES = 1 << 40
"""what an image's patches are drawn by, beside the numbers by which its crop is"""


def _image_name(source: Source, shard: Shard, image: int) -> str:
    return f"{source.corpus.where}, shard {shard.number}, image {image}"


class PackedLoader(Iterable[PackedBatch]):
    """The micro-batches of one data-parallel rank, in order: global_batch / (world_size * micro_batch) to a step.

    first_pack: packs the run has consumed before (the sum of `global_batch` over its steps); whatever the world size,
    micro-batch or number of workers, the packs of a step are the same, in the same global order. steps: how many to
    give; None: without end, or, with train=False, all.

    train=False: every document of `data.corpora` (one corpus) that selection leaves, exactly once, in order, without
    augmentation; no cut takes an image's text away (`Rules.carry_text`); the last batch is filled up with empty packs.

    num_placeholders, kept_patches: see `PackReader`. sequences: those that the objective reads. ledger: see
    `open_ledger`; None begins a new one. Each iteration starts again at first_pack. Of a ledger with phases the packs
    are those of the phase that `first_pack` is in, also behind its end; the loader of the next phase has the next ones.
    """

    def __init__(
        self,
        data: Data,
        num_placeholders: int,
        image_size: int,
        context_length: int,
        *,
        kept_patches: tuple[int, int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        global_batch: int = 1,
        micro_batch: int = 1,
        first_pack: int = 0,
        steps: int | None = None,
        train: bool = True,
        sequences: Sequences = INTERLEAVED,
        ledger: Ledger | None = None,
        pin_memory: bool = False,
    ) -> None:
        if global_batch % (world_size * micro_batch):
            raise UserError(
                f"train.global_batch = {global_batch} is not a multiple of {world_size} data-parallel processes times "
                f"train.micro_batch = {micro_batch}; the nearest that is: "
                f"{max(1, round(global_batch / (world_size * micro_batch))) * world_size * micro_batch}"
            )
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size} processes; ranks count from 0")
        index: PackIndex | SequentialIndex
        if train:
            ledger = ledger or open_ledger(data, num_placeholders, context_length, sequences=sequences)
            index = PackIndex(data, ledger, ledger.segment_after(first_pack))
            assert data.tokens_per_pack == index.segment.settings["tokens_per_pack"], "the data are of another phase"
        else:
            if len(data.corpora) != 1:
                raise UserError(f"evaluation reads one corpus; data.corpora names {len(data.corpora)}")
            whole = open_ledger(data, num_placeholders, context_length, sequences=sequences)
            slots = whole.settings["images_per_pack"]
            index = SequentialIndex(
                open_source(
                    data.corpora[0].path, data, num_placeholders, context_length, slots, sequences, carry_text=True
                ),
                data.tokens_per_pack,
            )
            if steps is None:
                steps = -(-max(0, len(index) - first_pack) // global_batch)
        self.ledger = ledger
        """what the packs depend on, for the checkpoint; None in evaluation"""
        self.reader = PackReader(
            index,
            data,
            num_placeholders,
            image_size,
            context_length,
            train=train,
            sequences=sequences,
            kept_patches=kept_patches,
        )
        self.steps = steps
        self.micro_batches = global_batch // (world_size * micro_batch)
        self._data, self._first, self._global_batch, self._micro_batch = data, first_pack, global_batch, micro_batch
        self._rank, self._world_size, self._pin = rank, world_size, pin_memory
        index.prepare(self._locate(first_pack))

    @property
    def images_per_pack(self) -> int:
        """I, given or chosen."""
        return self.reader.index.images_per_pack

    def provenance(self, pack: int) -> list[SequenceOrigin]:
        """Where the sequences and images of a pack (an element of `PackedBatch.packs`) came from."""
        return self.reader.provenance(pack)

    def ledger_after(self, consumed: int) -> Ledger:
        """The ledger for a checkpoint after `consumed` packs: a run that goes on from there builds one chunk."""
        index = self.reader.index
        assert self.ledger is not None
        assert isinstance(index, PackIndex)
        self.ledger = index.ledger_at(self.ledger.locate(consumed))
        return self.ledger

    def _locate(self, consumed: int) -> int:
        return consumed if self.ledger is None else self.ledger.locate(consumed)

    def packs_of(self, turn: int) -> tuple[int, ...]:
        """The packs of micro-batch `turn`, counted from 0."""
        step, micro = divmod(turn, self.micro_batches)
        first = self._first + step * self._global_batch
        start = first + (micro * self._world_size + self._rank) * self._micro_batch
        return tuple(self._locate(start + b) for b in range(self._micro_batch))

    def __len__(self) -> int:
        """Micro-batches in all. TypeError if there is no end."""
        if self.steps is None:
            raise TypeError("a training loader without `steps` has no end")
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[PackedBatch]:
        bad = BadImages(self._data)
        for batch in self._batches():
            bad.count(batch)
            yield batch

    def _batches(self) -> Iterator[PackedBatch]:
        workers = self._data.workers
        numbers = itertools.count() if self.steps is None else range(len(self))
        turns = Turns(self.reader, self.packs_of, None if self.steps is None else len(self))
        if workers == 0:
            yield from map(turns.__getitem__, numbers)
            return
        self.reader.progress = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()
        loader: DataLoader[PackedBatch] = DataLoader(
            turns,
            sampler=numbers,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            pin_memory=self._pin,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork",
        )
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD) if main else None
        batches = iter(loader)
        if main:  # without torch's handler, which raises anywhere in the main program; a dead worker is noticed below
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._explained(error) from error
            yield batch

    def _explained(self, error: RuntimeError) -> RuntimeError:
        assert self.reader.progress is not None
        for pid, pack in self.reader.progress.tolist():
            if pid > 0 and not _alive(pid):
                where = "between two packs" if pack < 0 else f"at pack {pack}: {self._describe(pack)}"
                return LoaderKilled(
                    f"loader process {pid} was killed {where}. If the machine is short of memory, lower data.workers"
                )
        return error

    def _describe(self, pack: int) -> str:
        origins = self.reader.provenance(pack)
        return "; ".join(f"document {o.document} of {o.corpus}" for o in origins[:8]) + (
            "; …" if len(origins) > 8 else ""
        )


def loader_of(reading: Reading, data: Data, sequences: Sequences, **options: Any) -> PackedLoader:
    """A training loader of what a phase reads. data: the run's; options: further ones of PackedLoader."""
    return PackedLoader(
        reading.data(data),
        reading.num_patches,
        reading.image_size,
        reading.context_length,
        kept_patches=reading.kept_patches,
        sequences=sequences,
        **options,
    )


class LoaderKilled(RuntimeError):
    """A loader process has gone without an error of its own: the machine is short of memory, as a rule."""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _start_worker(worker: int) -> None:
    """A worker ends when the main process wants it to, and by no other SIGTERM, SIGINT or SIGUSR1.

    Schedulers and terminals signal the whole process group; the main process then saves, and needs its workers.
    """
    import cv2

    signal.set_wakeup_fd(-1)  # the main process may listen there, to its own signals
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_request, args=(os.getppid(),), daemon=True).start()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _end_on_request(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
