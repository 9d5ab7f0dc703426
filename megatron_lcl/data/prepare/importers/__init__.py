"""Source formats, one file each. An importer cuts its input into units and yields each unit's documents in order.

Another package adds a format with an entry point in the group `megatron_lcl.importers`, whose name is the format's and
whose object is an `Importer` class.

What the formats share: `lines.py` (JSON lines), `tars.py` (WebDataset tars), `sources.py` (images in folders and tars).
Imports data.corpus only. Begin with `Importer` below, then `jsonl.py`, the simplest one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from megatron_lcl.data.corpus.document import Document, Kind
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.errors import UserError
from megatron_lcl.fields import parse
from megatron_lcl.plugins import Plugins

ENTRY_POINTS = "megatron_lcl.importers"
_PLUGINS = Plugins(
    ENTRY_POINTS,
    __name__,
    {
        "html": "html:HtmlImporter",
        "jsonl": "jsonl:JsonlImporter",
        "mmc4": "mmc4:Mmc4Importer",
        "obelics": "parquet:ObelicsImporter",
        "omnicorpus": "parquet:OmniCorpusImporter",
        "mint1t": "mint1t:Mint1tImporter",
        "webdataset": "pairs:WebDatasetImporter",
    },
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the input that one worker reads from start to end."""

    name: str
    size: int
    """bytes on disk, images in other files not counted"""
    payload: Any = None
    """whatever the importer needs to find it again; picklable"""


class Importer(ABC):
    """Reads one source. Picklable: workers get a copy and one unit at a time."""

    options: ClassVar[dict[str, str]] = {}
    """keyword arguments besides `input` and `images`, with their description"""
    kind: Kind | None = None
    """that of documents which do not say theirs; None: matched if any of these has similarities, else natural"""
    rules: ClassVar[int] = 1
    """counted up when the same input and options give other documents than before"""

    @abstractmethod
    def __init__(self, input: Path, images: Path | None = None, **options: Any) -> None:
        """UserError, with the remedy, where `input` holds nothing of this format."""

    @abstractmethod
    def signature(self) -> str:
        """Changes when the input does; cheap."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """All units in the corpus's order; the same for the same input."""

    def prepare(self, folder: Path) -> None:  # noqa: B027 - few importers have something to prepare
        """Once before several processes read documents: what takes long may be kept in `folder`, which all see."""

    def place(self, name: str) -> str:
        """Where something that `documents` counted stands, from the name that it gave, as people read it."""
        return name

    @abstractmethod
    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        """The unit's documents in order; what cannot be read is counted in `drops`, never raised.

        A Text of "" keeps its place among the texts (`matched_text` counts them), is not written, and was counted here.
        """


def files_signature(files: Iterable[Path], root: Path) -> str:
    """A hash of names below `root`, sizes and modification times."""
    digest = xxhash.xxh3_128()
    for file in files:
        stat = file.stat()
        name = file.relative_to(root) if file.is_relative_to(root) else file.name
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def formats() -> list[str]:
    """Names of all formats, those of other packages included."""
    return _PLUGINS.names()


def importer_class(format: str) -> type[Importer]:
    """The importer of `format`. UserError names the formats there are."""
    if (found := _PLUGINS.find(format)) is not None:
        return found
    raise UserError(f"there is no format {format!r}; there are {', '.join(formats())}")


def read_options(format: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Options from text, each as its default's type wants it (`fields.parse`). UserError for an unknown format."""
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(importer_class(format)).parameters.items()
    }
    return {name: parse(type(defaults.get(name, "")), text) for name, text in texts.items()}


def create(format: str, input: str | Path, images: str | Path | None, options: Mapping[str, Any]) -> Importer:
    """An importer of `format` for `input`. UserError for an unknown format or option, or input that is not there."""
    cls = importer_class(format)
    unknown = [name for name in options if name not in cls.options]
    if unknown:
        known = ", ".join(cls.options) or "none"
        raise UserError(f"format {format} has no option {unknown[0]!r}; it has: {known}")
    for name, parameter in inspect.signature(cls).parameters.items():
        kind = type(parameter.default)
        accepted = (int, float) if kind is float else (kind,)
        if name in options and kind in (str, int, float, bool) and type(options[name]) not in accepted:
            raise UserError(f"option {name} is {options[name]!r}; give a value such as {parameter.default!r}")
    for path in (input, images):
        if path is not None and not Path(path).exists():
            raise UserError(f"{path} does not exist")
    return cls(Path(input), None if images is None else Path(images), **options)
