"""Reading ahead from object storage: what the next batches of a loader process need is known, and asked for before.

Which documents a batch reads follows from its number; which images, from the documents' tokens. So tokens are read
2 `data.look_ahead` micro-batches ahead, images `data.look_ahead`. What is not there in time is waited for.
"""

from __future__ import annotations

import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.utils.data import Dataset

from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.reader import PackReader
from megatron_lcl.data.loading.shared_memory import put_there
from megatron_lcl.data.storage.blocks import Blocks
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError

_THREADS = 16
"""objects that are read from at once"""
_Ranges = dict[Blocks, list[tuple[int, int]]]


class Turns(Dataset[PackedBatch | UserError | OSError]):
    """The micro-batches of a loader by their numbers, `stop` of them (None: without end).

    Those of loader processes are in shared memory. In one, what a user can mend is returned, for the main process to
    raise: of what is raised there, torch keeps the class only, with the traceback for its message.
    """

    def __init__(self, reader: PackReader, packs_of: Callable[[int], tuple[int, ...]], stop: int | None) -> None:
        self._reader, self._packs_of, self._stop = reader, packs_of, stop
        self._ahead: Ahead | None = None
        self._remote = any(url_of(corpus.path) for corpus in reader.data.corpora)

    def __getitem__(self, turn: int) -> PackedBatch | UserError | OSError:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        try:
            return put_there(self.read(turn, worker.num_workers))
        except (UserError, OSError) as error:
            error.add_note(f"In loader process {worker.id}:\n{traceback.format_exc()}")
            return error

    def close(self) -> None:
        """Read nothing further ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def read(self, turn: int, num_workers: int = 1) -> PackedBatch:
        """Micro-batch `turn`, in one of `num_workers` processes which read every num_workers-th."""
        if not self._remote:
            return self._reader[self._packs_of(turn)]
        if self._ahead is None:
            self._ahead = Ahead(self._reader, self._packs_of, num_workers, self._stop)
        self._ahead.begin(turn)
        batch = self._reader[self._packs_of(turn)]
        self._ahead.end(turn)
        return batch


class Ahead:
    """Reads ahead for one process, which is asked for every `stride`-th micro-batch."""

    def __init__(
        self, reader: PackReader, packs_of: Callable[[int], tuple[int, ...]], stride: int, stop: int | None
    ) -> None:
        self._reader, self._packs_of, self._stride, self._stop = reader, packs_of, stride, stop
        self._depth = reader.data.look_ahead
        self._pool = ThreadPoolExecutor(_THREADS)
        self.close = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        """what was asked for and has not begun is not read"""
        threading._register_atexit(self.close)  # type: ignore[attr-defined]  # later, a process waits for its threads
        self._tokens: dict[int, dict[Blocks, Future[None]]] = {}
        """what was asked for, by the micro-batches that need it"""
        self._images: dict[int, dict[Blocks, Future[None]]] = {}

    def begin(self, turn: int) -> None:
        """Ask for what the next micro-batches need, and wait for what this one does."""
        for later in self._turns(turn, 2 * self._depth):
            if later not in self._tokens:
                self._tokens[later] = self._ask(self._token_ranges(later), later)
        for later in self._turns(turn, self._depth):
            if later not in self._images:
                for token in self._tokens[later].values():
                    token.result()
                self._images[later] = self._ask(self._image_ranges(later), later)
        for image in self._images[turn].values():
            image.result()

    def end(self, turn: int) -> None:
        """A micro-batch is assembled: what only it needed may go.

        Only the files that it was read from are asked, of which a large corpus has tens of thousands more.
        """
        for asked in (self._tokens, self._images):
            for past in [past for past in asked if past <= turn]:
                for blocks in asked.pop(past):
                    blocks.release(turn)

    def _turns(self, turn: int, depth: int) -> range:
        stop = turn + depth * self._stride + 1
        return range(turn, stop if self._stop is None else min(stop, self._stop), self._stride)

    def _ask(self, ranges: _Ranges, turn: int) -> dict[Blocks, Future[None]]:
        return {blocks: self._pool.submit(blocks.ahead, wanted, turn) for blocks, wanted in ranges.items()}

    def _token_ranges(self, turn: int) -> _Ranges:
        """Of the documents, whole ones, also where only a part of one is read."""
        found: _Ranges = {}
        for number in self._packs_of(turn):
            pack = self._reader.index[number]
            for entry in pack.entries:
                corpus = pack.sources[entry["corpus"]].corpus
                k, local = corpus.locate(int(entry["document"]))
                shard = corpus.shard(k)
                if shard.tokens.blocks is not None:
                    found.setdefault(shard.tokens.blocks, []).append(shard.tokens.span(*shard.bounds(local)))
        return found

    def _image_ranges(self, turn: int) -> _Ranges:
        found: _Ranges = {}
        for number in self._packs_of(turn):
            corpora = {source.corpus.where: source.corpus for source in self._reader.index[number].sources}
            for origin in self._reader.provenance(number):
                for image in origin.images:
                    images = corpora[origin.corpus].shard(image.shard).images
                    if images.blocks is not None:
                        found.setdefault(images.blocks, []).append(images.span(image.image, image.image + 1))
        return found
