"""Several processes that write into one folder: each has a scratch folder of its own, and never touches another's.

A complete folder is renamed into place, which succeeds for exactly one process; so nothing depends on a lock. Locks,
where the file system has them, save work that would be done twice.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from megatron_lcl.data.corpus.files import sync
from megatron_lcl.errors import UserError
from megatron_lcl.interrupts import ending_on_sigterm
from megatron_lcl.processes import UNGUARDED, runs_script_again

UNUSED_SECONDS = 86400.0
"""after which what nobody has used or written is taken for left over"""
_PREFIX = "scratch-"
_OWNER = re.compile(r"(.+)-(\d+)-[0-9a-f]{32}")
"""how a scratch folder's name ends: machine, process, and what is this folder's alone"""
_POLL_SECONDS = 0.2
"""between attempts at a lock that another process holds"""
logger = logging.getLogger(__name__)


@contextmanager
def scratch_folder(work: Path, prefix: str = _PREFIX) -> Iterator[Path]:
    """A new folder below `work` for this process alone; gone at the end, with what is in it.

    prefix: how its name begins.
    """
    folder = work / f"{prefix}{_machine()}-{os.getpid()}-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a complete folder; where another process was first, its folder stays and ours is discarded."""
    try:
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that is renamed to it at the end, and gone where that is not reached: by SIGTERM too,
    and after SIGKILL when the next one is made for the same output.

    UserError where `output` is there and not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; give a new folder")
    beside, prefix = output.absolute().parent, f".{output.name}."
    beside.mkdir(parents=True, exist_ok=True)
    clear_dead(beside, UNUSED_SECONDS, prefix)
    with ending_on_sigterm(), scratch_folder(beside, prefix) as folder:
        yield folder
        sync(folder)
        if output.exists():
            output.rmdir()
        folder.rename(output)
        sync(output.parent)


def clear_dead(work: Path, idle: float = float("inf"), prefix: str = _PREFIX) -> None:
    """Remove the scratch folders, of a prefix, of this machine's processes that have ended.

    idle: seconds without a write, after which a process of another machine is taken for ended too.
    """
    for folder in work.glob(glob.escape(prefix) + "*"):
        if (owner := _OWNER.fullmatch(folder.name.removeprefix(prefix))) is None:
            continue  # a user's
        machine, pid = owner[1], int(owner[2])
        ended = not _alive(pid) if machine == _machine() else time.time() - _written(folder) > idle
        if ended:
            shutil.rmtree(folder, ignore_errors=True)


def is_scratch(path: Path) -> bool:
    """Whether a folder is a process's scratch folder; one of another machine stays when that process is killed."""
    return path.name.startswith(_PREFIX)


def is_used(work: Path) -> bool:
    """Whether any process has a scratch folder here; one of another machine may be dead."""
    return next(work.glob(_PREFIX + "*"), None) is not None


@contextmanager
def lock_file(path: Path) -> Iterator[int | None]:
    """The descriptor of a file to be locked, which is made where it is missing; None where it may not be opened.

    In a folder of several users it may be another's, which may only be read: it is locked all the same, but on NFS.
    PermissionError where it is missing and may not be made.
    """
    descriptor = _open_lock(path)
    if descriptor is not None:
        with suppress(OSError):  # another user's
            os.utime(descriptor)  # it is in use: old ones are deleted
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_lock(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not path.exists():
            raise
    with suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None


@contextmanager
def waiting_for_others(file: Path) -> Iterator[None]:
    """Hold a lock on `file`, once no other process does; without one where the file system has no locks. UserError
    where that one waits for this process.

    The lock ends with its process, however that ends. (filelock's `FileLock` would put a marker file in its place where
    there are no locks, which a process that is killed on another machine leaves behind for ever.)
    """
    with lock_file(file) as lock:
        if not try_lock(lock):
            if runs_script_again():  # its holder waits for this process, and would for ever
                raise UserError(UNGUARDED)
            logger.warning("%s: another process is at work; waiting for it", file.with_suffix(""))
            assert lock is not None
            with suppress(OSError):
                lock_descriptor(lock, poll_interval=_POLL_SECONDS)
        yield


@contextmanager
def unless_others(file: Path) -> Iterator[bool]:
    """The same without waiting: False, and no lock, where another process holds it."""
    with lock_file(file) as lock:
        yield try_lock(lock)


def try_lock(lock: int | None) -> bool:
    """Whether the lock of `lock_file`, which is asked for once, is ours by now, or there are none."""
    if lock is None:
        return True
    try:
        return lock_descriptor(lock, blocking=False)
    except OSError:
        return True


def _machine() -> str:
    """Names where process ids are unique, until the next boot: hosts may share a name, and containers a host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip().replace("-", "")
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid.uuid4().hex  # no process's


def _written(folder: Path) -> float:
    """When something was last written in a folder, as seconds since 1970."""
    last = 0.0
    for root, _, files in os.walk(folder):
        for path in (root, *(os.path.join(root, name) for name in files)):
            with suppress(OSError):  # renamed or deleted meanwhile
                last = max(last, os.stat(path).st_mtime)
    return last


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
