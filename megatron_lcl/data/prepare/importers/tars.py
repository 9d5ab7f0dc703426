"""The files in tars, and the samples of WebDataset's; what a damaged tar still holds is read."""

from __future__ import annotations

import contextlib
import importlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, cast

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.files import MAX_FILE, FilesImporter
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import raise_if_passing

DAMAGE: tuple[type[Exception], ...] = (
    tarfile.TarError, OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError,
)  # fmt: skip
with contextlib.suppress(ImportError):  # `tarfile` opens Zstandard too from Python 3.14 on
    DAMAGE += (importlib.import_module("compression.zstd").ZstdError,)
_MAX_HEADER = 1 << 20
"""bytes of a name that stands before a member, or of its attributes, which on a Mac may be some hundred KiB"""
_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
"""types of what stands before a member and is read as a whole"""
_ABOUT_THE_SET = re.compile(r"__[^/]*__($|/)")
"""names of a WebDataset's files that are no part of a sample"""


class TarImporter(FilesImporter):
    """A tar file or a folder of them, which hold texts and images alike."""

    format: ClassVar[str]
    suffixes = (".tar", ".tar.gz", ".tgz")
    reads_objects = True

    def __init__(self, input: Path, images: Path | None = None) -> None:
        if images is not None:
            raise UserError(f"format {self.format} has its images in the tars; leave out --images")
        super().__init__(input)
        # earlier releases read only the first part of a file that was compressed in several
        self.rules += any(file.suffix.lower() in (".gz", ".tgz") for file in self.files)

    def units_of_files(self) -> list[Unit]:
        """Payload: the path."""
        return [Unit(self.found.name(file), file.stat().st_size, file) for file in self.files]


def tar_files(file: IO[bytes], mode: Literal["r:", "r:*"] = "r:") -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """(archive, member) of each regular file in a tar, in order; mode "r:*" also reads a compressed one.

    Raises one of DAMAGE, after the members before it, unless the tar ends with a block of zeros and nothing but zeros
    follows. `tarfile` alone takes a damaged header for the end, and so a cut between members, zeros where a member
    was, and the first end in a tar that others are appended to.
    """
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_Header) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else all are kept, 1 kB each
            if not 0 <= member.size < 1 << 60:
                raise tarfile.ReadError(f"{member.size} bytes as the size of a member")
            if member.isfile():
                yield archive, member
        assert archive.fileobj is not None
        while block := archive.fileobj.read(1 << 20):
            if block.count(0) < len(block):
                raise tarfile.ReadError(f"more than zeros behind its end at byte {archive.offset}")


class _Header(tarfile.TarInfo):
    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """As tarfile's own, but for sizes that would be read at once, whatever they are. (Later Pythons make a header
        without `frombuf`.)"""
        if self.type in _HEADERS and not 0 <= self.size <= _MAX_HEADER:
            raise tarfile.ReadError(f"{self.size} bytes as the size of a header")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:  # type: ignore[override]
        """As tarfile's own, but for a header that cannot be read, which it would take for the end."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None


def tar_samples(unit: Unit, drops: Drops) -> Iterator[dict[str, Any]]:
    """{"__key__": key, suffix: bytes, …} of each sample."""
    from webdataset.tariterators import group_by_keys

    def count(error: Exception) -> bool:
        """Called by the library for whatever goes wrong; True to go on with the next file."""
        if not isinstance(error, ValueError):
            raise error
        drops.bad("document", "file name twice in a tar", unit.name)
        return True

    try:
        with unit.payload.open("rb") as stream:
            yield from group_by_keys(_contents(_Remembering(stream), unit, drops), handler=count)
    except OSError as error:
        raise_if_passing(error, unit.payload)
        drops.bad("document", f"file cannot be read ({error.strerror})", unit.name)


class _Remembering:
    """A file that keeps what it was last not read for: `tarfile` tries one compression after another, and of an error
    in the file says no more than that it is of none."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _contents(stream: _Remembering, unit: Unit, drops: Drops) -> Iterator[dict[str, Any]]:
    """The files of a tar as `group_by_keys` takes them."""
    name = unit.name
    try:
        for archive, member in tar_files(cast(IO[bytes], stream), "r:*"):
            if member.size > MAX_FILE:
                drops.left_out("document", f"file over {MAX_FILE >> 20} MiB in a tar", f"{name}: {member.name}")
            elif not _ABOUT_THE_SET.match(member.name):
                content = archive.extractfile(member)
                assert content is not None
                yield {"fname": member.name, "data": content.read(), "__url__": name}
    except DAMAGE as error:
        raise_if_passing(stream.error or error, unit.payload)
        drops.bad("document", "damaged or truncated tar, the samples after it are lost", name)
