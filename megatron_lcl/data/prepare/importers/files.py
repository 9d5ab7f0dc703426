"""The files of an input, each once: a compressed copy beside a file is not read, and what is not read is named."""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
import unicodedata
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from megatron_lcl.data.corpus.document import Document
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Importer, Unit, files_signature, not_there
from megatron_lcl.data.storage.paths import ObjectPath
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import below, is_file, raise_if_passing

MAX_FILE = 256 << 20
"""bytes of an image, a page or a file of a sample"""
COMPRESSED = (".zst", ".gz", ".zip", ".bz2", ".xz", ".lz4", ".br")
"""what compresses one file; of several copies the first is read"""
TWICE = "a copy of a file beside it, compressed in another way or not"
NOT_READ = "compressed in a way that this format does not read: unpack it"
GONE = "a link to a file that is not there"
OTHER = "of another kind than those that are read: give it alone as --input"
_SUFFIX = re.compile(r"\.[^.]*[^\W\d_]")
"""a dot with a letter behind it; `v1.0` has none, and is a folder's name, mostly"""


class TooLarge(ValueError):
    """A file over MAX_FILE."""

    def __init__(self) -> None:
        super().__init__(f"over {MAX_FILE >> 20} MiB")


class Skipped(NamedTuple):
    """A file that is not read: payload of a unit that counts it."""

    reason: str


class Names(Sequence[str]):
    """Strings in one block of memory: their UTF-8 bytes and 8 more each, where a list of paths takes a kilobyte."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._data, self._ends = bytearray(), array("q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        self._data += name.encode(errors="surrogatepass")
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[k] for k in range(len(self))[at]]
        k = range(len(self))[at]
        return self._data[self._ends[k] : self._ends[k + 1]].decode(errors="surrogatepass")


def whole_file(path: Path) -> bytes:
    """What is in a file that data name. OSError or ValueError where there is none, TooLarge over MAX_FILE.

    A device has no end, and a pipe may have no writer, so only regular files are read.
    """
    if isinstance(path, ObjectPath):
        if path.stat().st_size > MAX_FILE:
            raise TooLarge
        return path.read_bytes()
    with open(path, "rb", opener=_open_at_once) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("no regular file")
        if about.st_size > MAX_FILE:
            raise TooLarge
        return file.read(about.st_size)


def normal_forms(name: str) -> list[str]:
    """A name as it is given, and in the other normal forms of Unicode (NFC, NFD): macOS makes archives with the second
    of them, whatever names pages and tables have."""
    if name.isascii():
        return [name]
    return list(dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))))


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for a pipe's writer."""
    return os.open(path, flags | os.O_NONBLOCK)


@dataclass(frozen=True)
class Files:
    """What lies in an input."""

    root: Path
    """names are relative to it"""
    names: Sequence[str]
    """of the files to read, in order"""
    skipped: list[tuple[Path, str]]
    """(file, why) of those that have a format's name and are not read"""
    objects: Mapping[str, Path] = field(default_factory=dict)
    """those of them that are objects, by name, with what was listed of each"""
    others: Mapping[str, int] = field(default_factory=dict)
    """the first of those of a kind that comes later, and how many there are"""

    @property
    def read(self) -> list[Path]:
        """The files to read."""
        return list(self.paths())

    def paths(self) -> Iterator[Path]:
        """The same, one at a time."""
        return map(self.path, self.names)

    def path(self, name: str) -> Path:
        """A file to read, by its name."""
        return self.objects.get(name) or self.root / name

    def name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def skipped_units(self) -> list[Unit]:
        """One for each skipped file."""
        return [Unit(self.name(file), 0, Skipped(why)) for file, why in self.skipped]


def find_files(
    input: Path, suffixes: Sequence[str], reads: str, strict: bool = True, later: Sequence[Sequence[str]] = ()
) -> Files:
    """`input` itself, or all files below it that have one of the suffixes. reads: what they are, for the error.

    Of a file and compressed copies of it in the same folder (`a.jsonl`, `a.jsonl.gz`) one is read, the uncompressed one
    if it is there. UserError where there is nothing to read, or where a folder cannot be read or, if `strict`, is not
    there; else such a folder is among what is skipped.
    later: other kinds of files, by their suffixes. A kind is read where there is no file of one before it, else counted
    alone: beside tables `.json` is mostly something else, and there may be one for each image.
    """
    if is_file(input):
        return Files(input.parent, [input.name], [], {input.name: input} if isinstance(input, ObjectPath) else {})
    kinds = [suffixes, *later]
    skipped: list[tuple[Path, str]] = []
    for number, kind in enumerate(kinds):
        found = _find_kind(input, kind, tuple(itertools.chain(*kinds[number + 1 :])), strict)
        skipped += found.skipped
        if found.names:
            return replace(found, skipped=sorted(set(skipped)))
    packed = f"; {min(skipped)[0].name} is {min(skipped)[1]}" if skipped else ""
    raise UserError(f"no {', '.join(itertools.chain(*kinds))} files in {input}{packed}. The format reads: {reads}")


def _find_kind(input: Path, suffixes: Sequence[str], others: tuple[str, ...], strict: bool) -> Files:
    plain = {uncompressed(suffix) for suffix in suffixes}
    first, num_others = "", 0
    read: list[str] = []
    skipped: list[tuple[Path, str]] = []
    objects: dict[str, Path] = {}
    if isinstance(input, ObjectPath):
        objects = {path.relative_to(input).as_posix(): path for path in below(input)}
    for folder, files in _folders(input, objects):
        links = (input / folder / name for name in files if not objects and not _SUFFIX.search(name))
        lost = [path for path in links if _is_lost_folder(path)]
        if lost and strict:
            raise not_there(lost[0])
        skipped += [(path, GONE) for path in lost]
        for _, group in itertools.groupby(sorted(files, key=_base), key=_base):
            named = [name for name in group if _is_named(name, suffixes, plain)]
            copies = [name for name in named if objects or is_file(Path(input, folder, name))]
            skipped += [
                (input / folder / name, GONE) for name in named if not objects and _is_gone(input, folder, name)
            ]
            readable = sorted((name for name in copies if name.lower().endswith(tuple(suffixes))), key=_preference)
            read += [f"{folder}/{name}".lstrip("/") for name in readable[:1]]
            why = TWICE if readable else NOT_READ
            skipped += [(input / folder / name, why) for name in copies if name not in readable[:1]]
        if passed := [f"{folder}/{name}".lstrip("/") for name in files if name.lower().endswith(others)]:
            first, num_others = min(*passed, first or passed[0]), num_others + len(passed)
    read.sort(key=lambda name: name.replace("/", "\0"))  # as paths are ordered: a folder before what only begins alike
    its_objects = {name: objects[name] for name in read if objects}
    return Files(input, Names(read), skipped, its_objects, {first: num_others} if num_others else {})


def _folders(input: Path, objects: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder below the input, names of its files), of objects by their names.

    Links to folders are followed, and each folder comes once, by its own name if it has one in the input.
    """
    if isinstance(input, ObjectPath):
        found: dict[str, list[str]] = {}
        for name in objects:
            folder, _, file = name.rpartition("/")
            found.setdefault(folder, []).append(file)
        yield from found.items()
        return
    known: set[str] = set()
    starts = [os.fspath(input)]
    while starts:
        links: list[str] = []
        for start in sorted(starts):
            for path, folders, files in os.walk(start, onerror=_refuse):
                if (real := os.path.realpath(path)) in known:
                    folders.clear()
                    continue
                known.add(real)
                links += filter(os.path.islink, (os.path.join(path, folder) for folder in folders))
                relative = os.path.relpath(path, input)
                yield "" if relative == "." else relative, files
        starts = links


def _is_gone(*path: str | Path) -> bool:
    """As the files of a disk that is not mounted, or those of git-annex that were not fetched."""
    return os.path.islink(file := os.path.join(*path)) and not os.path.exists(file)


def _is_lost_folder(path: Path) -> bool:
    """Whether a link that has no suffix, mostly one to a folder, leads to nothing; one in a circle never had files."""
    try:
        path.stat()
    except OSError as error:
        raise_if_passing(error, path)
        return error.errno != errno.ELOOP
    return False


def _refuse(error: OSError) -> None:
    raise UserError(
        f"cannot read the folder {error.filename}: {error.strerror}; make it readable, or move it out of the input"
    ) from None


def _base(name: str) -> str:
    """The same for copies of one file."""
    return uncompressed(name).removesuffix(".jsonl")


def _is_named(name: str, suffixes: Sequence[str], plain: set[str]) -> bool:
    base = uncompressed(name)
    return name.lower().endswith(tuple(suffixes)) or base.lower().endswith(tuple(plain - {""}))


def uncompressed(name: str) -> str:
    """The name without what says how it is compressed."""
    lower = name.lower()
    if lower.endswith(".tgz"):
        return name[: -len(".tgz")] + ".tar"
    return next((name[: -len(suffix)] for suffix in COMPRESSED if lower.endswith(suffix)), name)


def _preference(name: str) -> tuple[int, str]:
    suffix = Path(name).suffix.lower().replace(".tgz", ".gz")
    return (COMPRESSED.index(suffix) if suffix in COMPRESSED else -1), name


class FilesImporter(Importer):
    """Reads the files of a folder that have one of `suffixes`, or one file."""

    suffixes: ClassVar[tuple[str, ...]]
    later: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """suffixes of other kinds of files, each of which is read where there are none of those before it"""
    beside: Sequence[Path] = ()
    """other files of the input, as archives of images are: documents depend on these, too"""
    strict: ClassVar[bool] = True
    """a link to a folder that is not there is an error, else a bad document"""

    def __init__(self, input: Path) -> None:
        self.found = find_files(input, self.suffixes, self.reads, self.strict, self.later)

    @property
    def root(self) -> Path:
        return self.found.root

    @property
    def files(self) -> list[Path]:
        return self.found.read

    def stem(self, file: Path) -> str:
        """A file's name without the format's suffix: an archive of its images may have it."""
        suffixes = (
            suffix for suffix in itertools.chain(self.suffixes, *self.later) if file.name.lower().endswith(suffix)
        )
        return file.name[: len(file.name) - len(max(suffixes, key=len, default=file.suffix))]

    def signature(self) -> str:
        return files_signature(itertools.chain(self.found.paths(), self.beside), self.root)

    def units(self) -> list[Unit]:
        return [*self.units_of_files(), *self.found.skipped_units()]

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        if isinstance(unit.payload, Skipped):
            count = drops.bad if unit.payload.reason == GONE else drops.left_out
            count("document", f"file that is {unit.payload.reason}", unit.name)
        else:
            yield from self.documents_of_file(unit, drops)

    def count_others(self, drops: Drops) -> None:
        for first, count in self.found.others.items():
            drops.left_out("document", f"file that is {OTHER}", first, count)

    @abstractmethod
    def units_of_files(self) -> list[Unit]:
        """Those of the files to read."""

    @abstractmethod
    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        """As `documents`."""
