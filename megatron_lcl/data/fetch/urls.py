"""The image URLs of an input: MMC4, OBELICS, OmniCorpus, MINT-1T, LAION, DataComp, our JSON lines, or a list.

What a file holds is seen from its columns or keys, so that one reader does for all:

parquet      a column `images` (lists of URLs, null where a text stands: OBELICS, OmniCorpus, MINT-1T), else one of
             `url`, `URL`, `image_url` (LAION, DataComp), or the one that is named
JSON         of objects, as lines, or in `.json` one array: "image_info" [{"raw_url"}] (MMC4), "items" [{"image": URL}]
             (ours), "images" [URL or null], else a string "url", "URL" or "image_url"
text         a URL a line
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.files import Files, find_files
from megatron_lcl.data.prepare.importers.json_rows import array_rows, is_array
from megatron_lcl.data.prepare.importers.lines import JSON, NDJSON, SUFFIXES, json_lines, line_units
from megatron_lcl.data.prepare.importers.row_groups import DAMAGE, batches, open_parquet
from megatron_lcl.data.prepare.importers.urls import is_url
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists, is_file, raise_if_passing

READS = ".parquet, .jsonl (.gz, .zst, .zip), .txt, else .ndjson, else .json (.gz, .zst)"
_SUFFIXES = (".parquet", *SUFFIXES, ".txt", ".zip")
_LATER = (NDJSON, JSON)
"""read in a folder that has none of those before them: beside these `.json` is mostly something else"""
_LISTS, _SINGLE = "images", ("url", "URL", "image_url")


def url_files(input: Path) -> Files:
    """The files to read. UserError where there is none."""
    if not exists(input):
        raise UserError(f"{input} does not exist")
    if is_file(input) and not input.name.lower().endswith((*_SUFFIXES, *NDJSON, *JSON)):
        raise UserError(f"{input} is none of {READS}")
    return find_files(input, _SUFFIXES, READS, later=_LATER)


def read_urls(files: Files, column: str | None, drops: Drops) -> Iterator[list[str]]:
    """All image URLs in order, some at a time; what is none, and what cannot be read, is counted in `drops`.

    column: of parquet files, or the key of JSON objects, that has them. UserError where a parquet file has no such
    column, with the columns that it has.
    """
    for file in files.read:
        name = files.name(file)
        match file.suffix.lower():
            case ".parquet":
                found = _of_parquet(file, name, column, drops)
            case ".txt":
                found = _of_text(file)
            case _:
                found = _of_json(file, name, column, drops)
        for values in found:
            urls = []
            for value in values:
                if isinstance(value, bytes):
                    value = value.decode(errors="replace")
                if isinstance(value, str) and is_url(value) and _is_unicode(value):
                    urls.append(value)
                elif value is not None and value != "":
                    drops.bad("image", "not a URL", f"{name}: {str(value)[:200]}")
            yield urls


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it; a lone surrogate, which JSON may name, it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_parquet(file: Path, name: str, wanted: str | None, drops: Drops) -> Iterator[list[Any]]:
    try:
        with open_parquet(file) as source:
            column = _column(source.schema_arrow, name, wanted)
            for batch in batches(file, source, range(source.num_row_groups), [column], 4096):
                values = batch.column(0)
                while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                    values = values.flatten()
                yield values.cast(pa.large_binary()).to_pylist()  # a string need not be valid UTF-8
    except UserError:
        raise
    except DAMAGE as error:
        raise_if_passing(error, file)
        drops.bad("document", "damaged parquet file", name)


def _column(schema: pa.Schema, name: str, wanted: str | None) -> str:
    """The column that has the URLs: the one that is wanted, else lists of strings, else strings of a usual name."""
    candidates = [wanted] if wanted is not None else [_LISTS, *_SINGLE]
    for column in candidates:
        if schema.names.count(column) == 1:
            kind = schema.field(column).type
            while pa.types.is_list(kind) or pa.types.is_large_list(kind):
                kind = kind.value_type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return column
    raise UserError(
        f"{name} has no column of URLs named {' or '.join(candidates)}; it has {', '.join(schema.names)}: "
        "name one with --url-column"
    )


def _of_text(file: Path) -> Iterator[list[str]]:
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            yield [line.strip()]


def _of_json(file: Path, name: str, column: str | None, drops: Drops) -> Iterator[list[Any]]:
    if file.name.lower().endswith(JSON) and is_array(file):  # others are lines by their name
        rows = array_rows(Unit(name, 0, (file, 0, 0)), drops)
    else:
        rows = itertools.chain.from_iterable(json_lines(unit, drops) for unit in line_units([file], lambda _: name))
    for _, row in rows:
        yield _in_row(row, column)


def _in_row(row: dict[str, Any], column: str | None) -> list[Any]:
    if column is not None:
        value = row.get(column)
        return value if isinstance(value, list) else [value]
    for key, inner in (("image_info", "raw_url"), ("items", "image")):
        if isinstance(entries := row.get(key), list):
            found = [entry.get(inner) for entry in entries if isinstance(entry, dict)]
            # paths of images that are there already are no fault
            return [value for value in found if isinstance(value, str) and is_url(value)]
    if isinstance(entries := row.get(_LISTS), list):
        return entries
    return [next((row[key] for key in _SINGLE if isinstance(row.get(key), str)), None)]
