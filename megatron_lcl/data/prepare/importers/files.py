"""The files of an input, each once: a compressed copy beside a file is not read, and what is not read is named."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from megatron_lcl.data.corpus.document import Document
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Importer, Unit, files_signature
from megatron_lcl.errors import UserError

COMPRESSED = (".zst", ".gz", ".zip", ".bz2", ".xz", ".lz4", ".br")
"""what compresses one file; of several copies the first is read"""
TWICE = "a copy of a file beside it, compressed in another way or not"
NOT_READ = "compressed in a way that this format does not read: unpack it"


class Skipped(NamedTuple):
    """A file that is not read: payload of a unit that counts it."""

    reason: str


@dataclass(frozen=True)
class Files:
    """What lies in an input."""

    root: Path
    """names are relative to it"""
    read: list[Path]
    """the files to read, in the order of their names"""
    skipped: list[tuple[Path, str]]
    """(file, why) of those that have a format's name and are not read"""

    def name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def skipped_units(self) -> list[Unit]:
        """A unit for each skipped file."""
        return [Unit(self.name(file), 0, Skipped(why)) for file, why in self.skipped]


def find_files(input: Path, suffixes: Sequence[str], reads: str) -> Files:
    """`input` itself, or all files below it that have one of the suffixes. reads: what they are, for the error.

    Of a file and compressed copies of it in the same folder (`a.jsonl`, `a.jsonl.gz`) one is read, the uncompressed one
    if it is there. UserError where there is nothing to read.
    """
    if input.is_file():
        return Files(input.parent, [input], [])
    plain = {_uncompressed(suffix) for suffix in suffixes}
    copies: dict[Path, list[Path]] = {}
    for path in input.rglob("*"):
        base = _uncompressed(path.name)
        named = path.name.lower().endswith(tuple(suffixes)) or base.lower().endswith(tuple(plain - {""}))
        if named and path.is_file():
            copies.setdefault(path.with_name(base.removesuffix(".jsonl")), []).append(path)
    read, skipped = [], []
    for paths in copies.values():
        readable = sorted((p for p in paths if p.name.lower().endswith(tuple(suffixes))), key=_preference)
        read += readable[:1]
        chosen = readable[0] if readable else None
        skipped += [(p, TWICE if chosen else NOT_READ) for p in paths if p != chosen]
    if not read:
        packed = f"; {min(skipped)[0].name} is {NOT_READ}" if skipped else ""
        raise UserError(f"no {', '.join(suffixes)} files in {input}{packed}. The format reads: {reads}")
    return Files(input, sorted(read), sorted(skipped))


def _uncompressed(name: str) -> str:
    """The name without what says how it is compressed."""
    lower = name.lower()
    if lower.endswith(".tgz"):
        return name[: -len(".tgz")] + ".tar"
    return next((name[: -len(suffix)] for suffix in COMPRESSED if lower.endswith(suffix)), name)


def _preference(path: Path) -> tuple[int, str]:
    suffix = path.suffix.lower().replace(".tgz", ".gz")
    return (COMPRESSED.index(suffix) if suffix in COMPRESSED else -1), path.name


class FilesImporter(Importer):
    """Reads the files of a folder that have one of `suffixes`, or one file."""

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, input: Path) -> None:
        self.found = find_files(input, self.suffixes, self.reads)

    @property
    def root(self) -> Path:
        return self.found.root

    @property
    def files(self) -> list[Path]:
        return self.found.read

    def signature(self) -> str:
        return files_signature(self.files, self.root)

    def units(self) -> list[Unit]:
        return [*self.units_of_files(), *self.found.skipped_units()]

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        if isinstance(unit.payload, Skipped):
            drops.left_out("document", f"file that is {unit.payload.reason}", unit.name)
        else:
            yield from self.documents_of_file(unit, drops)

    @abstractmethod
    def units_of_files(self) -> list[Unit]:
        """Those of the files to read."""

    @abstractmethod
    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        """As `documents`."""
