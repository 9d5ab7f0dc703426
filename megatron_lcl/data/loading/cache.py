"""The cache folder: what one process builds and all may use, and which of it goes.

    <cache>/packs-<hash>/, documents-<hash>/   what `index` and `source` keep; complete or not there
    <cache>/packs-<hash>.json                  the record of a chunk whose folder was deleted
    <cache>/<name>.<random>.tmp/               a folder that one process builds
    <cache>/<name>.lock                        held by the process that builds

Nothing here depends on locks, which some file systems do not have (Lustre without `-o flock`) and others keep to one
machine (`localflock`, some NFS): each builder has a folder of its own, renaming it is the only way in, who comes second
throws its own away, and what is deleted is built again. Locks only save work.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.cache_folders import (
    ELSEWHERE,
    Use,
    age_of,
    descriptor_of,
    in_use,
    not_writable,
    or_default,
    user_cache,
)
from megatron_lcl.data.corpus.files import replace_bytes, sync_all
from megatron_lcl.data.corpus.owners import now_in
from megatron_lcl.data.corpus.scratch import kept_fresh, lock_file, try_lock
from megatron_lcl.errors import UserError, is_full
from megatron_lcl.filesystem import GONE, exists, is_dir, matching

RECORD = "chunk.json"
"""the file of a folder that outlives it, as <folder>.json"""
BEAT_SECONDS = 10.0
"""how often a builder sets its folder's time, so that it is seen to be alive"""
LOST_SECONDS = 60.0
"""a folder being built whose time does not change for so long has no builder that others should wait for"""
POLL_SECONDS = 0.1
"""between attempts at a lock that another builder holds"""
RECENT_SECONDS = 300.0
"""chunks used since are kept, whatever the limit"""
CONSUMED_SECONDS = 3600.0
"""chunks not used since are deleted, whatever the limit"""
DAY = 86400.0
"""what others have mapped, and what may still be built, is deleted when its time is older"""
_LEFT_OVER = {".old": 0.0, ".tmp": DAY, ".lock": DAY, ".json": 30 * DAY}
"""ages at which what is no folder in use is deleted"""
_SHARED = ("packs-", "documents-")
_INDEX = "the pack index cannot be written to"
_T = TypeVar("_T")


def cache_folder(data: Data) -> Path:
    """See `user_cache`."""
    return user_cache(data.cache)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """XXH3-128 of plain values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs, sort_keys=True).encode())


# --- building ----------------------------------------------------------------------------------------------------


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Have `folder` built, by one process while others wait for it, as far as locks work; complete or not there.

    A builder that dies frees its lock; one that only seems to live is waited for no longer than twice LOST_SECONDS.
    UserError where the folder cannot be written.
    """
    with contextlib.ExitStack() as until_built:
        try:
            if is_dir(folder):
                return folder
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = until_built.enter_context(lock_file(folder.with_name(folder.name + ".lock")))
        except OSError as error:
            raise not_writable(_INDEX, folder.parent, error) from None
        # by its own pauses: the clock of the file server may be another, and runs while a job is suspended as a whole
        seen, left = _beats(folder), LOST_SECONDS
        while not try_lock(lock):
            if is_dir(folder):
                return folder
            if left <= 0:
                before, seen, left = seen, _beats(folder), LOST_SECONDS
                if seen == before:
                    break
            time.sleep(POLL_SECONDS)
            left -= POLL_SECONDS
        if not is_dir(folder):
            _build(folder, build)
    return folder


def build_and_open(folder: Path, build: Callable[[Path], None], opened: Callable[[Path], _T]) -> _T:
    """What `opened` makes of a folder that is there or is built; again, where it is deleted in between or not whole.

    Releases that did not sync what they built may have left files that are empty or end too early, after a power
    failure; `opened` raises ValueError or EOFError for them. UserError where such a folder cannot be deleted, and where
    another user has built one that only that user may read.
    """
    deleted = True
    for left in (2, 1, 0):
        built = build_once(folder, build)
        try:
            return opened(built)
        except PermissionError as error:
            raise UserError(
                f"{built} was built by another user, and may not be read ({error.strerror}); have that user share it "
                f"(chmod -R a+rX {built}) and build with such a umask (022, or 002 for a group)"
                f"{or_default(folder.parent)}",
                ELSEWHERE,
            ) from None
        except OSError as error:
            if error.errno not in GONE or not left:
                raise
        except (ValueError, EOFError) as error:
            if not left and not deleted:  # another user's
                raise UserError(f"{built} is damaged ({error}); delete it, it will be built again") from None
            if not left:
                raise
        deleted = _delete(built)
    raise AssertionError


def _beats(folder: Path) -> dict[Path, int]:
    """The times of what is being built for a folder."""
    found = {}
    for path in matching(folder.parent, folder.name + ".*.tmp"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            found[path] = path.stat().st_mtime_ns
    return found


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")  # who may use it, the umask says
    try:
        temporary.mkdir()
    except OSError as error:
        raise not_writable(_INDEX, folder.parent, error) from None
    try:
        with kept_fresh(temporary, BEAT_SECONDS):
            build(temporary)
            sync_all(temporary)  # else a renamed folder may have empty files after a crash
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another builder came first
                raise
    except OSError as error:
        if not is_full(error):
            raise
        raise not_writable(_INDEX, folder.parent, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- using -------------------------------------------------------------------------------------------------------


def using(folder: Path, file: str) -> Use:
    """`Use`, renewed ten times within the age at which the folder counts as unused."""
    return Use(folder, file, _unused_seconds(folder) / 10)


class Rows:
    """Rows of a `.npy` file of one dimension, read when they are asked for.

    Not mapped: where another machine deletes a mapped file on NFS, the process that looks at it is killed (SIGBUS). A
    read fails there with ESTALE; elsewhere a file that is open outlives its deletion. ValueError where the file is
    damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, descriptor_of(self, path)
        with open(self._descriptor, "rb", buffering=0, closefd=False) as file:
            version = np.lib.format.read_magic(file)
            assert version == (1, 0)
            (num,), _, self._dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        if os.fstat(self._descriptor).st_size < self._start + num * self._dtype.itemsize:
            raise ValueError(f"{path.name} ends too early")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop-1, read-only."""
        rows = np.empty(stop - start, self._dtype)
        left, at = rows.view(np.uint8).data, self._start + start * self._dtype.itemsize
        while len(left):
            read = os.preadv(self._descriptor, [left], at)  # Linux gives at most 2 GiB at a time
            if not read:
                raise UserError(f"{self._path} ends too early; delete {self._path.parent}, it will be built again")
            left, at = left[read:], at + read
        rows.flags.writeable = False
        return rows


def _unused_seconds(folder: Path) -> float:
    """The age at which a folder's time says that nobody uses it."""
    return RECENT_SECONDS if _is_chunk(folder) else DAY


def _is_chunk(folder: Path) -> bool:
    return folder.name.startswith("packs-")


# --- deleting ----------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a chunk's folder, also when that is deleted; None: it has to be built."""
    for path in (folder / RECORD, _record_of(folder)):  # in this order: see `_delete`
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return record
    return None


def _record_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".json")


def trim(cache: Path, limit: float, keep: Path) -> None:
    """Delete chunks that were consumed, and, while the cache has over `limit` bytes, what was unused longest.

    What a process has open (as far as locks say so), what was used of late and the folder `keep` stay. Deleting the
    wrong thing costs the time to build it again; only a mapped `documents-…` must not go under a reader, so those have
    to be unused for a day. Records and what was left by dead builders go when they are old. What only another user may
    delete stays, and counts.
    """
    folders, now = [], now_in(cache)
    for path in matching(cache, "*"):
        age = age_of(path, now)
        if not path.name.removeprefix(".").startswith(_SHARED) or age == float("inf"):
            continue
        if is_dir(path) and not path.suffix:
            folders.append((age, path, _size(path)))
        elif age > _LEFT_OVER.get(path.suffix, float("inf")):
            with contextlib.suppress(OSError):  # another user's
                shutil.rmtree(path, ignore_errors=True) if is_dir(path) else path.unlink(missing_ok=True)
    total = sum(size for *_, size in folders)
    for age, path, size in sorted(folders, reverse=True):
        unused = age > _unused_seconds(path)
        wanted = (total > limit and unused) or (_is_chunk(path) and age > CONSUMED_SECONDS)
        # one that cannot be emptied would keep its room under another name, and not count
        if wanted and path != keep and os.access(path, os.W_OK) and not in_use(path, unknown=False) and _delete(path):
            total -= size


def _size(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except OSError:  # deleted meanwhile
        return 0


def _delete(folder: Path) -> bool:
    """Delete a folder but for its record, which is under its new name before it is gone under the old one."""
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.old")
    try:
        if exists(folder / RECORD):
            replace_bytes(_record_of(folder), (folder / RECORD).read_bytes())
        folder.rename(gone)
    except OSError:  # another process was faster, or the folder is another user's
        return False
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or another user's
        folder.with_name(folder.name + ".lock").unlink()
    return True
