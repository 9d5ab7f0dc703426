"""Objects as the files of an input: what reads a `Path` by its methods alone reads an object too, by ranges.

Nothing is copied to the disk. A file that is read from start to end is asked for in windows of 4 MiB, and an image in a
tar by one request for its bytes.
"""

from __future__ import annotations

import fnmatch
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import IO, Any

from megatron_lcl import filesystem
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.data.storage.names import UPLOADING
from megatron_lcl.data.storage.store import About, Store, url_of
from megatron_lcl.errors import UserError

WINDOW = 4 << 20
"""bytes that a file read in order is ahead of its reader"""
_REQUEST = 1 << 20


class Unreadable(BaseException):
    """An object could not be read, for good. No Exception: whoever parses a file takes most of those for damage, counts
    what is lost and goes on. `reading` makes a StorageError of it."""


@contextmanager
def reading() -> Iterator[None]:
    """Where inputs are read: an object that cannot be read is a StorageError here."""
    try:
        yield
    except Unreadable as error:
        raise StorageError(str(error)) from None


def path_of(place: str | Path) -> Path:
    """The path of a file or folder; of a URL, one whose files are objects."""
    url = url_of(place)
    return Path(place) if url is None else ObjectPath(url)


class ObjectPath(PosixPath):
    """An object, or what begins the names of several, by its URL. Read-only.

    An object has the version that it had when it was listed or first looked at, also where the path is pickled: one
    that is replaced meanwhile is `Unreadable`.
    """

    about: About | None = None
    """bytes and ETag of the object, once known"""

    def __reduce__(self) -> Any:
        return _with_about, (str(self), self.about)

    def __str__(self) -> str:
        said = super().__str__()
        return url_of(said) or said

    def __fspath__(self) -> str:
        raise AssertionError(f"{self} is no file of this machine")

    def _head(self) -> About | None:
        if self.about is None and (url := url_of(self.parent)):
            with _no_damage():
                self.about = Store(url).head([self.name])[0]
        return self.about

    def _listed(self, deep: bool) -> dict[str, About]:
        """`Store.versions`; nothing of a plain HTTP server, which has no list."""
        if str(self).startswith("http"):
            return {}
        with _no_damage():
            found = Store(str(self)).versions(deep)
        if UPLOADING in found:
            raise UserError(f"{self} is being written, or was not finished ({UPLOADING} is there); finish it first")
        return found

    def is_file(self, **_: Any) -> bool:
        return self._head() is not None

    def is_dir(self, **_: Any) -> bool:
        return not self.is_file() and bool(self._listed(deep=False))

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def resolve(self, strict: bool = False) -> ObjectPath:
        return self

    def stat(self, **_: Any) -> os.stat_result:
        about = self._head()
        if about is None:
            raise FileNotFoundError(2, "No such object", str(self))
        return os.stat_result((0, 0, 0, 0, 0, 0, about[0], 0, 0, 0))

    def matching(self, pattern: str) -> list[Path]:
        """Objects directly below."""
        return sorted(self._matching(pattern, deep=False))

    def below(self, pattern: str = "*") -> Iterator[ObjectPath]:
        """All objects below."""
        return self._matching(pattern, deep=True)

    def glob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:  # type: ignore[override]
        """For importers of other packages."""
        return self._matching(pattern, deep=False)

    def rglob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:  # type: ignore[override]
        """As `glob`."""
        return self._matching(pattern, deep=True)

    def _matching(self, pattern: str, deep: bool) -> Iterator[ObjectPath]:
        for name, about in self._listed(deep).items():
            if about[0] >= 0 and fnmatch.fnmatchcase(name.rpartition("/")[2], pattern):
                yield _with_about(f"{self}/{name}", about)

    def open(  # type: ignore[override]  # one signature for all modes
        self, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None
    ) -> IO[Any]:
        """buffering: 0 asks for exactly what is read, any other value for windows."""
        assert mode in ("r", "rb"), mode
        size = self.stat().st_size
        raw = _Reader(Store(str(self.parent)), self.name, size, self.about[1] if self.about else None)
        if buffering == 0:
            return raw  # type: ignore[return-value]
        buffered = io.BufferedReader(raw, max(1, min(size, WINDOW)))
        return buffered if mode == "rb" else io.TextIOWrapper(buffered, encoding, errors, newline)


filesystem.exists.register(ObjectPath, ObjectPath.exists)
filesystem.is_file.register(ObjectPath, ObjectPath.is_file)
filesystem.is_dir.register(ObjectPath, ObjectPath.is_dir)
filesystem.matching.register(ObjectPath, ObjectPath.matching)
filesystem.below.register(ObjectPath, ObjectPath.below)


def _with_about(path: str, about: About | None) -> ObjectPath:
    made = ObjectPath(path)
    made.about = about
    return made


@contextmanager
def _no_damage() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise Unreadable(str(error)) from None


class _Reader(io.RawIOBase):
    """The bytes of an object."""

    def __init__(self, store: Store, name: str, size: int, etag: str | None) -> None:
        self._store, self._object, self._size, self._etag = store, name, size, etag
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._take(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._take(self._size)

    def _take(self, size: int) -> bytes:
        start, stop = self._at, min(self._at + size, self._size)
        if start >= stop:
            return b""
        steps = range(start, stop, _REQUEST)
        with _no_damage():
            parts = self._store.read(self._object, [(at, min(at + _REQUEST, stop)) for at in steps], self._etag)
        self._at = stop
        return b"".join(parts)
