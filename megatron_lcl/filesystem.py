"""Questions about files that every version of Python answers alike: an error is no answer.

From 3.12 on `Path.glob` and `Path.rglob` take a folder that cannot be listed for an empty one; from 3.14 on
`Path.exists`, `is_file` and `is_dir` say of what cannot be looked at that it is not there. On network file systems such
errors (EIO, ESTALE) pass; what would follow from the answer does not: a run would begin anew beside its checkpoints.
Here they are raised, as `OSError`; what is not there, or is no folder, is no error. Of paths in object storage
`data/storage/paths.py` registers the answers. What reading a file raises is told apart by `raise_if_passing`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import singledispatch
from pathlib import Path

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_LASTING = _NOT_THERE | {
    errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG, errno.EILSEQ, errno.EACCES, errno.EPERM, errno.EINVAL,
    errno.EOVERFLOW,
}  # fmt: skip
"""what the system says where there is no file, a name cannot be one's, or it may not be read. EINVAL and EOVERFLOW: of
a place that no file has, as a damaged header may name; EINVAL also of names that the file systems of Windows refuse"""
GONE = (errno.ENOENT, errno.ESTALE)
"""errors of a file or folder that another process has removed; the second of what is open, on NFS"""


@singledispatch
def exists(path: Path) -> bool:
    """Whether a path leads to something; a link, to what it is a link to."""
    return _mode(path) is not None


@singledispatch
def is_file(path: Path) -> bool:
    """Whether a path leads to a regular file."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


@singledispatch
def is_dir(path: Path) -> bool:
    """Whether a path leads to a folder."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


@singledispatch
def matching(folder: Path, pattern: str) -> list[Path]:
    """What is in a folder under a name that a shell pattern matches, sorted."""
    return sorted(folder / entry.name for entry in _entries(folder) if fnmatchcase(entry.name, pattern))


@singledispatch
def below(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """What is in a folder and, at any depth, in the folders inside, under a name that a shell pattern matches; in no
    order. Links to folders are not followed."""
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        for entry in _entries(place):
            if fnmatchcase(entry.name, pattern):
                yield place / entry.name
            if entry.is_dir(follow_symlinks=False):  # which raises what else keeps it from an answer
                waiting.append(place / entry.name)


def raise_if_passing(error: BaseException, path: Path | str) -> None:
    """Raise the OSError that `error` is or was raised after, unless it says something of the file itself.

    To be asked before a file that cannot be read is counted as missing or damaged, where that is kept: a disk or a
    network that fails for a minute (EIO, ESTALE, ETIMEDOUT), or a process with too many open files, says nothing of the
    file, and whoever is told can begin again. An OSError without an errno is a library's word for damage. path: what
    was read; the error raised names it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno not in _LASTING:
            name = str(path) if cause.filename is None else cause.filename
            raise OSError(cause.errno, os.strerror(cause.errno), name) from error
        cause = cause.__cause__ or cause.__context__  # zipfile, for one, raises an error of its own


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    except ValueError:  # as below
        pass
    return []


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    except ValueError:  # a zero byte, which no name has
        pass
    return None
