"""JSON lines from plain, gzip, zstandard and zip files; what a damaged file still holds is read, the rest counted."""

from __future__ import annotations

import bisect
import codecs
import functools
import json
import operator
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

import msgspec
import zstandard

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.files import FilesImporter
from megatron_lcl.data.prepare.importers.sources import decoded_file
from megatron_lcl.data.prepare.importers.zips import DAMAGE, open_member
from megatron_lcl.filesystem import raise_if_passing

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zip")
NDJSON = (".ndjson", ".ndjson.gz", ".ndjson.zst")
JSON = (".json", ".json.gz", ".json.zst")
"""may be lines (C4's are), an array, or something that only lies beside the data"""
T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R")
_DECODER = json.JSONDecoder()
_CHUNK = 1 << 16
_COMPRESSED_CHUNK = 1 << 10
"""a hostile one makes a thousand times as much with gzip, thirty thousand times with zstandard"""
RANGE = 8 << 20
"""bytes of a plain file that are a unit"""
MAX_LINE = 64 << 20
"""bytes; a longer one is not read"""
_SAMPLE_BYTES = 4096
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def line_units(files: Iterable[Path], name: Callable[[Path], str]) -> list[Unit]:
    """A unit for each compressed file, and for each 8 MiB of a plain one. Payload: (path, first byte, end)."""
    units = []
    for file in files:
        size = file.stat().st_size
        if is_compressed(file):
            units.append(Unit(name(file), size, (file, 0, size)))
        else:
            for start in range(0, max(size, 1), RANGE):
                end = min(size, start + RANGE)
                units.append(Unit(name(file), end - start, (file, start, end)))
    return units


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in (".gz", ".zst", ".zip")


def json_lines(unit: Unit, drops: Drops) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, object) of each line of a unit that holds a JSON object; others are counted as bad documents.

    The name is the file's with the line's first byte, or, in a compressed file, its number.
    """
    return _values(unit, drops, msgspec.json.decode, {dict})


def typed_lines(unit: Unit, drops: Drops, kind: type[T]) -> Iterator[tuple[str, dict[str, Any] | T]]:
    """The same, but a line that is exactly a `kind` comes as one, which is read faster."""
    decode = msgspec.json.Decoder(kind).decode

    def decode_either(line: bytes) -> Any:
        try:
            return decode(line)
        except msgspec.ValidationError:
            return msgspec.json.decode(line)

    return _values(unit, drops, decode_either, {dict, kind})


def _values(unit: Unit, drops: Drops, decode: Callable[[bytes], Any], wanted: set[type]) -> Iterator[tuple[str, Any]]:
    for name, line, complete in text_lines(unit, drops):
        try:
            value = decode(line)
        # stricter than Python's parser: NaN, lone surrogates, invalid UTF-8, its mark
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            text = decoded_file(line, name, drops).strip()
            if not text:
                continue
            try:
                value, end = _DECODER.raw_decode(text)
            except (ValueError, RecursionError):
                end = -1
            if end != len(text):
                drops.bad("document", "not JSON" if complete else "cut last line", name, sample=text)
                continue
        if type(value) in wanted:
            yield name, value
        else:
            drops.bad("document", "not a JSON object", name, sample=line.decode(errors="replace"))


def text_lines(unit: Unit, drops: Drops, wide: str = "") -> Iterator[tuple[str, bytes, bool]]:
    """(name, line, ends with a line end) of each line of a unit of `line_units`; names as in `json_lines`.

    wide: a charset in which a line end is another byte than in ASCII, or several. Then the unit has to be a whole file,
    and the lines, which are in UTF-8, have the names of a compressed one's.
    """
    path, start, end = unit.payload

    def read(file: BinaryIO) -> Iterator[tuple[str, bytes, bool]]:
        if not is_compressed(path) and not wide:
            return _range(unit.name, file, start, end, drops)
        chunks = _chunks(unit.name, path, file, drops)
        return _split(unit.name, _as_utf8(chunks, wide) if wide else chunks, drops)

    return _read_by(read, unit, drops)


def file_chunks(unit: Unit, drops: Drops) -> Iterator[bytes]:
    """The bytes of a unit that is a whole file, without its compression."""
    return _read_by(lambda file: _chunks(unit.name, unit.payload[0], file, drops), unit, drops)


def _read_by(read: Callable[[BinaryIO], Iterator[R]], unit: Unit, drops: Drops) -> Iterator[R]:
    """What `read` finds in a unit's file; one that the system does not read, or not to its end, is counted."""
    path = unit.payload[0]
    try:
        with path.open("rb", _CHUNK) as file:
            yield from read(file)
    except OSError as error:
        raise_if_passing(error, path)
        drops.bad("document", f"file cannot be read ({error.strerror})", unit.name)


def _chunks(name: str, path: Path, file: BinaryIO, drops: Drops) -> Iterator[bytes]:
    if is_compressed(path):
        return _decompressed(name, path.suffix.lower(), file, drops)
    return iter(lambda: file.read(_CHUNK), b"")


def _range(name: str, file: BinaryIO, start: int, end: int, drops: Drops) -> Iterator[tuple[str, bytes, bool]]:
    """Lines that begin in [start, end)."""
    position = start
    if start:
        file.seek(start - 1)
        while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
            pass
        position = file.tell()
    while position < end and (line := file.readline(MAX_LINE)):
        label = f"{name}@{position}"
        position += len(line)
        complete = line.endswith(b"\n")
        if complete or len(line) < MAX_LINE:
            yield label, line, complete
            continue
        drops.bad("document", "line too long", label, sample=_begin(line))
        while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
            pass
        position = file.tell()


def _as_utf8(chunks: Iterable[bytes], charset: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(charset)("replace")
    for chunk in chunks:
        yield decoder.decode(chunk).encode()
    yield decoder.decode(b"", True).encode()


def _split(name: str, chunks: Iterable[bytes], drops: Drops) -> Iterator[tuple[str, bytes, bool]]:
    number, pending, size, skipping = 0, [b""], 0, False
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            number += 1
            if not skipping:
                yield f"{name}:{number}", b"".join([*pending, line]), True
            pending, size, skipping = [], 0, False
        if rest and not skipping:
            pending.append(rest)
            size += len(rest)
            if size > MAX_LINE:
                drops.bad("document", "line too long", f"{name}:{number + 1}", sample=_begin(b"".join(pending[:2])))
                pending, skipping = [], True
    if line := b"".join(pending):
        yield f"{name}:{number + 1}", line, False


def _begin(line: bytes) -> str:
    return line[:_SAMPLE_BYTES].decode(errors="replace")


# --- compressed files --------------------------------------------------------------------------------------------


def _decompressed(name: str, suffix: str, file: BinaryIO, drops: Drops) -> Iterator[bytes]:
    chunks: Iterator[bytes] = iter(lambda: file.read(_COMPRESSED_CHUNK), b"")
    if suffix == ".gz":
        yield from _inflate(name, chunks, lambda: zlib.decompressobj(31), drops)
    elif suffix == ".zst":
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        yield from _inflate(name, chunks, lambda: decompressor.decompressobj(_CHUNK), drops)
    else:
        yield from _unzip(name, file, drops)


def _inflate(name: str, chunks: Iterable[bytes], new: Callable[[], Any], drops: Drops) -> Iterator[bytes]:
    """The concatenated streams of a file; a damaged or truncated end is counted."""
    stream: Any = None
    try:
        for chunk in chunks:
            while chunk:
                stream = stream or new()
                yield stream.decompress(chunk)
                chunk = stream.unused_data if stream.eof else b""
                if stream.eof:
                    stream = None
    except (zlib.error, zstandard.ZstdError):
        drops.bad("document", "damaged file, the lines after it are lost", name)
        return
    if stream is not None:
        drops.bad("document", "truncated file, the lines after it are lost", name)


def _unzip(name: str, file: BinaryIO, drops: Drops) -> Iterator[bytes]:
    """The one member of a zip file, whatever its name; without a directory (truncated), what its first member holds.

    Of several members each begins a line.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OverflowError, struct.error, NotImplementedError) as error:
        raise_if_passing(error, getattr(file, "name", name))
        yield from _unzip_without_directory(name, file, drops)
        return
    # is_dir() raises for an empty name
    members = [member for member in archive.infolist() if not member.filename.endswith("/")]
    if len(members) != 1:
        drops.note("document", f"zip holds {len(members)} files, not one", name)
    last = b"\n"
    for member in members:
        if last != b"\n":
            yield (last := b"\n")
        try:
            with open_member(archive, member) as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
                    last = chunk[-1:]
        except NotImplementedError:
            drops.bad("document", "zip method not known", name)
        except DAMAGE as error:
            raise_if_passing(error, getattr(file, "name", name))
            drops.bad("document", "damaged file, the lines after it are lost", name)


def _unzip_without_directory(name: str, file: BinaryIO, drops: Drops) -> Iterator[bytes]:
    file.seek(0)
    head = file.read(_LOCAL_HEADER.size)
    if len(head) < _LOCAL_HEADER.size or head[:4] != b"PK\x03\x04":
        drops.bad("document", "not a zip file", name)
        return
    _, _, _, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(head)
    file.seek(name_length + extra_length, 1)
    chunks: Iterator[bytes] = iter(lambda: file.read(_COMPRESSED_CHUNK), b"")
    if method == zipfile.ZIP_DEFLATED:
        stream = zlib.decompressobj(-15)
        try:
            for chunk in chunks:
                yield stream.decompress(chunk)
                if stream.eof:
                    break
        except zlib.error:
            pass  # counted below, like any other end
        complete = stream.eof
    elif method == zipfile.ZIP_STORED:
        yield from chunks
        complete = False
    else:
        drops.bad("document", "zip method not known", name)
        return
    if complete:
        drops.note("document", "zip has no directory, its first file was read", name)
    else:
        drops.bad("document", "truncated file, the lines after it are lost", name)


# --- the importers of lines --------------------------------------------------------------------------------------


class LinesImporter(FilesImporter):
    """Reads files of JSON lines."""

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    reads_objects = True

    def units_of_files(self) -> list[Unit]:
        return line_units(self.files, self.found.name)

    @functools.cached_property
    def _line_numbers(self) -> LineNumbers:
        return LineNumbers(line_units(self.files, self.found.name))

    def place(self, name: str) -> str:
        return self._line_numbers.name(name)


class LineNumbers:
    """Line numbers of places in plain files, which units know by their bytes: `a.jsonl@1234` → `a.jsonl:17`.

    Counted only for the names that are shown; whatever their order, no part of a file is read twice.
    """

    def __init__(self, units: Iterable[Unit]) -> None:
        # names as `Drops` has them
        self._files: dict[str, Path] = {u.name.encode(errors="backslashreplace").decode(): u.payload[0] for u in units}
        self._counted: dict[Path, list[tuple[int, int]]] = {}
        """(position, line ends before it), in order"""

    def name(self, place: str) -> str:
        """The place with its line number, counted from 1; unchanged where it is none of a plain file."""
        found = re.match(r"(.+?)@(\d+)(?=$|: )", place)
        file = self._files.get(found[1]) if found else None
        if found is None or file is None:
            return place
        try:
            line = self._line(file, int(found[2]))
        except OSError:
            return place
        return f"{found[1]}:{line}{place[found.end() :]}"

    def _line(self, file: Path, position: int) -> int:
        counted = self._counted.setdefault(file, [(0, 0)])
        i = bisect.bisect_right(counted, position, key=operator.itemgetter(0))
        at, ends = counted[i - 1]
        if at < position:
            with file.open("rb") as opened:
                opened.seek(at)
                while at < position and (block := opened.read(min(_CHUNK, position - at))):
                    ends += block.count(b"\n")
                    at += len(block)
            counted.insert(i, (at, ends))
        return ends + 1
