"""URLs → the keys under which img2dataset stored their images, from the tables that it leaves beside its tars."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megatron_lcl.data.prepare.importers.row_groups import batches, opened
from megatron_lcl.data.prepare.importers.sorted_runs import SortedRuns
from megatron_lcl.data.prepare.importers.urls import EXTENSIONS
from megatron_lcl.filesystem import is_dir, matching, raise_if_passing

_WIDTH = 48
"""a key is its number, below 2^48, and above it how many digits it has"""
_SHARD_DIGITS = 5
"""img2dataset's: a key is five digits of the shard, and the sample in it"""


class UrlKeys(SortedRuns):
    """Keys of URLs below `root`. Each column is a URL's XXH3 and its key."""

    def __init__(self, root: Path | None) -> None:
        self.tables = matching(root, "*.parquet") if root is not None and is_dir(root) else []
        super().__init__(self.tables, "keys-of-urls", 2)

    def columns(self) -> Iterator[tuple[int, int]]:
        for url, key in (pair for table in self.tables for pair in _pairs(table)):
            yield _digest(url), len(key) << _WIDTH | int(key)

    def names(self, url: str) -> list[str]:
        """Names of files that may hold the image of a URL."""
        found = []
        for (packed,) in self.find(_digest(url)):
            found += key_names(f"{packed & (1 << _WIDTH) - 1:0{packed >> _WIDTH}d}")
        return found


def key_names(key: str) -> list[str]:
    """Names of files that img2dataset may have given the image of a key: in tars, or in a folder per shard."""
    keys = [key, key.zfill(9)] if key.isdecimal() and len(key) < 9 else [key]  # a number has lost its zeros
    names = [key + extension for key in keys for extension in dict.fromkeys(EXTENSIONS.values())]
    return [*names, *(f"{name[:_SHARD_DIGITS]}/{name}" for name in names)]


def _digest(url: str) -> int:
    return xxhash.xxh3_64_intdigest(url.encode(errors="replace"))


def _pairs(table: Path) -> Iterator[tuple[str, str]]:
    """URL and key of each image that a table says is there, as far as it can be read."""
    try:
        with pq.ParquetFile(opened(table)) as file:
            names = file.schema_arrow.names
            if "url" not in names or "key" not in names:
                return
            columns = ["url", "key", *(["status"] if "status" in names else [])]
            for batch in batches(table, file, range(file.num_row_groups), columns, 65_536):
                for row in batch.to_pylist():
                    url, key = row["url"], row["key"]
                    there = row.get("status", "success") == "success"
                    if there and isinstance(url, str) and isinstance(key, str) and key.isdecimal() and len(key) < 15:
                        yield url, key
    except (pa.ArrowException, OSError, ValueError) as error:
        raise_if_passing(error, table)
        return  # its images are missing then
