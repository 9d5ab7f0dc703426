"""metrics.jsonl: one line of numbers for a step that is logged, and for what happens between steps."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from megatron_lcl.errors import UserError
from megatron_lcl.run_folder import METRICS


def keep_lines_before(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run will write again, and a line cut off in writing.

    In place: for that a full disk has room, and whoever has the file open goes on writing into it.
    """
    if not path.exists():
        return
    kept, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError):
            continue
    if kept != lines:
        with path.open("r+b") as file:
            file.write("".join(kept).encode())
            file.truncate()


def measured_after(run: Path, step: int) -> set[str]:
    """The names of the numbers after a step, the last one that metrics.jsonl tells of; none where it does not."""
    path, names = run / METRICS, set[str]()
    for line in reversed(path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
        with contextlib.suppress(ValueError):  # cut off in writing
            found = json.loads(line)
            if found["step"] < step:
                break
            names |= found.keys()
    return names


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. UserError where one is damaged; one cut off in writing may end the file."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is damaged: {error}") from None
    return found
