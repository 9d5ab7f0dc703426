"""One run at a time in a run folder.

The lock file also names the process that holds it, and its time says whether that lives where the file system has no
locks. So the file is opened here and `filelock` locks its descriptor: its `FileLock` falls back to the existence of a
file where flock is missing, which a process that is killed on another machine leaves behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

from megatron_lcl.data.corpus.scratch import repeating
from megatron_lcl.errors import UserError, complain, naming
from megatron_lcl.run_folder import LOCK
from megatron_lcl.train.resilience.start import LOST, leave

PATIENCE_SECONDS = 30.0
"""a run that is started again at once may find the one before still ending"""
SEEN_SECONDS = 70.0
"""in which another machine sees a new lock file: NFS keeps for up to a minute that a name is not there"""
HEARTBEAT_SECONDS = 5.0
"""how often the process that has the run folder looks whether it still has it, and touches the lock file"""


@contextlib.contextmanager
def lock_run_folder(run: Path) -> Iterator[None]:
    """The run folder, which is made where it is not there, is this process's until the block or the process ends.

    UserError naming the process that has it, after some patience. Where the file system has no locks (Lustre without
    `-o flock`, say) that is said. There, and where locks reach no further than one machine (Lustre's `localflock`, some
    NFS), a run is known to live by the time of its lock file. A process that was stopped for so long that another one
    took the folder, or that began within the same seconds as another, ends with LOST at its next heartbeat.
    """
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as until_end:
        with naming(run / LOCK):
            file = until_end.enter_context((run / LOCK).open("a+", encoding="utf-8", buffering=1))
        # a lock is the open file's: loader processes would hold it on, when this process is killed or has given it back
        os.register_at_fork(after_in_child=file.close)
        locked = _acquire(run, file.fileno())
        file.seek(0)
        holder, here = file.read(), f" on {socket.gethostname()}"
        if holder and not (locked and holder.endswith(here)):  # a lock that we got says that all on this machine ended
            _refuse_living(run, holder)
        name = (
            f"process {os.getpid()} ({secrets.token_hex(4)}){here}"  # a container's next life has its number and host
        )
        with naming(run / LOCK):
            file.truncate(0)
            os.write(file.fileno(), name.encode())
            os.fsync(file.fileno())  # who waits on another machine is to see it
        try:
            with repeating(HEARTBEAT_SECONDS, lambda: _keep(run, name)):
                yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # somebody has deleted the folder
                if holder_of(run) == name:
                    file.truncate(0)


def holder_of(run: Path) -> str:
    """What the process that has the run folder has written into its lock file; OSError where that is not to be seen."""
    return (run / LOCK).read_text(encoding="utf-8")  # opened anew: NFS then asks its server


def sees_lock(run: Path, holder: str, at_most: float) -> bool:
    """Whether this machine sees the lock file of a process of another one: that both call the same folder so.

    holder: what `holder_of` gives there. Waits up to SEEN_SECONDS, but not longer than `at_most` seconds.
    """
    deadline = time.monotonic() + min(SEEN_SECONDS, at_most)
    while True:
        with contextlib.suppress(OSError):
            if holder_of(run) == holder:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _refuse_living(run: Path, holder: str) -> None:
    """UserError where the process that wrote the lock file goes on touching it, after some patience."""
    touched, since, deadline = _touched_at(run), time.monotonic(), time.monotonic() + PATIENCE_SECONDS
    lives = False
    while time.monotonic() < since + 3 * HEARTBEAT_SECONDS:
        time.sleep(min(1.0, HEARTBEAT_SECONDS / 5))
        holder = holder_of(run)  # perhaps another one that has waited, too
        if not holder:
            return  # it has ended in order
        before, touched = touched, _touched_at(run)
        if touched == before:
            continue
        since = time.monotonic()
        if since > deadline:
            raise UserError(
                f"train.output = {run} is in use by {holder}, which locks of this file system do not say; end "
                "that run, or name another folder"
            )
        if not lives:
            lives = True
            _say_waiting(run, holder)


def _touched_at(run: Path) -> int:
    with (run / LOCK).open("rb") as file:  # opened anew: NFS then asks its server
        return os.fstat(file.fileno()).st_mtime_ns


def _keep(run: Path, name: str) -> None:
    """Touch the lock file; end the process where it names another one."""
    if (holder := holder_of(run)) != name:
        leave(LOST, f"train.output = {run} was taken over by {holder or 'another run'}")
    os.utime(run / LOCK)


def _acquire(run: Path, descriptor: int) -> bool:
    """Get the lock; False: the file system has none."""
    deadline, said = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            if lock_descriptor(descriptor, blocking=False):
                return True
        except OSError as error:
            _say(f"{run} cannot be locked ({error.strerror}); see to it that no other run uses it")
            return False
        holder = holder_of(run) or "another process"
        if time.monotonic() > deadline:
            raise UserError(f"train.output = {run} is in use by {holder}; end that run, or name another folder")
        if not said:
            said = True
            _say_waiting(run, holder)
        time.sleep(0.2)


def _say_waiting(run: Path, holder: str) -> None:
    _say(f"{run} is in use by {holder}; waiting up to {PATIENCE_SECONDS:.0f} s for it to end")


def _say(message: str) -> None:
    complain(f"megatron-lcl: {message}")
