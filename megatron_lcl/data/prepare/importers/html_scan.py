"""Which pages repeat another, and which images stand on several pages.

While pages are counted, what is known of each lies in a temporary database of SQLite's: a private file, in the folder
that SQLITE_TMPDIR or TMPDIR names, gone when it is closed. What stays is 4 bytes a page, and 16 an image that stands on
several.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np

from megatron_lcl.errors import UserError

_CACHE_KIB = 8192


@dataclass(frozen=True, slots=True)
class Repeats:
    """What was found out. Pages have numbers from 0; whatever repeats is known by half of its XXH3-128."""

    original: array[int]
    """of each page, the first page that is the same; its own number where none is"""
    images: np.ndarray
    """int64 [n], ascending: those on several pages"""
    num_pages: np.ndarray
    """int32 [n]: on how many"""
    last_page: np.ndarray
    """int32 [n]: the last page on which one may stay"""

    def of_image(self, digest: bytes, page: int) -> tuple[int, bool]:
        """(number of pages on which it stands, whether it may stay on this one)."""
        key = _key(digest)
        k = int(np.searchsorted(self.images, key))
        if k == len(self.images) or self.images[k] != key:
            return 1, True
        return int(self.num_pages[k]), page <= self.last_page[k]


class Tally:
    """Counts pages, in order, and the images on each."""

    def __init__(self, database: sqlite3.Connection, max_repeats: int) -> None:
        self._database, self._max_repeats = database, max_repeats
        self._original = array("i")
        database.execute("PRAGMA journal_mode = OFF")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        database.execute("CREATE TABLE page (key INTEGER PRIMARY KEY, number INTEGER)")
        database.execute("CREATE TABLE image (key INTEGER PRIMARY KEY, pages INTEGER, last INTEGER)")
        database.execute("BEGIN")

    def add_page(self, digest: bytes) -> bool:
        """Whether no page before is the same."""
        key, number = _key(digest), len(self._original)
        if self._database.execute("INSERT OR IGNORE INTO page VALUES (?, ?)", (key, number)).rowcount:
            self._original.append(number)
            return True
        self._original.append(*self._database.execute("SELECT number FROM page WHERE key = ?", (key,)).fetchone())
        return False

    def add_images(self, digests: Iterable[bytes]) -> None:
        """Those of the page that was added last, each once."""
        page = len(self._original) - 1 if self._max_repeats > 0 else -1
        self._database.executemany(
            "INSERT INTO image VALUES (?, 1, ?) ON CONFLICT (key) DO UPDATE SET "
            "pages = pages + 1, last = CASE WHEN pages < ? THEN excluded.last ELSE last END",
            [(_key(digest), page, self._max_repeats) for digest in digests],
        )

    def repeats(self) -> Repeats:
        least = 1 if self._max_repeats > 0 else 0  # 0: none may stay, be it on one page only
        rows = self._database.execute("SELECT key, pages, last FROM image WHERE pages > ? ORDER BY key", (least,))
        found = np.fromiter(rows, np.dtype([("key", "i8"), ("pages", "i4"), ("last", "i4")]))
        return Repeats(self._original, *(found[name].copy() for name in ("key", "pages", "last")))


@contextmanager
def counting(max_repeats: int) -> Iterator[Tally]:
    """max_repeats: pages on which an image may stay, the first. UserError where the temporary file has no room."""
    with closing(sqlite3.connect("", isolation_level=None)) as database:
        try:
            yield Tally(database, max_repeats)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"a temporary file of the scan: {error}; the variable TMPDIR names a folder that has room"
            ) from None


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)
