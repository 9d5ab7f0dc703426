"""Folders of Hugging Face's `datasets`: what `save_to_disk` wrote (Arrow streams), or parquet with Image features.

An image is a struct of `bytes` and `path`, or a list of them. One image and one text of a row are a pair; of one image
and a list of texts each text makes a pair, or with option `captions` all stay together; of two lists one of the two is
not null at each position (interleaved); a list of images stands before a single text. Which columns hold them is said
by the schema's `huggingface` metadata and the types, or by options.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.files import FilesImporter
from megatron_lcl.data.prepare.importers.hf_files import of_data_set, of_split
from megatron_lcl.data.prepare.importers.row_groups import (
    DAMAGE,
    column_values,
    columns_to_read,
    opened,
    row_group_units,
    rows_of_unit,
    some_columns,
)
from megatron_lcl.data.prepare.importers.sources import (
    ImagesByName,
    ImageSource,
    as_text,
    interleaved,
    its_id,
    listed,
    more_captions,
    text_item,
)
from megatron_lcl.data.storage.paths import ObjectPath
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_file, raise_if_passing

_TEXTS = ("text", "texts", "caption", "captions", "sentences", "alt_text", "description", "title", "prompt")
"""names of columns of texts, the likeliest first"""
_NO_TEXTS = (
    "id", "uid", "image_id", "key", "__key__", "sha256", "source", "url", "image_url", "path", "image_path",
    "file_name", "filename",
)  # fmt: skip
"""names of columns of strings that are no texts, whatever their case"""
_ABOUT = ("url", "id")
"""columns that say what a row is called"""
_BATCH = 16
"""rows read at once: each may hold many large images"""
_MAPPED_BYTES = 32 << 20
"""of an Arrow file that are kept mapped once they were read"""


class HfImporter(ImagesByName, FilesImporter):
    """A folder, or a file of it; parquet by row groups, an Arrow stream as a whole."""

    reads = (
        "folder that Hugging Face's `save_to_disk` wrote, or its .parquet or .arrow files with an Image column and a "
        "text column (each may be a list); images in the columns, else by their path in --images"
    )
    rules = 2
    separator = " "
    suffixes = (".parquet", ".arrow")
    reads_objects = True

    def __init__(
        self,
        input: Path,
        images: Path | None = None,
        split: Annotated[str, "split to read, or all; needed where there are several"] = "",
        image_column: Annotated[
            str, "column of the images; empty: the only one that is an Image, or a list of them"
        ] = "",
        text_column: Annotated[
            str,
            f"column of the texts, or of lists of them; empty: the first of {', '.join(_TEXTS)}, else the only one of "
            "strings, unless its name says that it holds ids or places, or another column holds chats",
        ] = "",
        captions: Annotated[
            str,
            "columns, separated by commas, whose strings or lists of strings are captions, too: all of an image are "
            "kept, and each epoch reads one; empty: each text makes a pair with its image",
        ] = "",
    ) -> None:
        super().__init__(input)
        self.found = of_split(of_data_set(self.found), split)
        self.image, self.text, self.captions = image_column, text_column, listed(captions)
        self.images = ImageSource(images)
        # earlier releases looked for no path from the root, otherwise in tars, and for names as they are given only
        self.rules += 2 * (images is not None)
        self._image_roots = [] if images is None else [images, images.resolve()]
        schema = next((schema for file in self.files if (schema := _schema(file)) is not None), None)
        if schema is not None:
            self._choose_columns(schema)
        elif is_file(input) and not input.name.lower().endswith(self.suffixes):
            raise UserError(f"{input} is neither parquet nor an Arrow file. The format reads: {self.reads}")

    def _choose_columns(self, schema: pa.Schema) -> None:
        has = f"it has {some_columns(schema.names)}"
        more = [("captions", name) for name in self.captions]
        for option, name in (("image_column", self.image), ("text_column", self.text), *more):
            if name and name not in schema.names:
                raise UserError(f"--option {option}={name}: {self.root} has no such column; {has}")
        if not self.image:
            found = [field.name for field in schema if _is_image(field, schema)]
            if len(found) != 1:
                what = "several columns" if found else "no column"
                raise UserError(f"{self.root} has {what} of images; {has}: name one with --option image_column=NAME")
            self.image = found[0]
        if not self.text:
            found = [field.name for field in schema if _is_text(field.type)]
            only = self._only_text(found, schema)
            self.text = next((name for name in _TEXTS if name in found), only)
            if not self.text:
                what = "several columns of texts" if len(found) > 1 else "no column of texts by a known name"
                raise UserError(f"{self.root} has {what}; {has}: name one with --option text_column=NAME")
            self.rules += _is_encoded(schema.field(self.text).type)  # earlier releases took another column
        for name in (self.text, *self.captions):
            if _holds_no_texts(kind := schema.field(name).type):
                raise UserError(
                    f"{self.root}: column {name} holds {str(kind)[:80]}, no texts; write one to a column of its own "
                    "(docs/data.md has lines for chats)"
                )
        self.kind = "natural" if _is_list(schema.field(self.image).type) else "pairs"
        if self.captions:
            if self.kind == "natural":
                raise UserError(f"--option captions: {self.root} has lists of images in its column {self.image}")
            self.kind, self.separator = "captions", ""
        self.chosen = f"images of column {self.image}, texts of column {self.text}"
        if self.captions:
            self.chosen += f", captions of {', '.join(self.captions)}, too"

    def _only_text(self, found: Sequence[str], schema: pa.Schema) -> str:
        """The one of the columns of strings that are `found`, where it may be the text; else "".

        Of LLaVA's rows the only one is `id`, of FineVision's `source`, as the texts are chats, lists of structs.
        """
        plain = [name for name in found if not _is_encoded(schema.field(name).type)]  # all that earlier releases knew
        only = plain or found
        chats = (field for field in schema if field.name != self.image and not _is_image(field, schema))
        if len(only) != 1 or only[0].lower() in _NO_TEXTS or any(_is_chat(field.type) for field in chats):
            return ""
        return only[0]

    def units_of_files(self) -> list[Unit]:
        """Payload of an Arrow stream: (path, 0, 0, 0); of a parquet file see `row_group_units`."""
        units: list[Unit] = []
        for file in self.files:
            name = self.found.name(file)
            if file.suffix == ".parquet":
                units += row_group_units(file, name)
            else:
                units.append(Unit(name, file.stat().st_size, (file, 0, 0, 0)))
        return units

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        file = unit.payload[0]
        name, near, needed = self.found.name(file), (self.stem(file),), [self.image, self.text, *self.captions]
        rows = (
            rows_of_unit(unit, name, needed, drops, _ABOUT.__contains__, _BATCH)
            if file.suffix == ".parquet"
            else _arrow_rows(file, name, needed, drops)
        )
        for row, values in rows:
            yield from self._documents(values, near, f"{name}:{row}", drops)

    def _documents(self, row: dict[str, Any], near: tuple[str], name: str, drops: Drops) -> Iterator[Document]:
        """One, or of one image with several texts one each, unless they are captions."""
        images, texts = row[self.image], row[self.text]
        about = its_id(row, name, drops)
        if not isinstance(images, list):
            several: list[list[Any]] = [[text] for text in (texts if isinstance(texts, list) and texts else [texts])]
            if self.captions:
                several = [[*dict.fromkeys(more_captions(row, (self.text, *self.captions), name, drops))]]
            for number, its_texts in enumerate(several):
                label = f"{name}#{number}" if len(several) > 1 else name
                image = self._image(images, near, label, drops)
                items: list[Text | Image] = [] if image is None else [image]
                items += [text_item(text, label, drops) for text in its_texts]
                together = {"group": name} if len(several) > 1 else {}
                metadata = {**about, **together, "lost_images": int(image is None)}
                yield Document(tuple(items), name=label, metadata=metadata)
            return
        if not isinstance(texts, list):
            images = [*(image for image in images if image is not None), None]
            texts = [*[None] * (len(images) - 1), texts]
        if len(images) != len(texts):
            drops.bad("document", "lists of images and texts are not of one length", name, sample=str(texts))
            return
        found = (self._image(image, near, name, drops) for image in images if image is not None)
        read, lost = interleaved(images, texts, found, name, drops)
        yield Document(read, name=name, metadata={**about, "lost_images": lost})

    def _image(self, value: Any, near: tuple[str], name: str, drops: Drops) -> Image | None:
        """None, and counted, where there are no bytes."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        path = as_text(path, name, drops)
        if isinstance(data, bytes):
            return Image(data, name=str(path or name))
        try:
            if not isinstance(path, str):
                raise BadImage("neither bytes nor path")
            return Image(self.images.read(self._names(path), near), name=path)
        except BadImage as error:
            drops.bad("image", str(error), f"{name}: {str(path)[:200]}")
            return None

    def _names(self, path: str) -> list[str]:
        """What an image may be called below --images; some paths are from the root, perhaps another machine's."""
        found = Path(path)
        below = [str(found.relative_to(root)) for root in self._image_roots if found.is_relative_to(root)]
        return [*(below if found.is_absolute() else [path]), found.name]


# --- Arrow files -------------------------------------------------------------------------------------------------


def _arrow_rows(file: Path, name: str, needed: list[str], drops: Drops) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `rows_of_unit` has those of parquet."""
    row = num_bytes = 0
    try:
        source, give_back = _source(file)
        with source, _open_stream(source) as stream:
            columns = columns_to_read(stream.schema.names, needed, _ABOUT.__contains__, name, drops)
            for batch in stream if columns else ():
                batch = batch.select(columns)
                if _is_damaged(batch):  # else a wrong length leads outside the file
                    drops.bad("document", "lost in a damaged Arrow file", f"{name}:{row}", max(1, len(batch)))
                    row += len(batch)
                    continue
                for start in range(0, len(batch), _BATCH):
                    part = batch.slice(start, _BATCH)
                    for values in zip(*(column_values(part[column]) for column in columns), strict=True):
                        yield row, dict(zip(columns, values, strict=True))
                        row += 1
                    num_bytes += part.nbytes
                    if num_bytes > _MAPPED_BYTES:  # else all that was read counts as memory of this process
                        give_back()
                        num_bytes = 0
    except DAMAGE as error:
        raise_if_passing(error, file)
        drops.bad("document", "damaged or truncated Arrow file, the rows after it are lost", f"{name}:{row}")


def _is_damaged(batch: pa.RecordBatch) -> bool:
    """Strings that are not UTF-8 are no damage: each costs its own document at most."""
    try:
        batch.validate()
        for column in batch.columns:
            try:
                column.validate(full=True)
            except DAMAGE:
                column.view(_without_strings(column.type)).validate(full=True)
        return False
    except DAMAGE:
        return True


def _without_strings(kind: pa.DataType) -> pa.DataType:
    """The type of the same memory with bytes for strings. Other types that hold strings, as maps, stay as they are."""
    if isinstance(kind, pa.BaseExtensionType):
        return _without_strings(kind.storage_type)
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_string_view(kind):
        return pa.binary_view()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_strings(field.type)) for field in kind])
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _without_strings(kind.value_type), kind.ordered)
    if pa.types.is_run_end_encoded(kind):
        return pa.run_end_encoded(kind.run_end_type, _without_strings(kind.value_type))
    if not _is_list(kind):
        return kind
    item = kind.value_field.with_type(_without_strings(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(item, kind.list_size)
    return pa.large_list(item) if pa.types.is_large_list(kind) else pa.list_(item)


# --- which columns -----------------------------------------------------------------------------------------------


def _source(file: Path) -> tuple[Any, Callable[[], None]]:
    """What Arrow reads of an object or, mapped, of a file of the disk; and what gives back the pages that were read."""
    if isinstance(file, ObjectPath):
        return pa.PythonFile(file.open("rb"), "r"), lambda: None
    with open(file, "rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.BufferReader(mapped), lambda: mapped.madvise(mmap.MADV_DONTNEED)


def _open_stream(file: Any) -> Any:
    """Batches of an Arrow stream, or of an Arrow file."""
    magic = file.read(6)
    file.seek(0)
    if magic != b"ARROW1":
        return pa.ipc.open_stream(file)
    reader = pa.ipc.open_file(file)
    return pa.RecordBatchReader.from_batches(
        reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    )


def _schema(file: Path) -> pa.Schema | None:
    """None for a damaged file."""
    try:
        if file.suffix == ".parquet":
            schema = pq.read_schema(opened(file))
        else:
            with _source(file)[0] as source, _open_stream(source) as stream:
                schema = stream.schema
        _ = schema.names  # decoded only here
        return schema
    except DAMAGE as error:
        raise_if_passing(error, file)
        return None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """That of a column's values, or of the items of lists, be they encoded by a dictionary or not."""
    for wraps in (pa.types.is_dictionary, _is_list, pa.types.is_dictionary):
        kind = kind.value_type if wraps(kind) else kind
    return kind


def _is_text(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_no_texts(kind: pa.DataType) -> bool:
    """Of a column that is named; one of bytes, or of a type that wraps another, may hold some."""
    kind = _value_type(kind)
    return any(holds(kind) for holds in (pa.types.is_struct, pa.types.is_map, pa.types.is_primitive))


def _is_chat(kind: pa.DataType) -> bool:
    """Whether it is of lists of structs in which there are strings."""
    item = _value_type(kind)
    return _is_list(kind) and pa.types.is_struct(item) and any(_is_text(field.type) for field in item)


def _is_encoded(kind: pa.DataType) -> bool:
    """Whether texts are not plain strings, or lists of them."""
    kind = kind.value_type if _is_list(kind) else kind
    return not (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_image(field: pa.Field, schema: pa.Schema) -> bool:
    """Whether the metadata say that it is an Image, or a list of them, or, where they say nothing, its type does."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][field.name]
        while isinstance(feature, list | dict):
            if isinstance(feature, dict) and "_type" in feature and "feature" not in feature:
                return feature["_type"] == "Image"
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        pass
    kind = _value_type(field.type)
    # looked up: to list the names of a damaged file's fields may raise
    return pa.types.is_struct(kind) and kind.num_fields == 2 and min(map(kind.get_field_index, ("bytes", "path"))) >= 0
