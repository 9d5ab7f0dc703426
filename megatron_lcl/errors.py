"""Errors that users can mend. Every other exception is a fault of the program and keeps its traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron_lcl.filesystem import is_dir
from megatron_lcl.units import in_bytes


class UserError(ValueError):
    """Bad input, settings or surroundings. The message says in one line what is wrong and what to do about it.

    The command line prints that line and ends with exit code 2.
    """

    def __init__(self, message: str, remedies: Mapping[str, str] | None = None) -> None:
        """remedies: what else to do, by the flag of the command line that does it, as the message goes on; a command
        that has no such flag leaves it out (`said`)."""
        super().__init__(message)
        self.remedies = dict(remedies or {})

    def __str__(self) -> str:
        return self.said(lambda flag: True)

    def said(self, has: Callable[[str], bool] = lambda flag: False) -> str:
        """The message with the remedies for whose flags `has` is true; by default none."""
        return super().__str__() + "".join(text for flag, text in self.remedies.items() if has(flag))


class RunError(UserError):
    """What every process of a run finds, with the same message; only the first process prints it."""


_OF_FILES = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOSPC, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.ESTALE, errno.EIO,
}  # fmt: skip
"""what the system says of files and folders; other OSErrors are faults of the program"""
_OF_STORAGE = {errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.EREMOTEIO, errno.ETIMEDOUT}
"""the same where the error names a file; else it may be of a connection, or of what the program does"""
_CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# a colon that no port follows begins a password, which may have slashes
_USER = re.compile(
    r"""(?<![\w+.-])((?:[a-z][\w+.-]{1,20}://+|(?:s3|gs|az|https?|ftp):/))
    (?:[^\s/?#"'<>{},]{,4096}@ | [^\s/?#:\["'<>{},]{,256}:(?!\d*(?:[/?#\s"'<>{},]|$))\S{,4096}@)""",
    re.IGNORECASE | re.VERBOSE,
)
"""the user and the password of a URL, which as a Path has lost one of its slashes"""
_CREDENTIAL = re.compile(
    r"""([?&;\#](?:
    x-(?:amz|goog|ms)-[\w-]+ | sig | auth | authorization | pwd | pass | key | key-pair-id | policy | googleaccessid
    | [\w.-]*(?:signature|token|passwd|password|secret|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?)
    )=)[^\s&;\#'"<>]+""",
    re.IGNORECASE | re.VERBOSE,
)
"""a key of a URL's query or fragment that holds a credential, and its value; libraries also quote the path alone"""


def is_mendable(error: BaseException | None) -> bool:
    """Whether a user can mend it: one line then says what it is, and the exit code is 2."""
    if isinstance(error, OSError):
        return error.errno in _OF_FILES or (error.filename is not None and error.errno in _OF_STORAGE)
    return isinstance(error, UserError)


def is_full(error: OSError) -> bool:
    """Whether a disk, or a user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_on_disk(
    name: str, path: object, remedy: str = "copy to or from object storage with a tool for that (`aws s3 sync`, rclone)"
) -> None:
    """UserError where a setting that is a path of a file system has a URL for its value."""
    if isinstance(path, str) and "://" in path:
        scheme = path.partition("://")[0]
        raise UserError(f"{name} is {scheme}://…: use a path of a file system here, and {remedy}")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError from inside that names no file names this one: writes to an open file, and syncs, do not say which."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def describe_os_error(error: OSError, place: str | os.PathLike[str] | None = None) -> str:
    """The error in one line: the file (else the place), what the system says, and on a full disk what is free.

    place: what was written to, where the error may not know it.
    """
    where = error.filename if error.filename is not None else place
    said = error.strerror or " ".join(map(str, error.args))  # str would say "[Errno None] None" before a name
    if where is None or isinstance(where, int):
        return said
    where = os.fsdecode(where)
    return f"{where}: {said}" + (f" ({free_space(Path(where))})" if is_full(error) else "")


def complain(line: str) -> None:
    """A line `without_secrets` on stderr, at once. Where it cannot be written, as in a log on a full disk, nothing
    else changes."""
    with contextlib.suppress(OSError):
        print(printable(without_secrets(line)), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """A text for a terminal: control characters (C0 without tab and ends of lines, DEL, C1) as \\xNN.

    Names and texts of other people's data may hold sequences by which a terminal hides lines, or fills the clipboard.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def without_secrets(text: str) -> str:
    """A text without the credentials in its URLs: user and password, and the values of the query that are such by their
    names, as those of presigned URLs. Errors of libraries quote the URL that was asked for."""
    return _CREDENTIAL.sub(r"\1…", _USER.sub(r"\1", text))


def free_space(path: Path) -> str:
    """How much the disk of a file or folder, or of the nearest folder that there is, has left."""
    folder = nearest_folder(path)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"free space of {folder} unknown"
    return f"{in_bytes(usage.free)} of {in_bytes(usage.total)} are free in {folder}"


def nearest_folder(path: Path) -> Path:
    """The folder that a path is or lies in, as far as it exists."""
    return next((folder for folder in (path, *path.absolute().parents) if is_dir(folder)), Path("/"))
