"""Several processes that write into one folder: each has a scratch folder of its own, and never touches another's.

A complete folder is renamed into place, which succeeds for exactly one process; so nothing depends on a lock. Locks,
where the file system has them, save work that would be done twice. What does depend on one is done in `unless_others`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from megatron_lcl.data.corpus.files import sync, sync_all
from megatron_lcl.data.corpus.owners import left_over, own_name
from megatron_lcl.data.storage.names import SCRATCH
from megatron_lcl.errors import UserError, is_mendable
from megatron_lcl.filesystem import GONE, below, exists, is_dir, matching
from megatron_lcl.interrupts import ENDING, deferring, ending_on_sigterm
from megatron_lcl.processes import UNGUARDED, runs_script_again
from megatron_lcl.waiting import wait_for

_BEAT_SECONDS = 60.0
"""so that one of a machine that was suspended for a day soon counts as used again"""
_NEW, _REPLACED = "new", "replaced"
"""in the scratch folder of `whole_folder`: the new folder, until it has its name, and what it takes the place of"""
_POLL_SECONDS = 0.2
"""between attempts at a lock that another process holds"""
_ANEW = 100
"""times that a folder is made and locked, as each process that comes to nothing removes it under those that wait"""
logger = logging.getLogger(__name__)


@contextmanager
def scratch_folder(work: Path, prefix: str = SCRATCH) -> Iterator[Path]:
    """A new folder below `work` for this process alone; gone at the end, with what is in it.

    prefix: how its name begins. What a process leaves that is killed, `clear_dead` removes.
    """
    folder = work / own_name(prefix)
    folder.mkdir()
    try:
        with kept_fresh(folder, _BEAT_SECONDS):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def kept_fresh(folder: Path, seconds: float) -> Iterator[None]:
    """Set a folder's time every so many seconds, so that other machines see that it is in use."""
    with repeating(seconds, lambda: os.utime(folder)):
        yield


@contextmanager
def repeating(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call something every so many seconds, in a thread, and never after the end. Its OSErrors are passed over: a file
    may be gone meanwhile."""
    ended, calling = threading.Event(), threading.Lock()

    def repeat() -> None:
        while not wait_for(ended, seconds):
            with calling, suppress(OSError):
                if not ended.is_set():
                    action()

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with calling:  # the thread itself ends a little later
            pass


def put_in_place(folder: Path, target: Path) -> None:
    """`take_name`, once all of it is on the disk: else a power failure may leave the name and not the content."""
    sync_all(folder)
    take_name(folder, target)
    sync(target.parent)


def take_name(folder: Path, target: Path) -> None:
    """Rename a complete folder. Where another process was first, its folder stays and ours is discarded."""
    try:
        os.rename(folder, target)
    except OSError:
        if not is_dir(target):
            raise


def _stays(_output: Path) -> str:
    return "is not empty; give a new folder"


@contextmanager
def whole_folder(output: Path, objection: Callable[[Path], str] = _stays) -> Iterator[Path]:
    """A folder that takes the place of `output` at the end, once all of it is on the disk, and is gone where that is
    not reached: by SIGTERM too, and after SIGKILL when the next one is made for the same output. Ctrl-C and SIGTERM
    that come while it takes that place come afterwards, when what it has replaced is gone, too.

    objection: why something that is no empty folder has to stay; "" where it may be replaced. UserError with it, before
    the work and after it, and before the work where no other folder can take the output's place. An OSError of what is
    in the folder names `output`.
    """
    target = output.resolve()  # of a link, which stays
    if Path.cwd().is_relative_to(target) or os.path.ismount(target):  # a shell would stand in the old folder
        what = "is the current folder, one above it or a mount point, which cannot be replaced"
        raise UserError(f"{output} {what}; name a folder in it")
    beside, prefix = target.parent, f".{target.name}."

    def to_move(place: Path) -> bool:
        """Whether something is there to be moved away. UserError where it has to stay."""
        if not exists(place) or (is_dir(place) and not any(place.iterdir())):
            return False
        if why := objection(place):
            raise UserError(f"{output} {why}")
        return True

    beside.mkdir(parents=True, exist_ok=True)
    for left in left_over(beside, prefix):
        with suppress(OSError):  # nothing was replaced yet, or it is another user's
            if exists(left / _NEW):  # else killed after both renames below, perhaps while it removed the old folder
                (left / _REPLACED).rename(target)
        shutil.rmtree(left, ignore_errors=True)
    to_move(target)
    with (
        _named(output, beside / prefix),
        ending_on_sigterm(),
        ExitStack() as until_cleared,
        scratch_folder(beside, prefix) as scratch,
    ):
        folder, replaced = scratch / _NEW, scratch / _REPLACED
        folder.mkdir()
        yield folder
        sync_all(folder)
        seen = _files_of(target)
        replaces = to_move(target)  # which may take long
        # two of these, between the renames and while the old one is put back, would remove both with the scratch folder
        until_cleared.enter_context(deferring(ENDING))
        try:
            if replaces:
                target.rename(replaced)
                if _files_of(replaced) != seen:
                    raise UserError(f"{output} was written to by something else meanwhile; give another place")
            folder.rename(target)  # takes the place of an empty folder too, and fails at any other
        except BaseException:
            if exists(replaced) and not exists(target):
                replaced.rename(target)
            raise
        sync(beside)


def clear_replaced(output: Path) -> None:
    """Remove what a `whole_folder` that was killed once `output` was whole has left beside it."""
    target = output.resolve()
    with suppress(OSError):  # the folder above may be written, and not listed
        clear_dead(target.parent, f".{target.name}.")


@contextmanager
def _named(output: Path, hidden: Path) -> Iterator[None]:
    """An OSError that names no file, or one whose name begins with `hidden` and is gone by then, names `output`."""
    try:
        yield
    except OSError as error:
        named = error.filename is not None and not str(error.filename).startswith(str(hidden))
        if named or not is_mendable(error):  # such as one of the network
            raise
        raise OSError(error.errno, error.strerror, str(output)) from None


def _files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file in a folder."""
    found = {path.relative_to(folder).as_posix(): path.lstat() for path in below(folder) if not is_dir(path)}
    return {name: (file.st_size, file.st_mtime_ns) for name, file in found.items()}


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A scratch folder, for this user alone, where temporary files are (TMPDIR). What processes that were killed left
    there under that prefix goes first."""
    place = Path(tempfile.gettempdir())
    with suppress(OSError):  # it may be written, and not listed
        clear_dead(place, prefix)
    with scratch_folder(place, prefix) as folder:
        folder.chmod(0o700)
        yield folder


def clear_dead(work: Path, prefix: str = SCRATCH) -> None:
    """Remove the scratch folders, of a prefix, of processes that have ended."""
    for folder in left_over(work, prefix):
        shutil.rmtree(folder, ignore_errors=True)


def is_scratch(path: Path) -> bool:
    """Whether a folder is a process's scratch folder; one of another machine stays when that process is killed."""
    return path.name.startswith(SCRATCH)


def is_used(work: Path) -> bool:
    """Whether any process has a scratch folder here; one of another machine may be dead."""
    return bool(matching(work, SCRATCH + "*"))


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
        if not exists(path):
            raise
    with suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None


@contextmanager
def waiting_for_others(file: Path) -> Iterator[bool]:
    """Hold a lock on `file`, once no other process does; without one where the file system has no locks. False where
    the file was removed meanwhile: others then lock another one. UserError where that one waits for this process.

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
        yield lock is None or _is_at(lock, file)


@contextmanager
def locked_in(folder: Path, name: str, refusal: str | None = None) -> Iterator[None]:
    """Hold a lock on a file in a folder, both made if need be, as `waiting_for_others`. Its holder may remove both at
    the end: who waits makes them anew.

    refusal: what is said, as UserError, where another process holds the lock; None: that one is waited for.
    """
    with ExitStack() as held:
        for left in reversed(range(_ANEW)):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                if refusal is not None:
                    with lock_file(folder / name) as lock:
                        if not try_lock(lock):
                            raise UserError(refusal)
                if held.enter_context(waiting_for_others(folder / name)):
                    break
            except OSError as error:  # removed between the two
                if error.errno not in GONE or not left:
                    raise
            held.close()  # who held it has removed the file
        yield


@contextmanager
def unless_others(file: Path) -> Iterator[bool]:
    """Hold a lock on `file`, for work that two processes must not do at once: False, and no lock, where another one
    holds it. UserError where it cannot be locked, for whatever reason."""
    with lock_file(file) as lock:
        try:
            if lock is None:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            locked = lock_descriptor(lock, blocking=False)
        except OSError as error:
            raise UserError(
                f"{file} cannot be locked ({error.strerror}), and without locks two processes may write to one file; "
                "take a folder on a file system that has locks (NFS 4, Lustre mounted with `flock`). Where it has "
                "them, the same command goes on"
            ) from None
        yield locked


def check_locks(folder: Path) -> None:
    """UserError where files in a folder cannot be locked."""
    with scratch_folder(folder) as scratch, unless_others(scratch / "lock"):
        pass


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is still the one that is there, as far as that can be seen."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:  # it is gone; on NFS the open one perhaps too
        return False


def try_lock(lock: int | None) -> bool:
    """Whether the lock of `lock_file`, which is asked for once, is ours by now, or cannot be had: for work that is safe
    without it, and only done twice."""
    if lock is None:
        return True
    try:
        return lock_descriptor(lock, blocking=False)
    except OSError:
        return True
