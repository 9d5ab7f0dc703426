"""Jobs of the tests, where processes of every engine can import them; each says in a file that it was tried."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

from megatron_lcl.errors import UserError


def tried(folder: Path, index: int) -> int:
    """Count another try of a job; how many there have been."""
    with open(folder / f"tries-{index}", "ab") as file:
        file.write(f"{os.getpid()}\n".encode())
    return len((folder / f"tries-{index}").read_text().split())


def fails(folder: Path, times: int, how: str, job: tuple[int, int]) -> None:
    """Job 1 fails so many times; every job that does not leaves a file."""
    index, total = job
    if tried(folder, index) <= times and index == min(1, total - 1):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            os._exit(3)
        if how == "advises":
            raise UserError("no room", {"--data.cache": ", or set data.cache"})
        raise ValueError("two\nlines" if how == "raises" else how)
    (folder / f"done-{index}-of-{total}").touch()


def fails_last(folder: Path, how: str, job: tuple[int, int]) -> None:
    """Job 1 fails at first, when the others are done and have left their nodes to it."""
    import ray

    index, total = job
    deadline = time.monotonic() + 300
    while index == 1 and not (folder / "tries-1").exists():
        done = len(list(folder.glob("done-*"))) == total - 1
        if done and ray.available_resources().get("CPU", 0.0) >= 1:
            break
        assert time.monotonic() < deadline, "the others have not left their nodes"
        time.sleep(0.05)
    fails(folder, 1, how, job)


def hashes(folder: Path, variable: str, job: tuple[int, int]) -> None:
    """Leaves the hash of an environment variable."""
    (folder / "hash").write_text(hashlib.sha256(os.environ[variable].encode()).hexdigest())


def waits(folder: Path, job: tuple[int, int]) -> None:
    """Longer than any test."""
    tried(folder, job[0])
    time.sleep(600)
