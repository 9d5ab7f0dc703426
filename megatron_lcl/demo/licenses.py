"""Who made what under which license: the file LICENSES of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LICENSES = "LICENSES"


@dataclass(frozen=True)
class License:
    """Under what a package may be used, and whom to name."""

    package: str
    spdx: str
    attribution: str
    text: str = ""
    """the license as the package carries it"""


def license_text(name: str, licenses: Sequence[License]) -> str:
    """The file's content for the data set of this name."""
    lines = [f"The pictures and texts of the data set `{name}` are other people's work, from these packages.", ""]
    for entry in licenses:
        lines += [f"{entry.package}: {entry.spdx}", entry.attribution, ""]
        if entry.text:
            lines += ["  " + line for line in entry.text.strip().splitlines()] + [""]
    return "\n".join(line.rstrip() for line in lines)
