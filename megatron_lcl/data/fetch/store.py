"""An image store: shards of images, each with a table of every URL that it accounts for. What is written when:

1. While a part is fetched, its images are appended to `PART.partial`, a tar, and after each image a row to `PART.log`:
   first the image, then the row that says where it ends. A process that is killed leaves at most an image without a
   row. Whoever goes on reads the rows, compares the images with their hashes, cuts both files after the last row whose
   image is whole, and goes on there.
2. A shard is complete when it has `shard_urls` rows, or its part has no more URLs. Of a store of tars, the tar is then
   ended, put on disk and renamed to `PART-NUMBER.tar`, then its table `PART-NUMBER.parquet` is renamed into place: with
   it the shard is there. Of a store of parquet, the table has the images too, and `PART-NUMBER.images.parquet` is
   renamed into place. Last the tar, where it is left, and the log are removed. Killed between, the tar is taken back
   and the shard completed anew from the log; a log whose rows are in a table is left from a complete shard.

So a URL is in one table or in the log, or still to be fetched, at every moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lcl.data.corpus.files import sync
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.fetch.settings import Store
from megatron_lcl.data.prepare.importers.image_tables import (
    GROUP_BYTES,
    GROUP_ROWS,
    IMAGES,
    write_image_table,
)
from megatron_lcl.data.prepare.importers.urls import EXTENSIONS, TABLE_SUFFIX, url_key
from megatron_lcl.errors import UserError, naming
from megatron_lcl.filesystem import exists, matching

Status = Literal["kept", "dead", "refused"]
SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("sha256", pa.string()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
_SCHEMA_WITH_IMAGES = SCHEMA.append(pa.field(IMAGES, pa.binary()))
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
_TWO_WRITERS = (
    "{}: another process has written to the same part, as can happen where locks are kept to one machine (Lustre's "
    "`localflock`, some NFS); end the other `fetch`, and the same command goes on"
)


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

    def __init__(self, folder: Path, part: int, shard_urls: int, store: Store = "tar") -> None:
        self._folder, self._part, self._shard_urls, self._store = folder, part, shard_urls, store
        self._partial, self._log = folder / f"{part:05d}.partial", folder / f"{part:05d}.log"
        tables = part_tables(folder, part)
        self._number = len(tables)
        self.done: set[str] = set()
        for table in tables:
            self.done.update(read_table(table, columns=["key"], use_threads=False)["key"].to_pylist())
        self._rows: list[Row] = []
        self._tar, self._log_file = self._resume()
        self.resumed = len(self._rows)
        """URLs that the incomplete shard accounts for"""
        self.done.update(url_key(row.url) for row in self._rows)
        kept = [row.url for row in self._rows if row.status == "kept"] or (_kept(tables[0]) if tables else [])
        self.kept = kept[0] if kept else None
        """a URL of which the image was had"""

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
        for file, path in ((self._tar, self._partial), (self._log_file, self._log)):
            with naming(path):
                file.close()

    def _complete(self, last: bool = False) -> None:
        shard = self._folder / f"{self._part:05d}-{self._number:05d}"
        unfinished = shard.with_suffix(".table")
        if self._store == "tar":
            _append(self._tar, self._partial, _END_OF_TAR)
            sync(self._partial)
        self.close()
        with naming(unfinished):
            if self._store == "tar":
                pq.write_table(_table(self._rows), unfinished, compression="zstd")
            else:
                write_image_table(unfinished, _with_images(self._rows, self._partial), _SCHEMA_WITH_IMAGES)
        sync(unfinished)
        if self._store == "tar":
            os.rename(self._partial, shard.with_suffix(".tar"))
        os.rename(unfinished, shard.with_suffix(".parquet" if self._store == "tar" else TABLE_SUFFIX))
        sync(self._folder)
        self._partial.unlink(missing_ok=True)
        self._log.unlink()
        self._rows = []
        self._number += 1
        if not last:
            self._tar, self._log_file = self._resume()

    def _resume(self) -> tuple[FileIO, FileIO]:
        """Open the incomplete shard, cut after the last row whose image is whole."""
        tar = self._folder / f"{self._part:05d}-{self._number:05d}.tar"
        if exists(tar):  # its table was not renamed into place
            os.rename(tar, self._partial)
        if self._is_of_complete_shard():
            self._partial.unlink(missing_ok=True)
            self._log.unlink()
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

    def _is_of_complete_shard(self) -> bool:
        """Whether the log's first row is in a table."""
        try:
            with open(self._log, "rb") as log:
                return url_key(msgspec.json.decode(log.readline(), type=_Logged).row.url) in self.done
        except (FileNotFoundError, msgspec.DecodeError):
            return False


def part_tables(folder: Path, part: int) -> list[Path]:
    """The tables of a part's complete shards, in order."""
    return matching(folder, f"{part:05d}-*.parquet")


def tables(folder: Path) -> list[Path]:
    """The tables of all complete shards."""
    return matching(folder, "[0-9]*-[0-9]*.parquet")


def num_done(folder: Path, parts: Iterable[int]) -> dict[int, int]:
    """URLs that the complete shards of each of these parts account for. A folder of 10^5 shards is listed once."""
    names = {f"{part:05d}": part for part in parts}
    done = dict.fromkeys(names.values(), 0)
    for table in tables(folder):
        if (part := names.get(table.name.partition("-")[0])) is not None:
            done[part] += pq.read_metadata(table).num_rows
    return done


def kept_urls(folder: Path) -> Iterator[str]:
    """The URLs of which the image is in a store, also in incomplete shards."""
    complete = tables(folder)
    for table in complete:
        yield from _kept(table)
    for log in matching(folder, "*.log"):
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):  # complete by now; a line being written
            for line in log.read_bytes().splitlines():
                if (row := msgspec.json.decode(line, type=_Logged).row).status == "kept":
                    yield row.url
    for table in sorted(set(tables(folder)).difference(complete)):  # meanwhile
        yield from _kept(table)


def _kept(table: Path) -> list[str]:
    found = read_table(table, columns=["url"], filters=[("status", "=", "kept")], use_threads=False)
    return found["url"].to_pylist()


def _append(file: FileIO, path: Path, data: bytes) -> None:
    """UserError where another process has appended to the file since the last time, or cut it."""
    end = file.tell() + len(data)
    with naming(path):
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
    if file.tell() != end:
        raise UserError(_TWO_WRITERS.format(path))


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


def _with_images(rows: list[Row], partial: Path) -> Iterator[pa.Table]:
    """The table of a shard in row groups, with the images from its tar. UserError where these are not the rows'."""
    with open(partial, "rb") as tar:
        group: list[Row] = []
        images: list[bytes | None] = []
        size = 0
        for row in rows:
            if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                yield _table(group).append_column(_SCHEMA_WITH_IMAGES.field(IMAGES), pa.array(images, pa.binary()))
                group, images, size = [], [], 0
            group.append(row)
            images.append(None)
            if row.status == "kept":
                tar.seek(tarfile.BLOCKSIZE, os.SEEK_CUR)
                data = images[-1] = tar.read(row.size)
                if hashlib.sha256(data).hexdigest() != row.sha256:
                    raise UserError(_TWO_WRITERS.format(partial))
                tar.seek(-row.size % tarfile.BLOCKSIZE, os.SEEK_CUR)
                size += row.size
        yield _table(group).append_column(_SCHEMA_WITH_IMAGES.field(IMAGES), pa.array(images, pa.binary()))


def _table(rows: list[Row]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names if name != "key"}
    columns["key"] = [url_key(row.url) for row in rows]
    return pa.table({name: pa.array(columns[name], type=SCHEMA.field(name).type) for name in SCHEMA.names})
