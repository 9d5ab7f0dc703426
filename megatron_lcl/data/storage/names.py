"""Names of files: whether one of somebody else's manifest may be used, and how many bytes one has."""

from __future__ import annotations

import hashlib
import os

SCRATCH = "scratch-"
"""how the names of folders begin that belong to one process, and to no output (`corpus/scratch.py`)"""
UPLOADING = "_uploading.json"
"""object beside those of an output that is not whole yet (`corpus/upload.py`)"""


def is_within(name: str) -> bool:
    """Whether a name leads to a file in a folder, or below it: relative, without `.` and `..`, and without NUL.

    Others (`/etc/x`, `../x`) would be written, or removed, outside of it; no file system has names with NUL.
    """
    return "\0" not in name and not {"", ".", ".."} & {*name.split("/")}


def shortened(name: str, most: int) -> str:
    """A file's name of at most so many bytes: a longer one is cut, and ends in a hash that keeps it one of its own.

    File systems take 255 bytes, in which suffixes are to find room too.
    """
    raw = os.fsencode(name)
    if len(raw) <= most:
        return name
    return f"{raw[: most - 9].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:8]}"
