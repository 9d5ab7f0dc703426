"""Tables of image-text pairs: CSV, TSV, parquet or JSON, a row each; the image by its path, URL, or img2dataset's key.

CSV is RFC 4180: commas, quotes, a header; with tabs for commas too, as pandas and open_clip's users write it. TSV has
no quotes, as CC3M and COYO come. An image's URL is looked up as the store of `fetch` has it (named by its SHA-256), and
as img2dataset's tables say it (URL → key). JSON are lines or one array, of objects whose keys are the columns; one that
a row lacks is null. With `join=none` the rows are texts without images.
"""

from __future__ import annotations

import codecs
import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from megatron_lcl.data.corpus.document import Document, Image, Kind, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Unit, lines
from megatron_lcl.data.prepare.importers.charsets import invalid, mark_of
from megatron_lcl.data.prepare.importers.files import uncompressed
from megatron_lcl.data.prepare.importers.json_rows import array_rows, is_array
from megatron_lcl.data.prepare.importers.lines import (
    JSON,
    NDJSON,
    SUFFIXES,
    LinesImporter,
    is_compressed,
    json_lines,
    line_units,
    text_lines,
)
from megatron_lcl.data.prepare.importers.row_groups import (
    column_names,
    missing_columns,
    row_group_units,
    rows_of_unit,
    some_columns,
)
from megatron_lcl.data.prepare.importers.sources import ImagesByName, as_text, decoded_file, its_id, text_item
from megatron_lcl.data.prepare.importers.url_keys import UrlKeys
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import raise_if_passing

_TEXTS = ("caption", "text", "alt_text", "alt", "title", "description")
_JOINS = {
    "path": ("image", "image_path", "path", "file_name", "filename", "file", "filepath"),
    "key": ("key",),
    "url": ("url", "image_url", "img_url"),
}
"""how an image is found, and the columns that say so by their name, whatever its case"""
_NO_IMAGES = "none"
_FIRST_ROWS = 100
_MAY_BE_QUOTED = "a field of TSV in quotes, which are kept; a table of quoted fields, by tabs, has to be named .csv"


class TableImporter(ImagesByName, LinesImporter):
    """A table or a folder of them: CSV, TSV and JSON lines by 8 MiB, parquet by row groups, other files as a whole."""

    kind: Kind | None = "pairs"
    rules = 4
    reads = (
        ".csv, .tsv (also .gz, .zst), .parquet, else .jsonl, .ndjson, else .json, with a column of texts and one of "
        "the images' paths, URLs or img2dataset keys; images in --images, a folder or tars, else beside the table or "
        "the input"
    )
    suffixes = (".csv", ".csv.gz", ".csv.zst", ".tsv", ".tsv.gz", ".tsv.zst", ".parquet")
    later = ((*SUFFIXES, *NDJSON), JSON)

    def __init__(
        self,
        input: Path,
        images: Path | None = None,
        text_column: Annotated[str, f"column of the texts; empty: the first of {', '.join(_TEXTS)}"] = "",
        image_column: Annotated[
            str, "column that says which image; empty: the first named like a path, a key or a URL"
        ] = "",
        join: Annotated[
            str,
            "what that column holds: path, key (of img2dataset) or url; empty: as its name says, else path; none: the "
            "rows have no images, only texts",
        ] = "",
        columns: Annotated[str, "names of the columns, with commas, of CSV and TSV without a header"] = "",
        encoding: Annotated[
            str,
            "charset of CSV and TSV, as Python calls it, such as gb18030, cp932, cp1252; UTF-16 is known by its mark",
        ] = "utf-8",
    ) -> None:
        if join not in ("", *_JOINS, _NO_IMAGES):
            raise UserError(f"--option join={join}: give {', '.join(_JOINS)} or {_NO_IMAGES}")
        if join == _NO_IMAGES and (images is not None or image_column):
            raise UserError(f"--option join={join}: the rows are read without images; leave out --images, image_column")
        self.encoding = _known(encoding)
        super().__init__(input)
        self.given = [name.strip() for name in columns.split(",")] if columns else []
        self.text, self.image, self.join = text_column, image_column, join
        beside = None if join == _NO_IMAGES else self.root
        self.look_in(images, beside)
        self.keys = UrlKeys(images or beside, self.images.archives)
        self.images.is_given |= bool(self.keys.folders)  # of img2dataset
        self._arrays = frozenset(file for file in self.files if _is_json(file) and is_array(file))
        self._marked = frozenset(file for file in self.files if _begins_with_mark(file))
        self._tabs = frozenset(file for file in self.files if _is_csv(file) and self._has_tabs(file))
        self.rules += bool(self._marked) + bool(self._tabs)  # earlier releases read UTF-8 and commas
        self.beside = [*self.images.archives, *self.keys.tables]
        found = ((file, names) for file in self.files if (names := self._header(file)) is not None)
        if (first := next(found, None)) is not None:
            self._choose_columns(*first)
        elif empty := [file for file in self.files if _is_json(file)]:
            raise UserError(f"{empty[0]}: no row that is a JSON object with keys is among its first {_FIRST_ROWS}")
        if self.join == _NO_IMAGES:
            self.kind = "natural"
        self._own_folders = images is None and self.join == "path"
        self.rules += self._own_folders and any("/" in name for name in self.found.names)  # earlier: the input's alone

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        if self.join == "url":
            self.keys.prepare(folder)

    def _choose_columns(self, file: Path, names: Sequence[str]) -> None:
        has = f"it has {some_columns(names)}"
        if any("\ufffd" in name for name in names):
            has += f" (which is not {self._charset(file)}: name its charset with --option encoding=NAME)"
        for option, name in (("text_column", self.text), ("image_column", self.image)):
            if name and name not in names:
                raise UserError(f"--option {option}={name}: {file} has no such column; {has}")
        lower = {name.lower(): name for name in reversed(names)}
        if not self.text:
            self.text = next((lower[name] for name in _TEXTS if name in lower), "")
            if not self.text:
                raise UserError(f"{file} has no column of texts; {has}: name it with --option text_column=NAME")
        if self.join == _NO_IMAGES:
            self.chosen = f"texts of column {self.text}"
            return
        wanted = [self.join] if self.join else list(_JOINS)
        if not self.image:
            self.image = next((lower[name] for join in wanted for name in _JOINS[join] if name in lower), "")
            if not self.image:
                raise UserError(
                    f"{file} has no column of images; {has}: name it with --option image_column=NAME, or, of texts "
                    f"alone, give --option join={_NO_IMAGES}"
                )
        if file.suffix == ".parquet" and _holds_images(file, self.image):
            raise UserError(
                f"{file}: column {self.image} holds images, and format table reads their paths, URLs or keys; give "
                f"--format hf --option image_column={self.image}"
            )
        self.join = self.join or next((join for join in _JOINS if self.image.lower() in _JOINS[join]), "path")
        self.chosen = f"images by the {self.join} in column {self.image}, texts of column {self.text}"

    def _header(self, file: Path) -> list[str] | None:
        """The columns of a file; None where it cannot be read."""
        if file.suffix == ".parquet":
            return column_names(file)
        drops = Drops()
        unit = Unit(file.name, 0, (file, 0, file.stat().st_size))
        if _is_json(file):
            first = (row for _, row in itertools.islice(self._objects(unit, drops), _FIRST_ROWS))
            return list(dict.fromkeys(itertools.chain(*first))) or None
        if self.given:
            return self.given
        return next((fields for _, fields, _ in self._records(unit, drops)), None)

    def _charset(self, file: Path) -> str:
        return "utf-16" if file in self._marked else self.encoding

    def _has_tabs(self, file: Path) -> bool:
        """Whether the fields of a CSV file are separated by tabs: by them more of its first rows have as many as there
        are columns."""

        def fitting(delimiter: str) -> int:
            unit = Unit(file.name, 0, (file, 0, file.stat().st_size))
            rows = itertools.islice(_records(unit, delimiter, self._charset(file), Drops()), 100)
            sizes = [len(fields) for _, fields, _ in rows]
            columns = len(self.given) or next(iter(sizes), 0)
            return sizes.count(columns) if columns > 1 else 0

        return fitting("\t") > fitting(",")

    def _records(self, unit: Unit, drops: Drops) -> Iterator[tuple[str, list[str], int]]:
        file = unit.payload[0]
        delimiter = ("\t" if file in self._tabs else ",") if _is_csv(file) else ""
        return _records(unit, delimiter, self._charset(file), drops)

    def _objects(self, unit: Unit, drops: Drops) -> Iterator[tuple[str, dict[str, Any]]]:
        return (array_rows if unit.payload[0] in self._arrays else json_lines)(unit, drops)

    def units_of_files(self) -> list[Unit]:
        units: list[Unit] = []
        for file in self.files:
            name, size = self.found.name(file), file.stat().st_size
            if file.suffix == ".parquet":
                units += row_group_units(file, name)
            elif file in self._arrays or (_is_wide(self._charset(file)) and not _is_json(file)):
                units.append(Unit(name, size, (file, 0, size)))
            elif _is_csv(file) and not is_compressed(file):  # a quoted field may hold line ends
                units += [Unit(name, end - start, (file, start, end)) for start, end in self._csv_ranges(file, size)]
            else:
                units += line_units([file], self.found.name)
        return units

    def _csv_ranges(self, file: Path, size: int) -> Iterator[tuple[int, int]]:
        """A file's bytes in parts of `RANGE` and more that begin at records.

        Found by the reader that reads them, as only that knows for any file, be it against the rules, which quotes hold
        line ends: so a part is read as if all had been.
        """
        start = 0
        if size > lines.RANGE:
            for label, _, _ in self._records(Unit("", size, (file, 0, size)), Drops()):
                position = int(label.removeprefix("@"))
                if position - start >= lines.RANGE:
                    yield start, position
                    start = position
        yield start, size

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        file = unit.payload[0]
        if file.suffix == ".parquet":
            yield from self._parquet(unit, drops)
            return
        if _is_json(file):
            for name, row in self._objects(unit, drops):
                yield self._document({**dict.fromkeys(self._needed), **row}, file, name, drops)
            return
        names = self._header(file)
        if names is None:
            drops.bad("document", "no header, the file is empty or cannot be read", unit.name)
            return
        first = unit.payload[1] == 0
        if fault := missing_columns(names, self._needed):
            if first:
                drops.bad("document", fault, unit.name)
            return
        records = self._records(unit, drops)
        if first and not self.given:
            next(records, None)
        for name, fields, num_lines in records:
            if len(fields) == len(names):
                yield self._document(dict(zip(names, fields, strict=True)), file, name, drops)
            else:
                drops.bad("document", "another number of fields than columns", name, num_lines, sample=" ".join(fields))

    def _parquet(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        file = unit.payload[0]
        name = self.found.name(file)
        for row, values in rows_of_unit(
            unit, name, self._needed, drops, lambda column: column.lower() in ("url", "id"), 1024
        ):
            yield self._document(values, file, f"{name}:{row}", drops)

    @property
    def _needed(self) -> list[str]:
        return [self.text, *([self.image] if self.join != _NO_IMAGES else [])]

    def _document(self, row: dict[str, Any], file: Path, name: str, drops: Drops) -> Document:
        values = {key: as_text(value, name, drops) for key, value in row.items()}
        items: list[Text | Image] = []
        if self.join != _NO_IMAGES:
            image = values[self.image]
            try:
                items.append(Image(self._read(image, file), name=str(image)))
            except BadImage as error:
                drops.bad("image", str(error), f"{name}: {str(image)[:200]}")
        items.append(text_item(values[self.text], name, drops))
        about = its_id({key.lower(): value for key, value in values.items()}, name, drops)
        return Document(tuple(items), name=name, metadata={**about, "lost_images": len(self._needed) - len(items)})

    def _read(self, value: Any, file: Path) -> bytes:
        if value is None or value == "" or isinstance(value, bool | list | dict):
            raise BadImage("no name")
        name, near = str(value), (self.stem(file),)
        if self.join == "path":
            folder, _, _ = self.found.name(file).rpartition("/") if self._own_folders else ("", "", "")
            return self.images.read(name, near, folder)
        if self.join == "key":
            own = near if self.images.has_archive(*near) else self.keys.shards_of_key(name)
            return self.images.read(self.keys.names_of_key(name), own)
        return self.images.read([name, *self.keys.names(name)], near)


def _is_json(file: Path) -> bool:
    return uncompressed(file.name).lower().endswith((".jsonl", ".ndjson", ".json"))


def _is_csv(file: Path) -> bool:
    return ".csv" in (suffix.lower() for suffix in file.suffixes[-2:]) and not _is_json(file)


def _looks_quoted(field: str) -> bool:
    """Whether a field is as writers of CSV quote one that has quotes itself."""
    within = field[1:-1]
    return field[:1] == field[-1:] == '"' and '""' in within and '"' not in within.replace('""', "")


def _known(charset: str) -> str:
    """The name that Python's codecs have for a charset. UserError where there is none."""
    try:
        bytes(range(256)).decode(charset, "replace")  # not one that is no charset of texts, as rot13
        if (name := codecs.lookup(charset).name) == "punycode":  # which takes any bytes from Python 3.14 on
            raise LookupError(name)
        return name
    except (LookupError, ValueError):
        raise UserError(
            f"--option encoding={charset}: Python knows no such charset; give one such as utf-8, gb18030, cp932, cp1252"
        ) from None


def _is_wide(charset: str) -> bool:
    """Whether a line end is not the one byte of ASCII's."""
    return b"\n".decode(charset, "replace") != "\n"


def _begins_with_mark(file: Path) -> bool:
    """Whether a file that is not compressed begins with the byte order mark of UTF-16."""
    if is_compressed(file) or file.suffix == ".parquet" or _is_json(file):
        return False
    try:
        with file.open("rb") as opened:
            return mark_of(opened.read(4))[1].startswith("utf-16")
    except OSError as error:
        raise_if_passing(error, file)
        return False


def _holds_images(file: Path, column: str) -> bool:
    """Whether a column of a parquet file has bytes that are no name, or is of structs or lists, by its first values."""
    unit = next(iter(row_group_units(file, "")), None)
    rows = () if unit is None else rows_of_unit(unit, "", [column], Drops(), batch=1)
    value = next((row[column] for _, row in itertools.islice(rows, 100) if row[column] is not None), None)
    return isinstance(value, dict | list) or (isinstance(value, bytes) and b"\0" in value)


def _records(unit: Unit, delimiter: str, charset: str, drops: Drops) -> Iterator[tuple[str, list[str], int]]:
    """(name, fields, lines) of each row of a unit, the header among them; blank lines are none.

    A bad row counts as many as its lines: one with a quote that is never closed takes the rest of the file.

    delimiter: of fields that may be quoted; empty: tabs, and no quotes.
    """
    labels: list[str] = []
    wide = charset if _is_wide(charset) else ""

    def read() -> Iterator[str]:
        for label, raw, _ in text_lines(unit, drops, wide):
            labels.append(label)
            text = decoded_file(raw, label, drops, "utf-8" if wide else charset)
            if wide and "\ufffd" in text:
                drops.note("document", invalid(wide), label)
            yield text.removesuffix("\n") + "\n"  # what stands before it may be in quotes

    if not delimiter:
        for text in read():
            if line := text.rstrip("\r\n"):
                fields = line.split("\t")
                if any(map(_looks_quoted, fields)):
                    drops.note("document", _MAY_BE_QUOTED, labels[-1])
                yield labels[-1], fields, 1
            labels.clear()
        return
    reader = csv.reader(read(), delimiter=delimiter)
    while True:
        labels.clear()
        try:
            fields = _next_row(reader)
        except StopIteration:
            return
        except csv.Error as error:
            drops.bad("document", "a row that is no CSV", labels[0], len(labels), sample=str(error))
            continue
        if fields:
            yield labels[0], fields, len(labels)


def _next_row(reader: Iterator[list[str]]) -> list[str]:
    """With fields as long as a line may be. The limit of `csv`, 128 Ki characters, is the whole process's, so it is set
    for this row only: behind a field that is over it the rest would be read as rows."""
    limit = csv.field_size_limit(lines.MAX_LINE)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(limit)
