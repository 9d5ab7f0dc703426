"""NeMo Curator's interleaved rows: parquet, a row for each text and image of a document, image bytes inside.

Columns sample_id (string), position (int32; −1 for rows about the document), modality ("text", "image", "metadata", …),
content_type, text_content (string) and binary_content (binary). Source: nemo_curator/tasks/interleaved.py. The rows of
a document stand one after another, as its writer leaves them; they may run on from one row group into the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.row_groups import (
    DAMAGE,
    ParquetImporter,
    Row,
    column_values,
    count_damage,
    missing_columns,
    open_parquet,
    read_rows,
)
from megatron_lcl.data.prepare.importers.sources import as_text, text_item
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import raise_if_passing

_BATCH = 16
"""rows read at once: each may be a large image"""


class NemoImporter(ParquetImporter):
    """A parquet file or a folder of them. A document belongs to the row group in which it begins."""

    kind = "natural"
    rules = 2
    separator = " "
    reads = (
        ".parquet of NeMo Curator: a row for each text and image, with columns sample_id, position, modality, "
        "text_content and binary_content (the image's bytes)"
    )
    needed = ("sample_id", "position", "modality", "text_content", "binary_content")

    def __init__(self, input: Path, images: Path | None = None) -> None:
        if images is not None:
            raise UserError("format nemo has its images in the parquet files; leave out --images")
        super().__init__(input)

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        file, group, row, stop = unit.payload
        name = self.found.name(file)
        try:
            with open_parquet(file, group) as source:
                if fault := missing_columns(source.schema_arrow.names, self.needed):
                    drops.bad("document", fault, name)
                    return
                for sample in self._samples_of(source, unit):
                    row = sample[-1][0] + 1
                    if sample[0][1][0] is None:
                        drops.bad("document", "a row without sample_id", f"{name}:{sample[0][0]}")
                    else:
                        yield _document(sample, f"{name}:{sample[0][0]}", drops)
        except DAMAGE as error:
            raise_if_passing(error, file)
            count_damage(unit, row, stop, name, drops)

    def _samples_of(self, source: pq.ParquetFile, unit: Unit) -> Iterator[list[Row]]:
        file, group, first, stop = unit.payload
        rows = read_rows(file, source, range(group, source.num_row_groups), first, self.needed, _BATCH)
        before = _last_sample(source, group)
        if before is not None:
            rows = itertools.dropwhile(lambda row: row[1][0] == before, rows)
        return _samples(rows, stop)


def _samples(rows: Iterator[Row], stop: int) -> Iterator[list[Row]]:
    """The rows of each document that begins before row `stop`; one without sample_id is by itself."""
    run: list[Row] = []
    for row in rows:
        if run and (row[1][0] is None or row[1][0] != run[0][1][0]):
            yield run
            run = []
        if not run and row[0] >= stop:
            return
        run.append(row)
    if run:
        yield run


def _last_sample(source: pq.ParquetFile, group: int) -> Any:
    """The sample_id of the row before a row group; None before the first row."""
    for earlier in reversed(range(group)):
        if source.metadata.row_group(earlier).num_rows:
            ids = source.read_row_group(earlier, ["sample_id"]).column(0)
            return column_values(ids.slice(len(ids) - 1).combine_chunks())[0]
    return None


def _document(rows: list[Row], name: str, drops: Drops) -> Document:
    values = [row[1] for row in rows]
    if all(isinstance(position, int) for _, position, *_ in values):
        values.sort(key=lambda row: row[1])
    else:
        drops.note("document", "positions that are no numbers: the order of the rows is kept", name)
    items = tuple(_items(values, name, drops))
    lost = sum(modality == "image" for _, _, modality, *_ in values)
    lost -= sum(isinstance(item, Image) for item in items)
    return Document(items, name=name, metadata={"id": str(as_text(values[0][0], name, drops)), "lost_images": lost})


def _items(rows: list[list[Any]], name: str, drops: Drops) -> Iterator[Text | Image]:
    for _, position, modality, text, data in rows:
        if modality == "text":
            yield text_item(text, name, drops)
        elif modality == "image":
            if isinstance(data, bytes) and data:
                yield Image(data, name=f"position {position}")
            else:
                drops.bad("image", "no bytes in binary_content (materialize the images first)", f"{name}: {position}")
        elif modality != "metadata":
            drops.left_out("text", "modality that is neither text nor image", name, sample=str(modality))
