"""Memory of a process as Linux has it, and what a program was measured with, for the programs beside this file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def resident(field: str, process: int | str = "self") -> float:
    """MiB of `VmRSS` (now), `VmHWM` (the most so far) or `RssAnon` (now, without mapped files), of proc(5).

    getrusage's most is no less than that of the process that started this one. 0 of a process that has ended and is not
    waited for yet; OSError of one that is not there.
    """
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return 0.0 if lines["State"].split()[0] in "ZX" else int(lines[field].split()[0]) / 1024


_VERSIONS = """
import sys
from importlib import metadata
def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
print(", ".join(f"{package} {version(package)}" for package in sys.argv[1:]))
"""


def versions(*packages: str, python: str = sys.executable) -> str:
    """Packages with their versions, for the heading of a table: "torch 2.13.0, liger-kernel (not installed)". python:
    of the environment that has them."""
    return subprocess.run(
        [python, "-c", _VERSIONS, *packages], capture_output=True, text=True, check=True
    ).stdout.strip()
