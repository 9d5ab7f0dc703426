"""An image store: tar shards, and beside each a table of every URL that it accounts for. What is written when:

1. While a part is fetched, its images are appended to `PART.partial`, a tar, and after each image a row to `PART.log`:
   first the image, then the row that says where it ends. A process that is killed leaves at most an image without a
   row. Whoever goes on reads the rows, compares the images with their hashes, cuts both files after the last row whose
   image is whole, and goes on there.
2. A shard is complete when it has `shard_urls` rows, or its part has no more URLs. Then the tar is ended, put on disk
   and renamed to `PART-NUMBER.tar`, then its table `PART-NUMBER.parquet` is renamed into place: with it the shard is
   there. Last the log is removed. Killed between, the tar is taken back and the shard completed anew from the log.

So a URL is in one table or in the log, or still to be fetched, at every moment.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lcl.data.corpus.files import sync
from megatron_lcl.data.prepare.importers.urls import EXTENSIONS, url_key
from megatron_lcl.errors import naming

Status = Literal["kept", "dead", "refused"]
SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.dictionary(pa.int8(), pa.string())),
        ("reason", pa.string()),
        ("sha256", pa.string()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


class Row(msgspec.Struct, array_like=True, frozen=True):
    """What became of a URL."""

    url: str
    status: Status
    reason: str = ""
    """why it is not kept"""
    sha256: str = ""
    """of the stored bytes, hexadecimal"""
    size: int = 0
    """stored bytes"""
    width: int = 0
    height: int = 0
    """pixels, as shown"""
    format: str = ""
    """Pillow's name"""


class _Logged(msgspec.Struct, array_like=True, frozen=True):
    row: Row
    end: int
    """of the tar so far, bytes"""


class PartStore:
    """The shards of one part. `done`: keys of the URLs that need not be fetched any more."""

    def __init__(self, folder: Path, part: int, shard_urls: int) -> None:
        self._folder, self._part, self._shard_urls = folder, part, shard_urls
        self._partial, self._log = folder / f"{part:05d}.partial", folder / f"{part:05d}.log"
        tables = part_tables(folder, part)
        self._number = len(tables)
        self.done: set[str] = set()
        for table in tables:
            self.done.update(pq.read_table(table, columns=["key"], use_threads=False)["key"].to_pylist())
        self._rows: list[Row] = []
        self._tar, self._log_file = self._resume()
        self.resumed = len(self._rows)
        """URLs that the incomplete shard accounts for"""
        self.done.update(url_key(row.url) for row in self._rows)

    def add(self, row: Row, data: bytes = b"") -> None:
        """Account for a URL, with the image if it is kept."""
        key = url_key(row.url)
        assert key not in self.done, row.url
        assert (row.status == "kept") == bool(data)
        if len(self._rows) == self._shard_urls:
            self._complete()
        if data:
            _append(self._tar, self._partial, _member(key + EXTENSIONS.get(row.format, ".bin"), data))
        _append(self._log_file, self._log, msgspec.json.encode(_Logged(row, self._tar.tell())) + b"\n")
        self._rows.append(row)
        self.done.add(key)

    def finish(self) -> None:
        """All URLs of the part are accounted for."""
        if self._rows:
            self._complete(last=True)
        else:
            self.close()
            self._partial.unlink(missing_ok=True)
            self._log.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave it, to be gone on with."""
        self._tar.close()
        self._log_file.close()

    def _complete(self, last: bool = False) -> None:
        tar, table = (self._folder / f"{self._part:05d}-{self._number:05d}{suffix}" for suffix in (".tar", ".parquet"))
        _append(self._tar, self._partial, _END_OF_TAR)
        self.close()
        sync(self._partial)
        unfinished = table.with_suffix(".table")
        with naming(unfinished):
            pq.write_table(_table(self._rows), unfinished, compression="zstd")
        sync(unfinished)
        os.rename(self._partial, tar)
        os.rename(unfinished, table)
        sync(self._folder)
        self._log.unlink()
        self._rows = []
        self._number += 1
        if not last:
            self._tar, self._log_file = self._resume()

    def _resume(self) -> tuple[FileIO, FileIO]:
        """Open the incomplete shard, cut after the last row whose image is whole."""
        tar = self._folder / f"{self._part:05d}-{self._number:05d}.tar"
        if tar.exists():  # its table was not renamed into place
            os.rename(tar, self._partial)
        if self._number and not self._partial.exists():  # the log is of a shard that is complete
            self._log.unlink(missing_ok=True)
        # unbuffered: what is written is in the file at once, and what failed is not tried again when it is closed
        log, partial = open(self._log, "a+b", 0), open(self._partial, "a+b", 0)  # noqa: SIM115
        log.seek(0)
        partial.seek(0)
        length, end = 0, 0
        for line in log.read().splitlines(keepends=True):
            try:
                logged = msgspec.json.decode(line, type=_Logged)
            except msgspec.DecodeError:
                break
            if not line.endswith(b"\n") or not _is_whole(partial, logged, end):
                break
            self._rows.append(logged.row)
            length, end = length + len(line), logged.end
        log.truncate(length)
        partial.truncate(end)
        log.seek(length)
        partial.seek(end)
        return partial, log


def part_tables(folder: Path, part: int) -> list[Path]:
    """The tables of a part's complete shards, in order."""
    return sorted(folder.glob(f"{part:05d}-*.parquet"))


def tables(folder: Path) -> list[Path]:
    """The tables of all complete shards."""
    return sorted(folder.glob("[0-9]*-[0-9]*.parquet"))


def num_done(folder: Path, part: int) -> int:
    """URLs that a part's complete shards account for."""
    return sum(pq.read_metadata(table).num_rows for table in part_tables(folder, part))


def read_rows(folder: Path) -> Iterator[dict[str, object]]:
    """Every row of the tables of a store: the columns of `SCHEMA`."""
    for table in tables(folder):
        for batch in pq.ParquetFile(table).iter_batches(4096):
            yield from batch.to_pylist()


def _append(file: FileIO, path: Path, data: bytes) -> None:
    with naming(path):
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def _member(name: str, data: bytes) -> bytes:
    """A file of a tar: header, content, padding. The same for the same content: no time, no owner."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _is_whole(partial: FileIO, logged: _Logged, start: int) -> bool:
    """Whether the image of a row lies in the tar from `start` to where the row says."""
    size = logged.row.size
    padded = tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE if logged.row.status == "kept" else 0
    if logged.end - start != padded:
        return False
    if not padded:
        return True
    partial.seek(start)
    content = partial.read(padded)
    if len(content) != padded:
        return False
    data = content[tarfile.BLOCKSIZE :][:size]
    return hashlib.sha256(data).hexdigest() == logged.row.sha256


def _table(rows: list[Row]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names if name != "key"}
    columns["key"] = [url_key(row.url) for row in rows]
    return pa.table({name: pa.array(columns[name], type=SCHEMA.field(name).type) for name in SCHEMA.names})
