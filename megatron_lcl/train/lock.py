"""One run at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_lcl.errors import UserError

LOCK = ".lock"
PATIENCE_SECONDS = 30.0
"""a run that is started again at once may find the one before still ending"""


@contextlib.contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """The run folder, which is made where it is not there, is this process's until the block or the process ends.

    UserError naming the process that has it, after some patience. Where the file system has no locks (Lustre without
    `-o flock`, say) that is said, and nothing keeps others away.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a+", encoding="utf-8") as file:
        _wait(run, file.fileno())
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _wait(run: Path, descriptor: int) -> None:
    deadline, said = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (run / LOCK).read_text(encoding="utf-8") or "another process"
        except OSError as error:
            _say(f"{run} cannot be locked ({error.strerror}); see to it that no other run uses it")
            return
        else:
            return
        if time.monotonic() > deadline:
            raise UserError(f"train.output = {run} is in use by {holder}; end that run, or name another folder")
        if not said:
            said = True
            _say(f"{run} is in use by {holder}; waiting up to {PATIENCE_SECONDS:.0f} s for it to end")
        time.sleep(0.2)


def _say(message: str) -> None:
    print(f"megatron-lcl: {message}", file=sys.stderr, flush=True)
