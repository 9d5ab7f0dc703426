"""Where a shard's documents came from: `names-K.bin`, one name a document, read by whoever looks a document up.

Names that follow one another are alike (`part-0.jsonl@8192`, `part-0.jsonl@9034`), so each is written as what differs
from the one before. In blocks of 1,024 names, each of which can be read alone:

    uint8 n | the name without its first n bytes, which are those of the name before it | 0x0a         for each name

and behind all blocks int64 [blocks + 1]: where each begins, and the end of the last, bytes. The first name of a block
has n = 0. No library decides these bytes, so that they depend on the names alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_lcl.data.corpus.indexed import FileInfo, HashingFile, map_file
from megatron_lcl.errors import UserError

BLOCK = 1024
MAX_BYTES = 1000
"""longer names, as a hostile source may have, are cut"""
_MAX_SHARED = 255
_ENTRY = re.compile(rb"(.)([^\n]*)\n", re.DOTALL)


class NamesWriter:
    """Streams names into `path`, which stands there once `finish` was called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = HashingFile(path)
        self._previous = b""
        self._num = 0
        self._starts: list[int] = []

    def extend(self, names: Iterable[str]) -> None:
        """Append the names of the documents that follow; "" where nothing is known."""
        entries: list[bytes] = []
        previous, num, size = self._previous, self._num, self._file.size
        for name in names:
            if num % BLOCK == 0:
                self._starts.append(size)
                previous = b""
            num += 1
            raw = _encoded(name)
            shared = _num_shared(previous, raw)
            entry = b"%c%b\n" % (shared, raw[shared:])
            entries.append(entry)
            size += len(entry)
            previous = raw
        self._previous, self._num = previous, num
        self._file.write(b"".join(entries))

    def finish(self) -> FileInfo:
        self._file.write(np.array([*self._starts, self._file.size], np.int64).tobytes())
        return self._file.finish()

    def abort(self) -> None:
        self._file.abort()


def _encoded(name: str) -> bytes:
    """UTF-8 without line ends; what is no Unicode (a file's name need not be) as \\udcff."""
    raw = name.encode(errors="backslashreplace")
    if b"\n" in raw:
        raw = raw.replace(b"\n", b"\\n")
    return raw if len(raw) <= MAX_BYTES else raw[:MAX_BYTES].decode(errors="ignore").encode()


def as_stored(name: str) -> str:
    """A name as it is read again: on one line, in Unicode, and cut where it is too long."""
    return _encoded(name).decode()


def _num_shared(a: bytes, b: bytes) -> int:
    """Bytes at the start that are the same, by bisection: a comparison of slices is much faster than a loop."""
    low, high = 0, min(len(a), len(b), _MAX_SHARED)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Names:
    """The names of a shard's documents, memory-mapped. UserError where the file is damaged."""

    def __init__(self, path: Path, num: int) -> None:
        self.path, self._num = path, num
        self._data = memoryview(map_file(path))
        num_starts = -(-num // BLOCK) + 1
        end = self._data.nbytes - 8 * num_starts
        self._starts = np.frombuffer(self._data, np.int64, num_starts, end) if end >= 0 else np.empty(0, np.int64)
        if end < 0 or self._starts[0] != 0 or self._starts[-1] != end or (np.diff(self._starts) < 0).any():
            raise self._damaged()

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, i: int) -> str:
        return self._block(i // BLOCK)[i % BLOCK].decode(errors="replace")

    def between(self, start: int, stop: int) -> Iterator[str]:
        """The names of documents start … stop-1 one after another; each block is read once."""
        for k in range(start // BLOCK, -(-stop // BLOCK)):
            first = k * BLOCK
            for name in self._block(k)[max(start - first, 0) : stop - first]:
                yield name.decode(errors="replace")

    def find(self, text: str) -> Iterator[int]:
        """Numbers of the documents whose name has `text` in it, in order."""
        wanted = _encoded(text)
        for k in range(len(self._starts) - 1):
            yield from (k * BLOCK + i for i, name in enumerate(self._block(k)) if wanted in name)

    def check(self) -> None:
        """Read all names. UserError where one is damaged."""
        for k in range(len(self._starts) - 1):
            try:
                b"\n".join(self._block(k)).decode()
            except UnicodeDecodeError:
                raise self._damaged() from None

    def _block(self, k: int) -> list[bytes]:
        raw = bytes(self._data[self._starts[k] : self._starts[k + 1]])
        names: list[bytes] = []
        name, num_read = b"", 0
        for shared, rest in _ENTRY.findall(raw):
            if shared[0] > len(name):
                raise self._damaged()
            name = name[: shared[0]] + rest
            num_read += 2 + len(rest)
            names.append(name)
        if num_read != len(raw) or len(names) != min(BLOCK, self._num - k * BLOCK):
            raise self._damaged()
        return names

    def _damaged(self) -> UserError:
        return UserError(f"{self.path} is damaged: not the names of {self._num:,} documents")
