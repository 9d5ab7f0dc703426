"""One `.bin` and `.idx` pair: Megatron-Core's multimodal IndexedDataset, written and read byte for byte.

`.bin` holds the sequences one after another; `.idx` (little-endian) holds

    9 bytes "MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype code | uint64 sequences S | uint64 document entries D+1
    int32 lengths[S], elements | int64 pointers[S], bytes | int64 documents[D+1], sequence numbers | int8 modes[S]

Source: megatron/core/datasets/indexed_dataset.py, which opens them with `IndexedDataset(prefix, multimodal=True)`.
"""

from __future__ import annotations

import errno
import math
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from megatron_lcl.data.storage.blocks import Blocks
from megatron_lcl.errors import UserError, naming

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[np.dtype, int] = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4}
_BUFFER = 1 << 20
_MAX_LENGTH = (1 << 31) - 1
"""elements of a sequence: lengths are int32"""
TEXT, IMAGE = 0, 1
"""modes of a sequence of a corpus's tokens"""

FileInfo = dict[str, int | str]
"""{"size": bytes, "xxh3": 32 hex digits of XXH3-128}"""


def map_file(path: Path) -> pa.Buffer:
    """The file's bytes, memory-mapped; no file descriptor stays open, so thousands of shards can be.

    UserError where the process may not have another mapping.
    """
    if path.stat().st_size == 0:
        return pa.py_buffer(b"")
    try:
        with pa.memory_map(str(path)) as file:
            return file.read_buffer()
    except OSError as error:
        if os.strerror(errno.ENOMEM) not in str(error):  # pyarrow leaves errno out
            raise
        raise UserError(
            f"{path} cannot be mapped into memory: this process has as many mappings, or as much address space, as it "
            "may have; raise the limits (`sysctl -w vm.max_map_count=262144`, `ulimit -v unlimited`)"
        ) from None


def map_array(path: Path) -> np.ndarray:
    """The array of a `.npy` file, mapped as `map_file` does, read-only: `np.load` keeps a file descriptor for each.

    ValueError where the file is damaged.
    """
    with path.open("rb") as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):  # the one of all that NumPy writes here
            raise ValueError(f"{path.name} has version {version}")
        shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if dtype.hasobject:  # whose bytes would be taken for addresses in memory
        raise ValueError(f"{path.name} holds {dtype}, not numbers")
    content = map_file(path)
    if content.size < start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path.name} ends too early")
    return np.ndarray(shape, dtype, content, start, order="F" if in_columns else "C")


class HashingFile:
    """Writes `path` under a temporary name; `finish` fsyncs, renames, and returns size and XXH3-128."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - closed by finish or abort
        self._hash = xxhash.xxh3_128()
        self._pending: list[bytes | memoryview] = []
        self._num_pending = 0
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append; `data` must not change afterwards."""
        self._pending.append(data)
        self._num_pending += len(data)
        self.size += len(data)
        if self._num_pending >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        block = memoryview(b"".join(self._pending))
        self._pending.clear()
        self._num_pending = 0
        self._hash.update(block)
        with naming(self.path):
            while block:
                block = block[self._file.write(block) :]

    def finish(self) -> FileInfo:
        self._flush()
        with naming(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        os.replace(self._temporary, self.path)
        return {"size": self.size, "xxh3": self._hash.hexdigest()}

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> FileInfo:
    """A whole file, as HashingFile writes it; nothing is left where that fails."""
    file = HashingFile(path)
    try:
        file.write(content)
        return file.finish()
    except OSError:
        file.abort()
        raise


class IndexedWriter:
    """Streams sequences into `prefix.bin`; the index is small and kept until `finish`."""

    def __init__(self, prefix: Path, dtype: type[np.int32] | type[np.uint8]) -> None:
        self.prefix = prefix
        self._dtype: np.dtype = np.dtype(dtype)
        self._bin = HashingFile(prefix.with_name(prefix.name + ".bin"))
        self._lengths = array("I")  # an array of "i" takes a list much more slowly
        self._modes = array("b")
        self._documents = array("q", [0])

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    @property
    def num_bytes(self) -> int:
        return self._bin.size

    def add(self, data: bytes | np.ndarray, mode: int) -> None:
        """Append one sequence: `data` holds its elements in the container's dtype. UserError where it is too long."""
        block = data if isinstance(data, bytes) else np.ascontiguousarray(data, self._dtype).tobytes()
        length = len(block) // self._dtype.itemsize
        self._check(length)
        self._bin.write(block)
        self._lengths.append(length)
        self._modes.append(mode)

    def add_run(self, data: bytes, lengths: list[int], mode: int) -> None:
        """Append sequences of one mode, joined, with the number of elements of each; faster than one by one. UserError
        where one is too long."""
        if len(data) > _MAX_LENGTH:
            self._check(max(lengths))
        self._bin.write(data)
        self._lengths.fromlist(lengths)
        self._modes.frombytes(mode.to_bytes(1, "little") * len(lengths))

    def _check(self, length: int) -> None:
        if length > _MAX_LENGTH:
            raise UserError(
                f"a text or an image of {length:,} tokens or bytes for {self._bin.path}: the format holds at most "
                f"{_MAX_LENGTH:,} of one; divide it, or leave it out of the input"
            )

    def end_document(self) -> None:
        self._documents.append(len(self._lengths))

    def end_documents(self, ends: list[int]) -> None:
        """Several documents that end behind these numbers of sequences."""
        self._documents.extend(ends)

    def finish(self) -> dict[str, FileInfo]:
        """Write the index and put both files under their names; returns {file name: size and hash}."""
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=pointers[1:])
        pointers *= self._dtype.itemsize
        info = {self._bin.path.name: self._bin.finish()}
        index = HashingFile(self.prefix.with_name(self.prefix.name + ".idx"))
        index.write(_HEADER.pack(MAGIC, 1, _CODES[self._dtype], len(lengths), len(self._documents)))
        for part in (lengths, pointers, self._documents, self._modes):
            index.write(part.tobytes())
        info[index.path.name] = index.finish()
        return info

    def abort(self) -> None:
        self._bin.abort()


@dataclass(frozen=True, slots=True)
class Indexed:
    """A memory-mapped container of S sequences in D documents."""

    lengths: np.ndarray
    """int32 [S], elements of each sequence"""
    pointers: np.ndarray
    """int64 [S], where each starts in `.bin`, bytes"""
    documents: np.ndarray
    """int64 [D+1], sequence number where each document starts, and the end"""
    modes: np.ndarray
    """int8 [S]: 0 text, 1 image"""
    path: Path
    """of `.bin`"""
    dtype: np.dtype
    """of the elements"""
    num_elements: int
    data: np.ndarray | None
    """all elements; None where `blocks` has them"""
    blocks: Blocks | None = None
    """the bytes of `.bin`, where that is in object storage"""

    def sequence(self, k: int) -> np.ndarray:
        """Elements of sequence `k`, read-only. UserError as of `span`."""
        return self.sequences(k, k + 1)

    def sequences(self, start: int, stop: int) -> np.ndarray:
        """Elements of sequences start … stop-1 one after another, read-only. UserError as of `span`."""
        begin, end = self.span(start, stop)
        if self.blocks is not None:
            return np.frombuffer(self.blocks.read(begin, end), self.dtype)
        assert self.data is not None
        return self.data[begin // self.dtype.itemsize : end // self.dtype.itemsize]

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Where in `.bin` sequences start … stop-1 begin and end, bytes.

        UserError where the index, which may have been damaged since it was written, leads outside of it.
        """
        if start >= stop:
            return 0, 0
        size = self.dtype.itemsize
        begin = int(self.pointers[start])
        end = int(self.pointers[stop - 1]) + int(self.lengths[stop - 1]) * size
        if not 0 <= begin <= end <= self.num_elements * size:
            raise damaged_file(
                f"{self.path} has no bytes {begin:,} to {end:,}, where its index has sequence {start}", self.path.parent
            )
        return begin, end


def damaged_file(what: str, corpus: str | Path) -> UserError:
    """The error for a file of a corpus, in a folder or at a URL, that is not what was written."""
    return UserError(
        f"{what}; copy it again from where the corpus came from, or remove the folder and run "
        f"`megatron-lcl preprocess` again (`megatron-lcl verify {corpus}` says what else is wrong)"
    )


def read_indexed(prefix: Path, blocks: Blocks | None = None) -> Indexed:
    """Map a container; blocks: its `.bin`, where only the index is on the disk.

    UserError names a file that is not one, or is truncated.
    """
    index_path, data_path = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    try:
        index = memoryview(map_file(index_path))
        data = memoryview(map_file(data_path) if blocks is None else b"")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or error} is missing; the corpus is incomplete") from None
    if index.nbytes < _HEADER.size:
        raise UserError(f"{index_path} is truncated: {index.nbytes} bytes")
    magic, version, code, num_sequences, num_entries = _HEADER.unpack_from(index)
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    if magic != MAGIC or version != 1 or code not in dtypes:
        raise UserError(f"{index_path} is not an int32 or uint8 IndexedDataset of version 1")
    if index.nbytes != _HEADER.size + num_sequences * (4 + 8 + 1) + num_entries * 8:
        raise UserError(f"{index_path} has {index.nbytes} bytes, not what its {num_sequences} sequences need")
    start = _HEADER.size

    def take(kind: Any, count: int) -> np.ndarray:
        nonlocal start
        values: np.ndarray = np.frombuffer(index, kind, count, start) if count else np.zeros(0, kind)
        start += values.nbytes
        return values

    lengths = take(np.dtype(np.int32), num_sequences)
    pointers = take(np.dtype(np.int64), num_sequences)
    documents = take(np.dtype(np.int64), num_entries)
    modes = take(np.dtype(np.int8), num_sequences)
    dtype: Any = dtypes[code]
    needed = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if num_sequences else 0
    size = data.nbytes if blocks is None else blocks.size
    if size != needed:
        raise UserError(f"{data_path} has {size} bytes, its index needs {needed}")
    elements = np.frombuffer(data, dtype) if data.nbytes else np.empty(0, dtype)
    whole = elements if blocks is None else None
    return Indexed(
        lengths, pointers, documents, modes, data_path, np.dtype(dtype), size // dtype.itemsize, whole, blocks
    )
