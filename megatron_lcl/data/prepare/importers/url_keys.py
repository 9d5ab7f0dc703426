"""URLs → the keys under which img2dataset stored their images, from the tables that it leaves beside its tars."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megatron_lcl.data.corpus.files import save_array
from megatron_lcl.data.corpus.scratch import put_in_place, scratch_folder
from megatron_lcl.data.prepare.importers.row_groups import opened
from megatron_lcl.data.prepare.importers.urls import EXTENSIONS

_RUN = 1 << 21
"""URLs sorted together: 32 MiB"""
_WIDTH = 48
"""a key is its number, below 2^48, and above it how many digits it has"""
_SHARD_DIGITS = 5
"""img2dataset's: a key is five digits of the shard, and the sample in it"""


class UrlKeys:
    """Keys of URLs below `root`: in files that all processes map, after `prepare`, else in memory."""

    def __init__(self, root: Path | None) -> None:
        self.tables = sorted(root.glob("*.parquet")) if root is not None and root.is_dir() else []
        self._folder: Path | None = None
        self._runs: list[np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runs": None}

    def prepare(self, folder: Path) -> None:
        """Sort the tables into a folder below `folder`, unless it is there."""
        self._folder = folder / "keys-of-urls"
        if self.tables and not self._folder.exists():
            with scratch_folder(folder) as scratch:
                unfinished = scratch / "keys-of-urls"
                unfinished.mkdir()
                for number, run in enumerate(_sorted_runs(self.tables)):
                    save_array(unfinished / f"{number:06d}.npy", run)
                put_in_place(unfinished, self._folder)

    def names(self, url: str) -> list[str]:
        """Names of files that may hold the image of a URL."""
        if self._runs is None:
            if self._folder is None or not self.tables:
                self._runs = list(_sorted_runs(self.tables))
            else:
                self._runs = [np.load(file, mmap_mode="r") for file in sorted(self._folder.glob("*.npy"))]
        digest = np.uint64(_digest(url))
        found = []
        for digests, keys in self._runs:
            first, last = np.searchsorted(digests, digest), np.searchsorted(digests, digest, "right")
            for packed in keys[first:last].tolist():
                found += key_names(f"{packed & (1 << _WIDTH) - 1:0{packed >> _WIDTH}d}")
        return found


def key_names(key: str) -> list[str]:
    """Names of files that img2dataset may have given the image of a key: in tars, or in a folder per shard."""
    keys = [key, key.zfill(9)] if key.isdecimal() and len(key) < 9 else [key]  # a number has lost its zeros
    names = [key + extension for key in keys for extension in dict.fromkeys(EXTENSIONS.values())]
    return [*names, *(f"{name[:_SHARD_DIGITS]}/{name}" for name in names)]


def _digest(url: str) -> int:
    return xxhash.xxh3_64_intdigest(url.encode(errors="replace"))


def _sorted_runs(tables: list[Path]) -> Iterator[np.ndarray]:
    """uint64 [2, n] arrays of up to _RUN URLs, by the URL's XXH3; the second row are the keys."""
    run, length = np.empty((2, _RUN if tables else 0), np.uint64), 0
    for url, key in (pair for table in tables for pair in _pairs(table)):
        run[:, length] = _digest(url), len(key) << _WIDTH | int(key)
        length += 1
        if length == _RUN:
            yield run[:, np.argsort(run[0], kind="stable")]
            length = 0
    yield run[:, np.argsort(run[0, :length], kind="stable")]


def _pairs(table: Path) -> Iterator[tuple[str, str]]:
    """URL and key of each image that a table says is there, as far as it can be read."""
    try:
        with pq.ParquetFile(opened(table)) as file:
            names = file.schema_arrow.names
            if "url" not in names or "key" not in names:
                return
            for batch in file.iter_batches(columns=["url", "key", *(["status"] if "status" in names else [])]):
                for row in batch.to_pylist():
                    url, key = row["url"], row["key"]
                    there = row.get("status", "success") == "success"
                    if there and isinstance(url, str) and isinstance(key, str) and key.isdecimal() and len(key) < 15:
                        yield url, key
    except (pa.ArrowException, OSError, ValueError):
        return  # its images are missing then
