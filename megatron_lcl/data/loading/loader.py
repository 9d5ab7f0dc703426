"""Micro-batches of a run (`reader.py`), in this process or in worker processes that survive the main one's signals."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import PIL.Image
import torch
from torch.utils.data import DataLoader

from megatron_lcl.config import Config, Data
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.ahead import Turns
from megatron_lcl.data.loading.bad_images import BadImages
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.ledger import Ledger, open_ledger, open_run_ledger
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.reader import PackReader, SequenceOrigin
from megatron_lcl.data.loading.reading import Reading
from megatron_lcl.data.loading.rules import INTERLEAVED, Sequences
from megatron_lcl.data.loading.sequential_index import SequentialIndex
from megatron_lcl.data.loading.shared_memory import PREFETCH
from megatron_lcl.data.loading.source import open_source
from megatron_lcl.data.loading.workers import forking, kill
from megatron_lcl.errors import UserError
from megatron_lcl.processes import prepare_sockets


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
            corpus = open_corpus(data.corpora[0].path, data.cache)
            index = SequentialIndex(
                open_source(corpus, data, num_placeholders, context_length, slots, sequences, carry_text=True),
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
            with contextlib.closing(turns):
                yield from map(turns.read, numbers)
            return
        prepare_sockets()
        self.reader.progress = torch.full((workers,), -1, dtype=torch.int64).share_memory_()
        PIL.Image.preinit()  # else each worker imports the decoders, a tenth of a second
        main, end = os.getpid(), None
        batches: Any = None
        try:
            with forking() as begin:
                loader: DataLoader[PackedBatch | UserError | OSError] = DataLoader(
                    turns,
                    sampler=numbers,  # type: ignore[arg-type]
                    batch_size=None,
                    num_workers=workers,
                    prefetch_factor=PREFETCH,
                    pin_memory=self._pin,
                    worker_init_fn=begin,
                    multiprocessing_context="fork",
                    # else each start draws the workers' seed from torch's own generator, and a resumed run is ahead
                    generator=torch.Generator(),
                )
                batches = iter(loader)
                end = Finalize(None, kill, (batches._workers,), exitpriority=1)
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise self._explained(error, batches._workers) from error
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            if end is not None:
                if os.getpid() == main:
                    # of an error's traceback the garbage collector frees the queues first: it would wait 5 s for each
                    # worker, which waits for word by one of them
                    batches._shutdown_workers()
                else:  # the program's own fork, whose workers they are not
                    batches._shutdown = True
                end()

    def _explained(self, error: RuntimeError, workers: Sequence[BaseProcess]) -> RuntimeError:
        assert self.reader.progress is not None
        for worker, pack in zip(workers, self.reader.progress.tolist(), strict=True):
            if not worker.is_alive():
                where = "before its next pack" if pack < 0 else f"at pack {pack}: {self._describe(pack)}"
                how = (
                    f"was killed (signal {-code})"
                    if (code := worker.exitcode or 0) < 0
                    else f"ended (exit code {code})"
                )
                return LoaderKilled(
                    f"loader process {worker.pid} {how} {where}. If the machine is short of memory, fewer loader "
                    "processes need less of it (data.workers of the run)"
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


def read_step(
    config: Config,
    sequences: Sequences,
    step: int,
    ledger: Ledger | None = None,
    packs: int | None = None,
    **layout: int,
) -> PackedLoader:
    """The packs of a step (counted from 0) of a run with this config: as tensors what `replay` shows.

    Iterated, it gives a `PackedBatch` for each pack, in order; read in this process, without workers, as often as it is
    iterated. `provenance` says of each number in `PackedBatch.packs` what the pack is made of.

    sequences: those that the run's objective reads, `objective_class(config.objective.name).sequences`. ledger: the
    run's, from a checkpoint, if its blend or batch has changed, or packs were skipped; None: as the run began. packs:
    so many from its first on (1 or more), also of the next steps; None: its own. layout: `rank`, `world_size` and
    `micro_batch` of PackedLoader, for what one data-parallel process reads; else all packs are given, one by one.

    UserError for a step or rank below 0, where the processes cannot divide the batch, and where the config says other
    packs than the ledger.
    """
    if step < 0:
        raise UserError(f"step {step}; steps count from 0")
    if ledger is None:
        ledger = open_run_ledger(config, sequences)
    else:
        ledger.check(config, sequences)
    reading, first_pack = ledger.reading_at(step, config)
    return loader_of(
        reading,
        replace(config.data, workers=0),
        sequences,
        global_batch=reading.global_batch if packs is None else packs,
        first_pack=first_pack,
        steps=1,
        ledger=ledger,
        **layout,
    )


class LoaderKilled(RuntimeError):
    """A loader process has gone without an error of its own: the machine is short of memory, as a rule."""
