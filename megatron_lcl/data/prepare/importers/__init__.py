"""Source formats, one file each. An importer cuts its input into units and yields each unit's documents in order.

Another package adds a format with an entry point in the group `megatron_lcl.importers`, whose name is the format's and
whose object is an `Importer` class.

What the formats share: `files.py` (the input's files, each once), `lines.py` (JSON lines), `json_rows.py` (JSON
arrays), `row_groups.py` (parquet), `tars.py` (tars, WebDataset's samples), `sources.py` (images in folders and
archives), `image_tables.py` (archives in parquet), `urls.py` (images by their URL), `url_keys.py` (img2dataset's
tables), `sorted_runs.py` (members of archives and URLs, by their hash). Imports data.corpus, data.prepare.sorting and
data.storage.
Begin with `Importer` below, then `jsonl.py`, the simplest one.
"""

from __future__ import annotations

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_lcl.data.corpus.document import CAPTIONED, Document, Image, Kind, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.storage.paths import ObjectPath, path_of
from megatron_lcl.errors import UserError
from megatron_lcl.fields import parse, plain_text
from megatron_lcl.filesystem import exists
from megatron_lcl.plugins import Plugins

ENTRY_POINTS = "megatron_lcl.importers"
_PLUGINS = Plugins(
    ENTRY_POINTS,
    __name__,
    {
        "coco": "coco:CocoImporter",
        "epub": "epub:EpubImporter",
        "hf": "hf:HfImporter",
        "html": "html:HtmlImporter",
        "jsonl": "jsonl:JsonlImporter",
        "mmc4": "mmc4:Mmc4Importer",
        "obelics": "parquet:ObelicsImporter",
        "nemo": "nemo:NemoImporter",
        "omnicorpus": "parquet:OmniCorpusImporter",
        "markdown": "markdown:MarkdownImporter",
        "mint1t": "mint1t:Mint1tImporter",
        "table": "table:TableImporter",
        "webdataset": "pairs:WebDatasetImporter",
    },
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the input that one worker reads from start to end."""

    name: str
    size: int
    """bytes to read; of images in other files where an importer knows them"""
    payload: Any = None
    """whatever the importer needs to find it again; picklable"""


Each = Callable[[Callable[[Any, Any], Any], Sequence[Sized]], Iterable[Any]]
"""each(function, items): function(importer, item) of every item, in order, from several processes, with a bar"""


class Importer(ABC):
    """Reads one source. Picklable: workers get a copy and one unit at a time.

    The options of a format are the keyword arguments of its importer, each with its type, what it does, and a default:

        def __init__(self, input: Path, images: Path | None = None,
                     min_side: Annotated[int, "images with a shorter side are skipped, pixels"] = 64) -> None:
    """

    reads: ClassVar[str] = ""
    """what the input is, and where its images are; a line. Default: the first line of the class's docstring"""
    options: ClassVar[dict[str, str]] = {}
    """what options do, of importers that were written before `Annotated` said it"""
    kind: Kind | None = None
    """that of documents which do not say theirs; None: matched if any of these has similarities, else natural"""
    reads_objects: ClassVar[bool] = False
    """its input and images may lie in object storage: it looks at them and opens them by methods of `Path` alone"""
    rules: int = 1
    """counted up, of a class or for some inputs, when the same input and options give other documents than before"""
    separator: str = ""
    """what stands between two texts of a document where there is no white space (`separated`); empty: nothing but the
    blank texts that the source has there"""

    chosen: str = ""
    """what it takes of the input where others could be meant, in a few words for people"""

    def __str__(self) -> str:
        """Its class, for messages."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @abstractmethod
    def __init__(self, input: Path, images: Path | None = None, **options: Any) -> None:
        """UserError, with the remedy, where `input` holds nothing of this format."""

    @abstractmethod
    def signature(self) -> str:
        """Changes when the input does; cheap."""

    def scan(self, each: Each) -> None:  # noqa: B027 - most documents depend on nothing else
        """Once, before `units`: find out what documents depend on and only the whole input tells.

        each: see `Each`; an item is a list of names, or a range of numbers, and the bar counts these. The function may
        be called in another process, on a copy, so what it finds is what it returns.
        """

    @abstractmethod
    def units(self) -> list[Unit]:
        """All units in the corpus's order; the same for the same input."""

    def prepare(self, folder: Path) -> None:  # noqa: B027 - few importers have something to prepare
        """Once before several processes read documents: what takes long may be kept in `folder`, which all see."""

    def place(self, name: str) -> str:
        """Where something that `documents` counted stands, from the name that it gave, as people read it."""
        return name

    def count_others(self, drops: Drops) -> None:  # noqa: B027 - few inputs have others
        """Once, at the end: count what the input holds besides its units, which may have changed since the work began,
        as no document depends on it."""

    @abstractmethod
    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        """The unit's documents in order; what cannot be read is counted in `drops`, never raised.

        Called for a unit any number of times, in any order of the units, on a copy in any process: what is yielded
        follows from the unit and from what `__init__`, `scan` and `prepare` left, not from units that were read before.
        What it keeps in `self` may save work, such as an opened archive, and changes no document.
        A blank Text is not written, and counted then; what it holds stands between the texts around it (`separated`).
        One of "" keeps its place among the texts (`matched_text` counts them), too, and was counted here.
        `separator` is not in the texts yet: whether it is needed depends on the tokenizer.
        Where images of a document were counted here as bad, its metadata have their number, as "lost_images".
        """


def separated(document: Document, separator: str, kind: Kind | None = None) -> Document:
    """The document, with white space before each text but the first, where there is none at the border: that of blank
    texts between the two, which are not written, else `separator`. kind: of a document that does not say its own; texts
    of pairs and captions are alternatives, and a blank one stands between none.

    It begins the second text, since most tokenizers have a token of a space and the word after it. Images between two
    texts do not matter: one that cannot be read is dropped, others are removed by `curate`, or moved or not selected in
    training, and then the texts on both sides follow each other.
    """
    joins = (document.kind or kind) not in CAPTIONED
    if not separator and not (joins and any(isinstance(item, Text) and item.text.isspace() for item in document.items)):
        return document
    items: list[Text | Image] = []
    before = blank = ""
    for item in document.items:
        if isinstance(item, Text):
            if not item.text.strip():
                blank += item.text
            else:
                if before and not (before[-1].isspace() or item.text[0].isspace()):
                    item = Text(((blank if joins else "") or separator) + item.text)
                before, blank = item.text, ""
        items.append(item)
    return msgspec.structs.replace(document, items=tuple(items))


def files_signature(files: Iterable[Path], root: Path) -> str:
    """A hash of names below `root`, sizes, times of change or, of objects, ETags. UserError where one is not there."""
    digest = xxhash.xxh3_128()
    for file in files:
        try:
            stat = file.stat()
        except FileNotFoundError:
            raise not_there(file) from None
        name = file.relative_to(root) if file.is_relative_to(root) else file.name
        version = file.about[1] if isinstance(file, ObjectPath) and file.about else stat.st_mtime_ns
        digest.update(f"{name}\0{stat.st_size}\0{version}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def not_there(path: Path) -> UserError:
    """What is said of a file or folder that was listed and cannot be found."""
    link = not isinstance(path, ObjectPath) and path.is_symlink()
    where = f"{path} is a link to {path.readlink()}, which" if link else str(path)
    return UserError(f"{where} is not there: mount its disk, fetch it, or remove the link")


def formats() -> list[str]:
    """Names of all formats, those of other packages included."""
    return _PLUGINS.names()


def importer_class(format: str) -> type[Importer]:
    """The importer of `format`. UserError names the formats there are, or what its class lacks."""
    if (found := _PLUGINS.find(format)) is not None:
        if not (isinstance(found, type) and issubclass(found, Importer)):
            raise UserError(f"format {format!r}: its entry point names {found!r}, which is no class made of `Importer`")
        if missing := sorted(found.__abstractmethods__):
            raise UserError(f"format {format!r}: the class {found.__name__} does not define its {', '.join(missing)}")
        return found
    raise UserError(f"there is no format {format!r}; there are {', '.join(formats())}")


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a format, as its importer declares it."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def type_name(self) -> str:
        return getattr(self.type, "__name__", "value")

    @property
    def is_needed(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def default_text(self) -> str:
        return plain_text(self.default) if self.default != "" else "empty"

    def validated(self, value: Any) -> Any:
        """The value as the option's type has it. UserError where that takes no such value."""
        lenient = ConfigDict(arbitrary_types_allowed=True)
        try:
            return TypeAdapter(self.type, config=lenient).validate_python(value)
        except ValidationError as error:
            such = f"give a {self.type_name}" if self.is_needed else f"give a value such as {self.default_text}"
            said = " or ".join(fault["msg"].lower() for fault in error.errors())
            raise UserError(f"--option {self.name}={value}: {such} ({said})") from None


def options_of(importer: type[Importer]) -> list[Option]:
    """What an importer takes besides `input` and `images`, in order."""
    try:
        hints = typing.get_type_hints(importer.__init__, include_extras=True)
    except (NameError, TypeError):  # a type that is imported for type checkers only
        hints = {}
    found = []
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(importer).parameters.items()
        if name not in ("input", "images") and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    for name, default in {**dict.fromkeys(importer.options, ""), **parameters}.items():
        untold = default is None or default is inspect.Parameter.empty
        hint, help = hints.get(name, Any if untold else type(default)), importer.options.get(name, "")
        if typing.get_origin(hint) is typing.Annotated:
            hint, *said = typing.get_args(hint)
            help = next((word for word in said if isinstance(word, str)), help)
        found.append(Option(name, hint, default, help))
    return found


def what_it_reads(format: str) -> str:
    """A line on the input of a format, those of other packages included, for a list of them all."""
    try:
        importer = importer_class(format)
    except UserError as error:  # another package's: the list is none the worse for it
        return f"({' '.join(str(error).split())})"
    return importer.reads or (inspect.getdoc(importer) or "").partition("\n")[0]


def read_options(format: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Options from text, each as its type wants it (`fields.parse`). UserError for an unknown format."""
    types = {option.name: option.type for option in options_of(importer_class(format))}
    return {name: parse(types.get(name, str), text) for name, text in texts.items()}


def create(format: str, input: str | Path, images: str | Path | None, options: Mapping[str, Any]) -> Importer:
    """An importer of `format` for `input`. UserError for an unknown format or option, one that is missing, or input
    that is not there."""
    cls = importer_class(format)
    known = {option.name: option for option in options_of(cls)}
    for name in options:
        if name not in known:
            names = ", ".join(known) or "none"
            raise UserError(
                f"format {format} has no option {name!r}; it has: {names} "
                f"(`megatron-lcl preprocess --format {format} --help` says what they do)"
            )
    given = {name: known[name].validated(value) for name, value in options.items()}
    places = [path_of(place) for place in (input, images) if place is not None]
    for place in places:
        if isinstance(place, ObjectPath) and not cls.reads_objects:
            raise UserError(f"format {format} reads files on a disk; copy {place} there first (`aws s3 sync`, rclone)")
        if not exists(place):
            raise UserError(f"{place} does not exist")
    arguments = places[0], places[1] if images is not None else None
    takes = inspect.signature(cls)
    try:
        bound = takes.bind_partial(*arguments, **given).arguments
    except TypeError:
        raise UserError(
            f"format {format}: {cls.__name__}.__init__ takes {takes}, and has to take `input` and `images` first"
        ) from None
    if missing := [name for name, option in known.items() if option.is_needed and name not in bound]:
        raise UserError(
            f"format {format} needs {' '.join(f'--option {name}=…' for name in missing)} "
            f"(`megatron-lcl preprocess --format {format} --help` says what they do)"
        )
    return cls(*arguments, **given)
