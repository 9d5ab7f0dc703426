"""File systems without locks, or with locks that reach one machine alone."""

from __future__ import annotations

import errno
import fcntl
from typing import Any


def without_locks(how: str) -> None:
    """Of this process, for good. how: "not coherent", each gets every lock; "refused"."""

    def flock(*_: Any) -> None:
        if how != "not coherent":
            raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = flock  # type: ignore[assignment]
