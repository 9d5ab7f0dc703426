"""Ranges of one object, on the local disk as far as there is room, and ahead of when they are needed.

    NAME          as large as the object, with holes where nothing was read yet
    NAME.have     uint64 for each block of BLOCK bytes: the block's XXH3-64, 0: it is not there (also a file with holes)

All processes of a machine share the two. A block is written before its hash, and whoever reads it compares: one that a
crash of the machine left half-written, or that two write at once, is at worst asked for again. Of what is read nothing
is deleted: once the folder has as many bytes as it may have, what else is needed is kept in memory until it was used.
For documents that every epoch reads once, in an order of its own, that reads a part f of a corpus from a disk that
holds a part f of it; deleting what was unused longest would read f²/2.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import xxhash

from megatron_lcl.data.storage.open_files import allow_open_files
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import is_full
from megatron_lcl.filesystem import matching

BLOCK = 4096
MERGE = 16
"""blocks that lie between two ranges and are read with them: a request takes longer than they do"""
LARGEST = 1 << 20
"""bytes of one request"""
_LOOK_SECONDS = 5.0
_LOOK_SHARE = 0.1
"""of the time, at most, in which a process looks how much room there is: a large cache has 100,000s of files"""
_FULL_SECONDS = 600.0
"""until it looks again where there was none: all that is ever deleted is a corpus that nobody has read for a day"""


class Room:
    """How many bytes more some folders may hold, looked up now and then; several processes may use what is left.

    folders: those of a folder that match a pattern. limit: of all of them. clear: deletes, where they have more, what
    nobody uses, and says whether anything was. Threads may use it at once.
    """

    def __init__(
        self, folder: Path, pattern: str, limit: float, clear: Callable[[float], bool] = lambda limit: False
    ) -> None:
        self.folder, self.pattern, self.limit, self._clear = folder, pattern, limit, clear
        self._used = 0
        self._next_look = 0.0

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes more, which are then counted as used."""
        began = time.monotonic()
        if began >= self._next_look:
            if self._next_look:  # after the first time, other threads go on by what was found before
                self._next_look = began + _FULL_SECONDS
            self._used = self._look()
            if self._used + LARGEST > self.limit > 0 and self._clear(self.limit):
                self._used = self._look()
            now = time.monotonic()
            pause = _FULL_SECONDS if self._used + LARGEST > self.limit else _LOOK_SECONDS
            self._next_look = now + max(pause, (now - began) / _LOOK_SHARE)
        if self._used + size > self.limit:
            return False
        self._used += size
        return True

    def _look(self) -> int:
        return sum(map(disk_use, matching(self.folder, self.pattern)))


def disk_use(folder: Path) -> int:
    """Bytes that the files below a folder take, holes not counted."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except OSError:  # deleted meanwhile
                continue
    return total


class Blocks:
    """The bytes of one object of `size` bytes. used: called at every use. Threads may use it at once."""

    def __init__(
        self, store: Store, name: str, size: int, etag: str | None, folder: Path, room: Room,
        used: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.name, self.size = name, size
        self._store, self._etag, self._room, self._used = store, etag, room, used
        self._path = folder / name
        self._files: _Files | None = None
        self._held: dict[int, tuple[bytes, int]] = {}
        """blocks for which there is no room on the disk, and until which turn they are needed"""
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """With nothing asked for; also in a process that was forked, where the threads that have asked are not."""
        self._asked: dict[int, int] = {}
        """blocks that a thread has asked for, and until which turn they are needed"""
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start … stop-1: those that are here, the others from the store."""
        if start >= stop:
            return b""
        first, last = start // BLOCK, -(-stop // BLOCK)
        content = self._here(first, last)
        if content is None:
            content = b"".join(self._fetch([(first, last)]))
        return content[start - first * BLOCK : stop - first * BLOCK]

    def ahead(self, ranges: Iterable[tuple[int, int]], turn: int) -> None:
        """Have some ranges of bytes here, for `read` up to turn `turn`; what is not is asked for in few requests.

        What another thread has asked for is waited for; where that fails, `read` asks again.
        """
        needed: set[int] = set()
        for start, stop in ranges:
            first, last = start // BLOCK, -(-stop // BLOCK)
            if start < stop and self._here(first, last, turn) is None:
                needed.update(range(first, last))
        with self._arrival:
            own = sorted(needed - self._asked.keys())
            for block in needed:
                self._asked[block] = max(turn, self._asked.get(block, turn))
                if block in self._held:  # it has just come, for another turn
                    content, until = self._held[block]
                    self._held[block] = content, max(turn, until)
        try:
            self._fetch(_runs(own))
        finally:
            with self._arrival:
                for block in own:
                    del self._asked[block]
                self._arrival.notify_all()
        with self._arrival:
            self._arrival.wait_for(lambda: not needed & self._asked.keys())

    def release(self, turn: int) -> None:
        """Let go of what was held in memory for turns up to `turn`."""
        with self._lock:
            for block in [block for block, (_, until) in self._held.items() if until <= turn]:
                del self._held[block]

    def _fetch(self, runs: list[tuple[int, int]]) -> list[bytes]:
        """Blocks of some runs, from the store; they are kept, those without room if a turn needs them."""
        step = LARGEST // BLOCK
        runs = [(at, min(at + step, last)) for first, last in runs for at in range(first, last, step)]
        ranges = [(first * BLOCK, min(last * BLOCK, self.size)) for first, last in runs]
        contents: list[bytes] = self._store.read(self.name, ranges, self._etag) if ranges else []
        for (first, last), content in zip(runs, contents, strict=True):
            if self._room.take(len(content)) and self._write(first, content):
                continue
            with self._lock:
                for block in range(first, last):
                    if block in self._asked:
                        at = (block - first) * BLOCK
                        until = max(self._asked[block], self._held.get(block, (b"", 0))[1])
                        self._held[block] = content[at : at + BLOCK], until
        return contents

    def _here(self, first: int, last: int, turn: int | None = None) -> bytes | None:
        """Blocks first … last-1, if all are here. turn: those in memory are needed until then."""
        self._used()
        with self._lock:
            held = {block: self._held[block] for block in range(first, last) if block in self._held}
            if turn is not None:
                for block, (content, until) in held.items():
                    self._held[block] = content, max(until, turn)
        if len(held) == last - first:
            return b"".join(held[block][0] for block in range(first, last))
        files = self._open()
        hashes = np.frombuffer(os.pread(files.have, 8 * (last - first), 8 * first), np.uint64)
        if len(hashes) < last - first:
            return None
        found = bytearray(os.pread(files.data, min(last * BLOCK, self.size) - first * BLOCK, first * BLOCK))
        view = memoryview(found)
        for block, expected in zip(range(first, last), hashes.tolist(), strict=True):
            at = (block - first) * BLOCK
            if block in held:
                found[at : at + BLOCK] = held[block][0]
            elif not expected or _hash(view[at : at + BLOCK]) != expected:
                return None
        return bytes(found)

    def _write(self, first: int, content: bytes) -> bool:
        """Whether the disk took it."""
        files = self._open()
        view = memoryview(content)
        hashes = np.array([_hash(view[at : at + BLOCK]) for at in range(0, len(content), BLOCK)], np.uint64)
        try:
            _write_at(files.data, content, first * BLOCK)
            _write_at(files.have, hashes.tobytes(), 8 * first)
        except OSError as error:
            if not is_full(error):
                raise
            return False
        return True

    def _open(self) -> _Files:
        with self._lock:
            files = self._files
            if files is None:
                files = self._files = _Files(self._path, self.size)
                _opened.append(weakref.ref(self))
                while len(_opened) > allow_open_files() // 4:  # half of all files, two for each
                    if (first := _opened.popleft()()) is not None:
                        first._files = None
            return files


class _Files:
    """Descriptors of the two files of an object of `size` bytes, closed once nobody holds them."""

    data = have = -1

    def __init__(self, path: Path, size: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.data = os.open(path, flags, 0o666)
        self.have = os.open(f"{path}.have", flags, 0o666)
        if os.fstat(self.data).st_size < size:
            os.truncate(self.data, size)

    def __del__(self) -> None:
        for descriptor in (self.data, self.have):
            if descriptor >= 0:
                os.close(descriptor)


_opened: deque[weakref.ref[Blocks]] = deque()
"""those with open files, in the order in which they were opened; of a process, as the limit is"""
_all: weakref.WeakSet[Blocks] = weakref.WeakSet()


def _after_fork() -> None:
    for blocks in _all:
        blocks._begin()


os.register_at_fork(after_in_child=_after_fork)


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Ascending blocks as runs (first, last + 1), near ones together."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and block - runs[-1][1] <= MERGE and block - runs[-1][0] < LARGEST // BLOCK:
            runs[-1] = runs[-1][0], block + 1
        else:
            runs.append((block, block + 1))
    return runs


def _hash(block: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(block) or 1  # 0 says that there is none


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
