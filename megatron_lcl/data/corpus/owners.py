"""Whose a scratch folder or a temporary file is: its name says of which machine and process, so that what one has left
that was killed can be told from what another writes."""

from __future__ import annotations

import glob
import math
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from megatron_lcl.filesystem import below, matching

UNUSED_SECONDS = 86400.0
"""after which what nobody has used or written is taken for left over"""
_OWNER = re.compile(r"([0-9a-f]{32}(?:-\d+)?)-(\d+)-[0-9a-f]{32}")
"""how a name ends, but for a suffix: `machine`, process, and what no other has; what stands before them is the whole
prefix, where names of outputs have dots (run, run.v2)"""


def own_name(prefix: str, suffix: str = "") -> str:
    """A name that no other folder or file has, and says that it is this process's."""
    return f"{prefix}{machine()}-{os.getpid()}-{uuid.uuid4().hex}{suffix}"


def left_over(work: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """What is in a folder under an `own_name`, of a prefix and suffix, of a process that has ended; one of another
    machine has where nothing of it was written for UNUSED_SECONDS, as `scratch_folder` writes its time."""
    now: float | None = None
    for path in matching(work, f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
        if (owner := _OWNER.fullmatch(path.name.removeprefix(prefix).removesuffix(suffix))) is None:
            continue  # a user's
        its_machine, pid = owner[1], int(owner[2])
        if its_machine == machine():
            ended = not _alive(pid)
        else:
            now = now_in(work) if now is None else now
            ended = now - _written(path) > UNUSED_SECONDS
        if ended:
            yield path


def now_in(folder: Path) -> float:
    """Seconds since 1970 by the clock that sets the times of new files in a folder, a file server's say, from which
    this machine's may be far: to compare their times with. By this machine's where no file can be made."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def machine() -> str:
    """Names where process ids are unique, until the next boot: hosts may share a name, and containers a host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip().replace("-", "")
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid.uuid4().hex  # no process's


def _written(path: Path) -> float:
    """When a file, or something in a folder, was last written, as seconds since 1970; infinite, and so not long ago,
    where it changes while it is looked at, or cannot be."""
    try:
        return max(each.lstat().st_mtime for each in (path, *below(path)))
    except OSError:
        return math.inf


def _alive(pid: int) -> bool:
    """Whether a process runs: not where it has ended, and its parent only has not asked how."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:  # another user's, which the system may hide
        return True
    return state not in (b"Z", b"X")
