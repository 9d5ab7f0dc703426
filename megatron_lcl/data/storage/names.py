"""Names of files as somebody else's manifest has them."""

from __future__ import annotations


def is_within(name: str) -> bool:
    """Whether a name leads to a file in a folder, or below it: relative, without `.` and `..`.

    Others (`/etc/x`, `../x`) would be written, or removed, outside of it.
    """
    return not {"", ".", ".."} & {*name.split("/")}
