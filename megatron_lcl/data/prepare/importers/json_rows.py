"""Rows of a file that is one JSON array, as LLaVA's are: read a part at a time, so none needs to fit into memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.charsets import invalid
from megatron_lcl.data.prepare.importers.lines import MAX_LINE, file_chunks

NOT_JSON = "not JSON, the rows after it are lost"
CUT = "truncated file, the rows after it are lost"
"""reasons of which nothing says how many rows are lost"""
_SPACE = re.compile(r"[ \t\r\n]*")
_BEFORE = b"\xef\xbb\xbf \t\r\n"
"""a byte order mark, and white space"""
_NO_UTF8 = re.compile("[\udc80-\udcff]")
"""bytes that are none, in a text decoded with `surrogateescape`"""
_SHOWN = 1000


def _number(digits: str) -> int | float:
    """Python makes no int of more than 4,300 digits."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


_DECODER = json.JSONDecoder(parse_int=_number)


def is_array(file: Path) -> bool:
    """Whether a file begins as a JSON array does, not as lines."""
    chunks = (chunk.lstrip(_BEFORE) for chunk in file_chunks(Unit("", 0, (file, 0, 0)), Drops()))
    return next(filter(None, chunks), b"").startswith(b"[")


def array_rows(unit: Unit, drops: Drops) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, object) of each object in the array of a unit that is a whole file; others are counted as bad documents.

    The name is the file's with the object's number, from 0. What is behind a fault is lost, as JSON says nowhere that a
    row begins.
    """
    parts = _text(unit, drops)
    text, at, number, needs_comma = next(parts, ""), 0, -1, False
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            if (part := next(parts, None)) is None:
                drops.bad("document", CUT, f"{unit.name}:{max(number, 0)}")
                return
            text, at = part, 0
        elif number < 0:  # the array's own bracket
            at, number = at + 1, 0
        elif text[at] == "]":
            break
        elif needs_comma and text[at] == ",":
            at, needs_comma = at + 1, False
        else:
            name = f"{unit.name}:{number}"
            value, end = (None, -1) if needs_comma else _decode(text, at)
            # a number may go on in the next part, with `.5` or `e+5`
            while not needs_comma and not 0 <= end < len(text) - 2 and len(text) - at <= MAX_LINE:
                if not (more := _more(parts, len(text) - at)):
                    break
                text, at = text[at:] + more, 0
                value, end = _decode(text, at)
            if end < 0:
                drops.bad("document", NOT_JSON, name, sample=_replaced(text[at : at + _SHOWN]))
                return
            if _NO_UTF8.search(text, at, end):
                drops.note("document", invalid("utf-8"), name)
                value, _ = _decode(_replaced(text[at:end]), 0)
            if isinstance(value, dict):
                yield name, value
            else:
                sample = _replaced(text[at : min(end, at + _SHOWN)])
                drops.bad("document", "not a JSON object", name, sample=sample)
            at, number, needs_comma = end, number + 1, True
    if text[at + 1 :].strip() or any(part.strip() for part in parts):
        drops.bad("document", NOT_JSON, f"{unit.name}:{number}")


def _decode(text: str, at: int) -> tuple[Any, int]:
    """A value and where it ends; -1 for one that is not whole."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, -1


def _more(parts: Iterator[str], size: int) -> str:
    """At least so many characters: with less at a time a long row would be read again and again. "" at the end."""
    found: list[str] = []
    while size >= 0 and (part := next(parts, None)) is not None:
        found.append(part)
        size -= len(part)
    return "".join(found)


def _replaced(text: str) -> str:
    """With U+FFFD for what is no UTF-8, as where lines are decoded."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _text(unit: Unit, drops: Drops) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    for chunk in file_chunks(unit, drops):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", True)
