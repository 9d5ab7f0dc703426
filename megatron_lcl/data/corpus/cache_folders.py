"""Cache folders: where they are, who uses one, and how room is made.

Whoever reads from a folder holds a shared lock on one of its files, and sets the folder's time now and then: other
machines may not see the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from megatron_lcl.data.corpus.owners import UNUSED_SECONDS, now_in
from megatron_lcl.data.corpus.scratch import lock_file
from megatron_lcl.data.storage.blocks import disk_use
from megatron_lcl.data.storage.open_files import allow_open_files
from megatron_lcl.errors import UserError, free_space, is_full
from megatron_lcl.filesystem import exists, is_dir, matching

ELSEWHERE = {"--data.cache": ", or set data.cache to another folder"}
"""what else to do about a cache folder, for UserError"""


def user_cache(given: str | Path | None = None) -> Path:
    """`given` (a run's `data.cache`), or megatron_lcl in the user's cache folder. UserError where there is neither:
    a container's user may have no home folder."""
    try:
        if given:
            return Path(given).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_lcl"
    except RuntimeError:  # of Path
        raise UserError(
            f"there is no home folder for {given or 'the cache'}; set {'HOME' if given else 'XDG_CACHE_HOME'} to a "
            "folder",
            ELSEWHERE,
        ) from None


def writable_cache(given: str | None) -> str | None:
    """`given` (a run's `data.cache`), or None where it cannot be written, as on another machine than the run's."""
    if given is None:
        return None
    try:
        user_cache(given).mkdir(parents=True, exist_ok=True)
        return given if os.access(user_cache(given), os.W_OK) else None
    except (OSError, UserError):
        return None


def not_writable(what: str, cache: Path, error: OSError) -> UserError:
    """The error for a cache folder that cannot be written. what: what it is of, as far as the folder's name."""
    said, remedy = str(error.strerror), "make it writable"
    if is_full(error):
        said, remedy = f"{said}, {free_space(cache)}", "make room there"
    return UserError(f"{what} {cache} ({said}); {remedy}{or_default(cache)}", ELSEWHERE)


def or_default(cache: Path) -> str:
    """How a remedy goes on where the folder follows the user's cache folder."""
    try:
        return ", or set XDG_CACHE_HOME to another folder" if cache == user_cache() else ""
    except UserError:
        return ""


_TRIES, _PAUSE_SECONDS = 100, 0.05
"""of a shared lock: `in_use` holds the other one for a moment, or for long where its process is suspended then"""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file, once no other process does; there may be none, or one on each machine: it saves work."""
    with lock_file(path) as lock:
        if lock is not None:
            with contextlib.suppress(OSError):  # no locks here
                lock_descriptor(lock, blocking=True)
        yield


class Use:
    """A folder that this process reads: others see it by a shared lock on one of its `.json` files, which is all that
    `in_use` looks at, and by the folder's time, which is renewed when it is older than so many seconds. OSError where
    the file cannot be opened."""

    def __init__(self, folder: Path, file: str, seconds: float) -> None:
        assert file.endswith(".json"), file
        self.folder, self._seconds = folder, seconds
        descriptor = descriptor_of(self, folder / file)
        with contextlib.suppress(OSError):  # no locks here
            for _ in range(_TRIES):
                try:  # `filelock` has shared locks only through SQLite or marker files
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_PAUSE_SECONDS)
        self._renewed = -math.inf
        self.renew()

    def renew(self) -> None:
        """Say that it is still used; to be called at every use.

        Of all processes on all machines, one sets the folder's time, and the others see that it is new: each has many
        folders open, and the file server is theirs all.
        """
        if time.monotonic() - self._renewed > self._seconds:
            self._renewed = time.monotonic()
            if age_of(self.folder, time.time()) > self._seconds:
                with contextlib.suppress(OSError):  # deleted meanwhile, or another user's
                    os.utime(self.folder)


def in_use(folder: Path, unknown: bool) -> bool:
    """Whether a process has the folder open, as far as locks on its `.json` files say so: see `Use`. unknown: what to
    say where they cannot."""
    try:
        files = matching(folder, "*.json")
    except OSError:  # another user's
        return unknown
    for path in files:
        try:
            with open(path, "r+b") as file:  # NFS gives an exclusive lock only to who may write
                if not lock_descriptor(file.fileno(), blocking=False):
                    return True
        except OSError:
            if unknown:
                return True
    return False


def make_room(keep: Path, left: float, prefix: str) -> bool:
    """Delete folders beside `keep`, of a prefix, that nobody has used for a day until the others take up to `left`
    bytes; whether any was."""
    others, now = [], now_in(keep.parent)
    for folder in matching(keep.parent, f"{prefix}*"):
        with contextlib.suppress(OSError):
            if folder != keep and is_dir(folder):
                others.append((age_of(folder, now), folder, disk_use(folder)))
    total = before = sum(size for *_, size in others)
    for age, folder, size in sorted(others, reverse=True):
        if total > left and age > UNUSED_SECONDS and not in_use(folder, unknown=True):
            gone = keep.with_name(prefix + uuid.uuid4().hex)  # so that what is left of one is not taken for whole
            with contextlib.suppress(OSError):
                folder.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
            if not exists(folder):  # of several processes that want room one has renamed it
                total -= size
    return total < before


def age_of(path: Path, now: float) -> float:
    """Seconds between a file's or folder's time and `now`; infinite where it is gone.

    A time to come says as little of use as one that is over: whoever set it had a wrong clock, and it may stay for
    years.
    """
    try:
        return abs(now - path.stat().st_mtime)
    except OSError:
        return float("inf")


def descriptor_of(owner: Any, path: Path) -> int:
    """A descriptor of a file, to be read; closed when its owner is gone. A run has one or more of each corpus."""
    allow_open_files()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(owner, os.close, descriptor).atexit = False
    return descriptor
