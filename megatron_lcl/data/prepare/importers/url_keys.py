"""img2dataset's keys → names of files, and URLs → keys, from the tables that it leaves beside its tars or folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import xxhash

from megatron_lcl.data.prepare.importers.row_groups import DAMAGE, batches, opened
from megatron_lcl.data.prepare.importers.sorted_runs import SortedRuns
from megatron_lcl.data.prepare.importers.urls import EXTENSIONS
from megatron_lcl.filesystem import is_dir, matching, raise_if_passing

_WIDTH = 48
"""a key is its number, below 2^48, and above it how many digits it has"""
_SHARD_DIGITS, _SAMPLE_DIGITS = 5, 4
"""img2dataset's defaults: a key is the digits of the shard (DataComp's have 8), and those of the sample in it"""


class UrlKeys(SortedRuns):
    """Keys of URLs below `root`, and where the images of keys are. Each column is a URL's XXH3 and its key.

    tars: those in `root`. A shard has as many digits as a tar, a table or a folder that is named by its number; these
    are `tables` and `folders`.
    """

    def __init__(self, root: Path | None, tars: Sequence[Path]) -> None:
        folder = root if root is not None and is_dir(root) else None
        self.tables = matching(folder, "*.parquet") if folder is not None else []
        numbered = matching(folder, "*[0-9]") if folder is not None else []
        self.folders = [path for path in numbered if path.name.isdecimal()]
        found = {len(path.stem) for path in (*tars, *self.tables, *self.folders) if path.stem.isdecimal()}
        self._digits = list(dict.fromkeys([_SHARD_DIGITS, *sorted(found)]))
        super().__init__(self.tables, "keys-of-urls", 2)

    def columns(self) -> Iterator[tuple[int, int]]:
        for url, key in (pair for table in self.tables for pair in _pairs(table)):
            yield _digest(url), len(key) << _WIDTH | int(key)

    def names(self, url: str) -> list[str]:
        """Names of files that may hold the image of a URL."""
        found = []
        for (packed,) in self.find(_digest(url)):
            found += self.names_of_key(f"{packed & (1 << _WIDTH) - 1:0{packed >> _WIDTH}d}")
        return found

    def names_of_key(self, key: str) -> list[str]:
        """Names of files that img2dataset may have given the image of a key: in tars, or in a folder per shard."""
        places = self._places(key)
        names = [(shard, key + extension) for shard, key in places for extension in dict.fromkeys(EXTENSIONS.values())]
        return [*(name for _, name in names), *(f"{shard}/{name}" for shard, name in names)]

    def shards_of_key(self, key: str) -> set[str]:
        """Names, without extension, of the tars that may hold the image of a key."""
        return {shard for shard, _ in self._places(key)}

    def _places(self, key: str) -> list[tuple[str, str]]:
        """(shard, key with all of its zeros) that a key may mean. A number has lost the zeros before it."""
        is_number = key.isdecimal() and (key[0] != "0" or len(key) < _SHARD_DIGITS + _SAMPLE_DIGITS)
        widths = [(digits, digits + _SAMPLE_DIGITS if is_number else 0) for digits in self._digits]
        keys = [(digits, whole) for digits, width in widths for whole in (key, key.zfill(width))]
        return [(whole[:digits], whole) for digits, whole in dict.fromkeys(keys)]


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
    except DAMAGE as error:
        raise_if_passing(error, table)
        return  # its images are missing then
