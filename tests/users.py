"""Users that share a folder. What another user may do is tried in a process of that user's, which only root may start:
root itself may do all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forks import fork_context

OTHER = 65534
"""number of a user and of that user's group (nobody)"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a process of another user's")


def as_other(action: Callable[[], object]) -> BaseProcess:
    """A process of the other user's that does this, begun; it fails where this raises."""

    def act() -> None:
        os.setgroups([])
        os.setresgid(OTHER, OTHER, OTHER)
        os.setresuid(OTHER, OTHER, OTHER)
        action()

    process = fork_context().Process(target=act, daemon=True)
    process.start()
    return process


def succeeds(process: BaseProcess) -> bool:
    """Whether it ends, and without an error."""
    process.join(60)
    return process.exitcode == 0


@contextmanager
def shared_folder(mode: int) -> Iterator[Path]:
    """A folder of root and the other user's group, where the other user can reach it: pytest's are root's alone."""
    folder = Path(tempfile.mkdtemp())
    try:
        os.chown(folder, -1, OTHER)
        folder.chmod(mode)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """In which this process makes files and folders of the rights that the mask leaves."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    """Who may do what with a file or folder."""
    return path.stat().st_mode
