"""Members of zip files, unpacked in bounded memory."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import IO

DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError, RuntimeError,
)  # fmt: skip
"""what `zipfile` raises for damaged files, and for encrypted members"""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""what `zipfile` unpacks in pieces of the size that is asked for; of others it unpacks all of a piece of the file"""


def open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """To be read in pieces, as the size in a header need not be true. This and reading raise one of DAMAGE:
    NotImplementedError for a method that is not read."""
    if member.compress_type not in _METHODS:
        raise NotImplementedError(f"zip method {member.compress_type}")
    return archive.open(member)
