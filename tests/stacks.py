"""Where the processes of a test that hangs are, and those that they have forked: the stacks of all their threads."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

ANSWER_SECONDS = 1.0
"""which a process has to write its stacks, whatever it is at"""
_SETTLED_SECONDS = 0.1
"""without more of them: they are all there"""


def register(file: Path) -> None:
    """In a process, before it does anything: it appends its stacks to `file` when `stacks_of` asks for them, and what
    it forks later does, too, as long as it is no other program."""
    faulthandler.register(signal.SIGUSR2, file.open("a"), all_threads=True)


def stacks_of(files: Mapping[int, Path]) -> str:
    """The stacks of processes that still run, by their numbers, with what each has registered, and of their
    descendants."""
    found = []
    for first, file in files.items():
        for pid in (first, *descendants(first)):
            if _has_registered(pid):
                found.append(f"--- stacks of process {pid}, {'of the test' if pid == first else f'below {first}'}")
                found.append(_ask(pid, file) or "(none came)")
    return "\n".join(found)


def _ask(pid: int, file: Path) -> str:
    before = size = file.stat().st_size
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
    last = settled = time.monotonic() + ANSWER_SECONDS
    while (now := time.monotonic()) < min(settled, last):
        time.sleep(0.01)
        if (grown := file.stat().st_size) != size:
            size, settled = grown, now + _SETTLED_SECONDS
    return file.read_bytes()[before:].decode(errors="replace").rstrip()


def _has_registered(pid: int) -> bool:
    """Another would be killed by the signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGUSR2 - 1) & 1)


def descendants(pid: int | None) -> list[int]:
    """Processes that a process has started, and those they have, as Linux lists them."""
    try:
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]
