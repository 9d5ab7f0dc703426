"""What an importer, which may be another package's, yields that is no document: found where reading it has failed.

Documents are not checked as they come, as that would take part of the time in which they are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Importer, Unit
from megatron_lcl.errors import UserError

_NAMES: dict[type, str] = {type(None): "None", Integral: "int", Real: "float"}


@contextlib.contextmanager
def naming_faulty_documents(importer: Importer, units: Iterable[Unit]) -> Iterator[None]:
    """An error of types from inside is a UserError that names importer, unit and document, where a document of the
    units is to blame, which are read again to find out. Else it is raised as it is: then it comes from the importer's
    own code, which its traceback shows, or from the program's."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        if (fault := _first_fault(importer, units)) is not None:
            told = f"{type(error).__name__}: {error}"
            raise UserError(f"{importer}, {fault}; mend its `documents` (it ended with {told})") from error
        raise


def _first_fault(importer: Importer, units: Iterable[Unit]) -> str | None:
    first: str | None = None
    try:
        for unit in units:
            documents = importer.documents(unit, Drops())
            if not isinstance(documents, Iterable):
                return f"unit {unit.name!r}: {_shown(documents)} stands where an iterator of documents belongs"
            for number, document in enumerate(documents):
                first = first or next(
                    (
                        f"unit {unit.name!r}, document {number} of it{_named(document)}: {what} is {_shown(value)}, "
                        f"where {' or '.join(_NAMES.get(one, one.__name__) for one in wanted)} belongs"
                        for what, value, wanted in _parts(document)
                        if not isinstance(value, wanted)
                    ),
                    None,
                )
    except Exception:  # noqa: BLE001 - the importer fails by itself, as its first error says
        return None
    return first


def _parts(document: Any) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """(what it is, the value, its types) of all that a document holds; each is checked before the next is looked at."""
    none = type(None)
    yield "it", document, (Document,)
    yield "name", document.name, (str,)
    yield "kind", document.kind, (str, none)
    yield "metadata", document.metadata, (Mapping,)
    yield "metadata['group']", document.metadata.get("group"), (str, int, none)
    yield "metadata['shares']", document.metadata.get("shares", ()), (list, tuple, set, frozenset)
    yield "metadata['lost_images']", document.metadata.get("lost_images", 0), (Integral,)
    yield "items", document.items, (Sequence,)
    for number, item in enumerate(document.items):
        yield f"items[{number}]", item, (Text, Image)
        if isinstance(item, Text):
            yield f"items[{number}].text", item.text, (str,)
        else:
            yield f"items[{number}].data", item.data, (bytes, bytearray, memoryview)
            yield f"items[{number}].name", item.name, (str,)
            yield f"items[{number}].similarity", item.similarity, (Real, none)
            yield f"items[{number}].matched_text", item.matched_text, (Integral, none)


def _named(document: Any) -> str:
    return f", {document.name!r}" if isinstance(document, Document) else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}... ({type(value).__name__})"
