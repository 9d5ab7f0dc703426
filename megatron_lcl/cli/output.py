"""What commands print."""

from __future__ import annotations

from megatron_lcl.errors import printable


def say(said: object, end: str = "\n") -> None:
    """Print on stdout, with control characters as \\xNN: much of it comes from other people's files."""
    print(printable(str(said)), end=end)
