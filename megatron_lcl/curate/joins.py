"""Rules over the whole corpus: each notes of a range of documents what it wants to know in pass 1, then they decide.

A `Join` is all that such a rule has to be. The joins of a run are independent of each other: each sees what the rules
of single items left, and what several remove is counted with the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_lcl.curate.documents import Gone, Range, places
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.prepare.sorting import sorted_rows

REMOVED = pa.schema([("document", pa.int64()), ("item", pa.int32()), ("value", pa.float64()), ("matched", pa.string())])
"""what a join removes: number of the document, of the item in it (-1: the whole document), what the rule measured, and
the name of what it is like, if it is removed for that"""
_AT_ONCE = 1 << 23
"""images whose hashes are counted in memory together"""
_SMALLEST = 1000
"""rows that take about as much memory as a table does without any"""
_PLACES = pa.schema([("xxh3", pa.binary(16)), ("places", pa.int64())])


class Join(Protocol):
    """A rule over the whole corpus. Picklable; one object a run, used by many processes."""

    @property
    def rule(self) -> str:
        """Its name, `section.field`: section says of what it removes (image, text, document)."""
        ...

    @property
    def threshold(self) -> Any: ...

    @property
    def facts_of(self) -> str:
        """Joins that say the same here want the same facts, which are then written once, by the first."""
        ...

    def prepare(self, folder: Path, workers: int) -> None:
        """Write what it needs beside the corpus, once, before all else, into an empty folder (`prepared` below)."""
        ...

    def facts(self, corpus: Corpus, task: Range, gone: Gone, file: Path, prepared: Path) -> None:
        """Write what it wants to know of a range of documents, without the items that are gone, into a new file."""
        ...

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        """Tables of schema `REMOVED`, ordered by document and item, from the facts of all documents.

        facts: the file of each range, in the order of the documents. scratch: an empty folder for what does not fit in
        memory. The same whatever `workers` is.
        """
        ...


@runtime_checkable
class Matching(Protocol):
    """A join that also says to which text each image is matched."""

    def matches(self, file: Path) -> dict[int, dict[int, tuple[float, int]]]:
        """Of a file of facts: similarity and number of the text, by document and item."""
        ...


class Places:
    """Images whose bytes stand in more than so many places of the corpus are removed from all of them.

    OBELICS (arXiv 2306.16527, A.3) counts URLs, MINT-1T (2406.11271) SHA-256; here it is the XXH3-128 of the bytes.
    """

    rule = facts_of = "image.max_places"

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold

    def prepare(self, folder: Path, workers: int) -> None:
        """It needs nothing."""

    def facts(self, corpus: Corpus, task: Range, gone: Gone, file: Path, prepared: Path) -> None:
        """Document, item and hash of every image."""
        document, item, shown = places(corpus, task, gone)
        digests = corpus.shard(task.shard).image_xxh3[shown]
        columns = {
            "document": pa.array(document),
            "item": pa.array(item),
            "xxh3": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(digests), [None, pa.py_buffer(digests)]),
        }
        pq.write_table(pa.table(columns), file, compression="zstd")

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        """In memory: the hashes that are counted together, and those of the images that are removed. In `scratch`: 16
        bytes a place, where there are more."""
        hashes = (_as_numbers(read_table(file, columns=["xxh3"])["xxh3"]) for file in facts)
        parts = sorted_rows(hashes, _AT_ONCE, scratch / "hashes")
        too_many = pa.concat_tables([_PLACES.empty_table(), *map(self._too_many, parts)])
        wide = pa.large_binary()  # Arrow looks up at most 2 GiB of the narrow ones, which are 134 million
        known = too_many["xxh3"].combine_chunks().cast(wide)
        for tables in _together(facts):  # as each lookup hashes all of `known` first
            found_in_all = pc.index_in(pa.concat_tables(tables)["xxh3"].cast(wide), known)
            start = 0
            for table in tables:
                found = found_in_all.slice(start, len(table))
                start += len(table)
                chosen = table.append_column("value", pc.take(too_many["places"], found)).filter(pc.is_valid(found))
                chosen = chosen.append_column("matched", pa.repeat("", len(chosen)))
                yield chosen.select(REMOVED.names).cast(REMOVED)

    def _too_many(self, hashes: np.ndarray) -> pa.Table:
        """Of all places of some hashes, uint64 [N, 2], those that stand too often, and how often (_PLACES)."""
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(hashes), [None, pa.py_buffer(hashes)])
        counted = pa.table({"xxh3": column}).group_by("xxh3").aggregate([([], "count_all")])
        return counted.rename_columns(["xxh3", "places"]).filter(pc.field("places") > self.threshold)


def _together(facts: Sequence[Path]) -> Iterator[list[pa.Table]]:
    """The tables of all files in their order, as many together as have about _AT_ONCE rows."""
    waiting: list[pa.Table] = []
    num = 0
    for file in facts:
        waiting.append(read_table(file))
        num += max(len(waiting[-1]), _SMALLEST)
        if num >= _AT_ONCE:
            yield waiting
            waiting, num = [], 0
    if waiting:
        yield waiting


def _as_numbers(hashes: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N, 2] of 16 bytes each."""
    array = hashes.combine_chunks()
    if not len(array):
        return np.empty((0, 2), np.uint64)
    return np.frombuffer(array.buffers()[1], np.uint64, 2 * len(array), 16 * array.offset).reshape(-1, 2)
