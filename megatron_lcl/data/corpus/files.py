"""Files: their hashes, and durable writes. Imports nothing slow: commands that only look at folders need it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import xxhash

from megatron_lcl.data.corpus.owners import left_over, own_name
from megatron_lcl.errors import naming
from megatron_lcl.filesystem import below, exists, is_file

if TYPE_CHECKING:
    import numpy as np

CORPUS_MANIFEST = "corpus.json"
"""a corpus's file that is written last (`corpus_manifest.py`)"""
_BLOCK = 1 << 22
_TEMPORARY = ".tmp"
"""how the name ends of a file that is being written"""


def hash_file(path: Path) -> str:
    """XXH3-128 of a file's content, hexadecimal."""
    digest = xxhash.xxh3_128()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def blocks(path: Path) -> Iterator[bytes]:
    """A file's content, in blocks of a few megabytes."""
    with naming(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def sync(path: Path) -> None:
    """Make a file's content, or renames inside a folder, durable; of a folder where its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        # some file systems cannot sync a folder (VirtualBox's shared ones, some of CIFS and FUSE); that is all they say
        if error.errno not in (errno.EINVAL, errno.EBADF) or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` of a folder, and of all files and folders in it; of nothing else: to open a pipe waits, a socket fails."""
    for path in (*below(folder), folder):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            sync(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file and fsync it."""
    import numpy as np

    with naming(path), open(path, "wb") as file:
        np.save(SimpleNamespace(write=file.write), array)  # type: ignore[call-overload]  # to a file: no errno on error
        file.flush()
        os.fsync(file.fileno())


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new `.npy` file, mapped, with its space on the disk: a page without any would end the process by SIGBUS."""
    import numpy as np

    with naming(path):
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if array.nbytes and hasattr(os, "posix_fallocate"):  # not on macOS
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file; whoever reads it, even after a crash, finds it as it was before or as it is now.

    A link stays, its target is replaced. Where this fails nothing is left behind, and the OSError names the file. What
    a process leaves that is killed goes when another one writes a file into the same folder in this way.
    """
    if exists(path) and not is_file(path):  # a pipe or a device, which is not replaced
        path.write_bytes(content)
        return
    target = path.resolve()
    _clear_dead(target.parent)
    temporary = target.with_name(own_name(".", _TEMPORARY))  # several may write one file at once
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@cache  # once in this process: the folder may have many files
def _clear_dead(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it may be written, and not listed
        for left in left_over(folder, ".", _TEMPORARY):
            with contextlib.suppress(OSError):  # another user's
                left.unlink()


def replace_text(path: Path, text: str) -> None:
    r"""`replace_bytes` of a text in UTF-8. What is not, a byte of a file's name, is `\udcXX`, which JSON reads back."""
    replace_bytes(path, text.encode(errors="backslashreplace"))
