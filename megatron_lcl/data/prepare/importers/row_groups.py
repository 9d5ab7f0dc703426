"""Parquet files, a unit each row group: rows as they come, damage counted, a table without the columns told apart."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.files import FilesImporter
from megatron_lcl.data.storage.paths import ObjectPath
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import raise_if_passing

_BATCH = 64
_BATCH_BYTES = 256 << 20
"""a batch holds no more in the mean of values that stand in a dictionary of the file"""
_NAMED, _NAME = 12, 40
"""columns of a table that an error names, and characters of each: what is no table has all of its text in one"""
_DICTIONARY_PAGE = re.compile(rb"\x15\x04\x15([\x80-\xff]*[\x00-\x7f])", re.DOTALL)
"""a page's header begins with its type and its uncompressed bytes (Apache Parquet's format, parquet.thrift): numbers in
Thrift's compact protocol, zigzag in bytes of seven bits, the lowest first"""
Row = tuple[int, list[Any]]
"""(its number in the file, its values)"""


class ParquetImporter(FilesImporter):
    """A parquet file or a folder of them; a row group is a unit."""

    suffixes = (".parquet",)
    reads_objects = True
    needed: ClassVar[tuple[str, ...]]
    """columns without which a file is bad"""

    def __init__(self, input: Path) -> None:
        """UserError also where no file that can be read has the columns."""
        super().__init__(input)
        fault = ""
        for file in self.found.paths():
            if (names := column_names(file)) is None:
                continue
            if not (wrong := missing_columns(names, self.needed)):
                return
            fault = fault or f"{file}: {wrong}. The format reads: {self.reads}"
        if fault:
            raise UserError(fault)

    def units_of_files(self) -> list[Unit]:
        units: list[Unit] = []
        for file in self.files:
            units += row_group_units(file, self.found.name(file))
        return units


DAMAGE = (pa.ArrowException, OSError, ValueError)
"""what pyarrow raises for damaged files"""


def row_group_units(file: Path, name: str) -> list[Unit]:
    """A unit for each row group. Payload: (path, row group, its first row, its last + 1); row group -1 for a file
    that cannot be read."""
    size = file.stat().st_size
    try:
        metadata = pq.read_metadata(opened(file))
        num_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except DAMAGE as error:
        raise_if_passing(error, file)
        return [Unit(name, size, (file, -1, 0, 0))]
    units, first = [], 0
    for group, rows in enumerate(num_rows):
        units.append(Unit(f"{name}:{first}", size // len(num_rows), (file, group, first, first + rows)))
        first += rows
    return units


def open_parquet(file: Path, group: int = 0) -> pq.ParquetFile:
    """The file, of a unit of this row group; one of DAMAGE where it is none."""
    if group < 0:
        raise pa.ArrowInvalid
    # buffered: else a row group's column is read whole, however large
    return pq.ParquetFile(opened(file), buffer_size=1 << 20, pre_buffer=False)


def opened(file: Path) -> Path | BinaryIO:
    """What pyarrow takes for a file: its path, or an object, opened."""
    return cast(BinaryIO, file.open("rb", 0)) if isinstance(file, ObjectPath) else file


def column_names(file: Path) -> list[str] | None:
    """The columns of a parquet file; None where it cannot be read."""
    try:
        return pq.read_schema(opened(file)).names
    except DAMAGE as error:
        raise_if_passing(error, file)
        return None


def count_damage(unit: Unit, row: int, stop: int, name: str, drops: Drops) -> None:
    """Count what is lost of a unit from `row` on."""
    if unit.payload[1] < 0:
        drops.bad("document", "damaged parquet file", name)
    else:
        drops.bad("document", "lost in a damaged parquet file", f"{name}:{row}", max(1, stop - row))


def rows_of_unit(
    unit: Unit,
    name: str,
    needed: Sequence[str],
    drops: Drops,
    more: Callable[[str], bool] = lambda column: False,
    batch: int = _BATCH,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(its number, its values by column) of each row of a row group; what is damaged is counted.

    more: which columns are read besides the needed ones. Documents are made outside of this, where an error that has
    to do with other files, as those of images, is not taken for damage of the table.
    """
    file, group, first, stop = unit.payload
    row = first
    try:
        with open_parquet(file, group) as source:
            columns = columns_to_read(source.schema_arrow.names, needed, more, name, drops)
            for row, values in read_rows(file, source, [group], first, columns, batch) if columns else ():
                yield row, dict(zip(columns, values, strict=True))
                row += 1
    except DAMAGE as error:
        raise_if_passing(error, file)
        count_damage(unit, row, stop, name, drops)


def columns_to_read(
    names: Sequence[str], needed: Sequence[str], more: Callable[[str], bool], name: str, drops: Drops
) -> list[str]:
    """The needed columns, then `more` of those that are there once; none, and counted, where a needed one is not."""
    if fault := missing_columns(names, needed):
        drops.bad("document", fault, name)
        return []
    return list(dict.fromkeys([*needed, *(column for column in names if more(column) and names.count(column) == 1)]))


def read_rows(
    file: Path,
    source: pq.ParquetFile,
    groups: Sequence[int],
    first: int,
    columns: Sequence[str],
    batch: int = _BATCH,
) -> Iterator[Row]:
    """The rows of some row groups, read as they are needed. first: number of the first one."""
    row = first
    for table in batches(file, source, groups, columns, batch):
        for values in zip(*(column_values(table[name]) for name in columns), strict=True):
            yield row, list(values)
            row += 1


def batches(
    file: Path, source: pq.ParquetFile, groups: Iterable[int], columns: Sequence[str], most: int
) -> Iterator[pa.RecordBatch]:
    """The row groups in batches of at most `most` rows, of fewer where these would be much larger than in the file.

    A value that stands once in a row group's dictionary is copied for each row that has it: of a file of 1 kB, to a
    gigabyte. source: `file`, opened.
    """
    for group in groups:
        about = source.metadata.row_group(group)
        chunks = [chunk for chunk in map(about.column, range(about.num_columns)) if chunk.physical_type == "BYTE_ARRAY"]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
        repeats = [-(-chunk.num_values // max(1, about.num_rows)) for chunk in chunks]
        sizes = [chunk.total_uncompressed_size for chunk in chunks]
        # where all of the columns is less, no value of them is more
        if most * sum(map(operator.mul, repeats, sizes)) > _BATCH_BYTES:
            with file.open("rb", 0) as raw:
                sizes = [_dictionary_bytes(raw, chunk) for chunk in chunks]
        rows = _BATCH_BYTES // max(1, sum(map(operator.mul, repeats, sizes)))
        yield from source.iter_batches(max(1, min(most, rows)), [group], columns=list(columns), use_threads=False)


def _dictionary_bytes(file: BinaryIO, chunk: pq.ColumnChunkMetaData) -> int:
    """Of a column's dictionary in a row group, uncompressed; 0 where its first page is none. What is damaged shows as
    it is read."""
    file.seek(max(0, chunk.dictionary_page_offset or chunk.data_page_offset))
    header = _DICTIONARY_PAGE.match(file.read(16))
    return sum((byte & 127) << 7 * k for k, byte in enumerate(header[1])) >> 1 if header else 0


def column_values(column: pa.Array) -> list[Any]:
    """The column's rows; a string that is not UTF-8, be it in a list or a struct, as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        pass
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(field) for name, field in scalar.items()}
    if isinstance(scalar, pa.ListScalar):
        return [_value(item) for item in scalar.values]
    if hasattr(scalar, "value"):  # what wraps another: of a dictionary, an extension as JSON, runs of equal values
        return _value(scalar.value)
    return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else None


def missing_columns(names: Sequence[str], needed: Sequence[str]) -> str:
    """Which of the needed columns are not there, or twice, and which are; "" where all are there once."""
    missing = [name for name in needed if name not in names]
    twice = [name for name in needed if names.count(name) > 1]
    if not missing and not twice:
        return ""
    wrong = f"no column{'s' * (len(missing) > 1)} {' and '.join(missing)}" if missing else f"column {twice[0]} twice"
    return f"{wrong}; it has {some_columns(names)}"


def some_columns(names: Sequence[str]) -> str:
    """The columns of a table, for people."""
    short = [name if len(name) <= _NAME else name[:_NAME] + "…" for name in names[:_NAMED]]
    shown = [name if name.isidentifier() else repr(name) for name in short]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(shown) or "none") + more
