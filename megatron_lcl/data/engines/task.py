"""What a job does where it runs, whichever engine has started it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lcl.errors import UserError, describe_os_error, without_secrets
from megatron_lcl.filesystem import exists


@dataclass(frozen=True)
class Task:
    """What all jobs of a run have in common; it can be pickled."""

    function: Callable[..., object]
    arguments: Mapping[str, Any]
    jobs: int
    cpus: int
    """of each job"""
    logs: Path
    """a folder that is there before the first job begins"""
    reads: tuple[Path, ...]
    directory: Path = field(default_factory=Path.cwd)
    """where the command was given: relative paths are meant from there, and an engine may start processes elsewhere"""

    def log(self, index: int) -> Path:
        """What a job of an engine without logs of its own writes; a later try follows an earlier one."""
        return self.logs / f"job-{index}.log"


def do(task: Task, index: int) -> UserError | None:
    """Do a job; what went wrong, as `failure`, if anything. The traceback goes to stderr."""
    try:
        with contextlib.suppress(OSError):  # this machine may lack it, and all paths be absolute
            os.chdir(task.directory)
        for path in (*task.reads, task.logs):
            if not exists(path):
                raise UserError(
                    f"{socket.gethostname()} does not see {path}: input and output must be on a file system that all "
                    "machines share"
                )
        task.function(**task.arguments, job=(index, task.jobs))
    except Exception as error:  # noqa: BLE001  # of whatever kind, it is this job's
        traceback.print_exc()
        return failure(error)
    return None


def do_logged(task: Task, index: int, place: str) -> UserError | None:
    """The same, with all that this process and its children write in the job's log, after a line with the place."""
    with _written_to(task.log(index) if exists(task.logs) else Path(os.devnull)):
        print(f"{place}: job {index} of {task.jobs}, process {os.getpid()} on {socket.gethostname()}", flush=True)
        return do(task, index)


def failure(error: BaseException) -> UserError:
    """An error as the command line would say it, with its kind where that says more than its text.

    It goes from process to process, which not all errors can, and keeps its remedies, which are the command's to say.
    """
    remedies: Mapping[str, str] = {}
    if isinstance(error, UserError):
        said, remedies = error.said(), error.remedies
    elif isinstance(error, OSError) and error.strerror:
        said = describe_os_error(error)
    else:
        said = f"{type(error).__name__}: {error}"
    return UserError(without_secrets(" ".join(said.split())), remedies)


@contextlib.contextmanager
def _written_to(log: Path) -> Iterator[None]:
    """stdout and stderr, by their descriptors, at the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
