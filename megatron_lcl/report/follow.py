"""A file of lines that is still written, read on from where the last look stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lcl.filesystem import is_file

_TAIL = 64
"""bytes by which a file is known to be the one that was read"""


@dataclass
class ReadSoFar:
    """How far a file was read."""

    num_lines: int = 0
    _offset: int = 0
    _tail: bytes = b""
    """the last bytes that were read"""

    def is_of(self, path: Path) -> bool:
        """Whether what was read still stands where it stood, by its last bytes.

        It does not where the file was cut, even if it has grown since: then it must be read anew.
        """
        try:
            with path.open("rb") as file:
                file.seek(self._offset - len(self._tail))
                return file.read(len(self._tail)) == self._tail
        except FileNotFoundError:
            return not self._tail

    def new_lines(self, path: Path) -> Iterator[bytes]:
        """Those that have come since, without one that is not yet whole; none where there is no file."""
        if not is_file(path):
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self.num_lines += 1
                self._offset += len(raw)
                self._tail = (self._tail + raw[-_TAIL:])[-_TAIL:]
                yield raw
