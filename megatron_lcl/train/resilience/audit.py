"""What a run skipped or could not do, and why: audit.jsonl in the run folder. Lines are only ever added."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

AUDIT = "audit.jsonl"


class Audit:
    """Writes on the first process; on the others it does nothing."""

    def __init__(self, run: Path, is_first: bool) -> None:
        self._path = run / AUDIT if is_first else None

    def write(self, event: str, step: int, **facts: Any) -> None:
        """One line, on disk when this returns. A disk that is full must not end the run that is to be audited."""
        if self._path is None:
            return
        line = json.dumps({"time": time.time(), "event": event, "step": step, **facts})
        try:
            with self._path.open("a+b") as file:
                begin = ""
                if file.tell():  # a line that was cut off, by a full disk or a kill, must not take this one with it
                    file.seek(-1, os.SEEK_END)
                    begin = "" if file.read() == b"\n" else "\n"
                file.write(f"{begin}{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the log may be on the same disk
                print(f"megatron-lcl: {self._path} could not be written ({error.strerror}); the line was {line}")
