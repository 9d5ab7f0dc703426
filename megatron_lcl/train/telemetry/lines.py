"""metrics.jsonl: one line of numbers for a step that is logged, and for what happens between steps."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists, is_file, matching
from megatron_lcl.run_folder import CHECKPOINTS, EXAMPLES, GALLERY, HELDOUT, LABELED, METRICS, RESULTS

_OF_RUN = (EXAMPLES, HELDOUT), (LABELED,)
"""names of the files in a run folder that an evaluation writes together; the last one has the step"""
_OF_EVALUATE = ("results.txt", "results.png", RESULTS), (GALLERY,)
"""likewise of `evaluate --output`, in a run folder or one inside"""


_NOT_OURS = (FileNotFoundError, PermissionError)
"""of a folder in the run folder, into which somebody else's evaluation may have been written"""


def keep_lines_before(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run will write again, and a line cut off in writing.

    In place: for that a full disk has room, and whoever has the file open goes on writing into it. Line by line: kept
    ones that stand behind dropped ones are moved to where these began.
    """
    if not exists(path):
        return
    with path.open("rb") as lines, path.open("r+b") as kept:
        stop = 0  # of what is kept; never behind where `lines` reads
        for line in lines:
            values = _values(line)
            if values is None or values["step"] > step:
                continue
            if stop < lines.tell() - len(line):
                kept.seek(stop)
                kept.write(line)
            stop += len(line)
        if stop < lines.tell():
            kept.truncate(stop)


def set_metrics_aside(run: Path) -> str:
    """Rename metrics.jsonl, of a run that finds no checkpoint of its own, where it tells of one that was complete; and
    with it the results of evaluations, which would not be made again once it says that they were.

    The folder of checkpoints may have been removed to begin anew, or may be gone for a while. What there is to say; ""
    where nothing was renamed.
    """
    path = run / METRICS
    saved = max((values["step"] for values in _lines_of(run) if "checkpoint_bytes" in values), default=0)
    if not saved:
        return ""
    measured = [run / name for names in _OF_RUN for name in names]
    measured += [file for files in _files_of_evaluate(run) if _last_step(files[-1]) is not None for file in files]
    moment, renamed = time.strftime("%Y%m%d-%H%M%S", time.gmtime()), []
    stamps = (f"{moment}-{number}" if number else moment for number in count())  # the clock may have been set back
    stamp = next(stamp for stamp in stamps if not exists(path.with_stem(f"{path.stem}-{stamp}")))
    for old in (*measured, path):  # the last one decides, and goes last
        with contextlib.suppress(*(_NOT_OURS if old.parent != run else (FileNotFoundError,))):
            renamed.append(old.rename(old.with_stem(f"{old.stem}-{stamp}")))
    *results, aside = renamed
    with_them = (
        f", results of evaluations in {', '.join(str(file.relative_to(run)) for file in results)}" if results else ""
    )
    return (
        f"{METRICS} tells of a checkpoint of step {saved}, and {run / CHECKPOINTS} has none: its lines are now in "
        f"{aside}{with_them}"
    )


def has_steps(run: Path) -> bool:
    """Whether metrics.jsonl tells of a step."""
    return any("loss" in values for values in _lines_of(run))


def remove_results_after(run: Path, step: int) -> None:
    """Remove what evaluations after later steps than `step` have left for the report; their model is gone."""
    for files in (*([run / name for name in names] for names in _OF_RUN), *_files_of_evaluate(run)):
        last = _last_step(files[-1])
        if last is not None and last > step:
            with contextlib.suppress(*(_NOT_OURS if files[-1].parent != run else ())):
                for file in files:
                    file.unlink(missing_ok=True)


def results_inside(run: Path) -> list[Path]:
    """The files of results in the folders of the run folder, but for those that this user may not look into."""
    found = []
    for folder in matching(run, "*"):
        with contextlib.suppress(PermissionError):
            if is_file(folder / RESULTS):
                found.append(folder / RESULTS)
    return found


def _files_of_evaluate(run: Path) -> list[list[Path]]:
    folders = (run, *(file.parent for file in results_inside(run)))
    return [[folder / name for name in names] for folder in folders for names in _OF_EVALUATE]


def _last_step(file: Path) -> int | None:
    """The last step whose model a file of results names; None where it names none."""
    found: Any = None
    with contextlib.suppress(OSError, ValueError):  # a damaged one is for its reader to name
        found = json.loads(file.read_text(encoding="utf-8"))
    entries = [entry for entry in (found if isinstance(found, list) else [found]) if isinstance(entry, dict)]
    steps = [of.get("step") for one in entries for of in (one, one.get("result")) if isinstance(of, dict)]
    return max((step for step in steps if isinstance(step, int)), default=None)


def measured_after(run: Path, step: int) -> set[str]:
    """The names of the numbers after a step, the last one that metrics.jsonl tells of; none where it does not."""
    return {name for values in _lines_of(run) if values["step"] >= step for name in values}


def last_line_with(prefix: str, run: Path, step: int) -> dict[str, Any] | None:
    """The last line of metrics.jsonl up to a step that has numbers whose names begin so; None where there is none."""
    last = None
    for values in _lines_of(run, f'"{prefix}'.encode()):
        if values["step"] <= step:
            last = values
    return last


def _lines_of(run: Path, part: bytes = b"") -> Iterator[dict[str, Any]]:
    """What each line of metrics.jsonl with this part says that has a step; nothing where there is no such file.

    Of a long run, looking for a part takes a fraction of the time that reading every line does.
    """
    if exists(path := run / METRICS):
        with path.open("rb") as lines:
            for line in lines:
                if part in line and (values := _values(line)) is not None:
                    yield values


def _values(line: bytes) -> dict[str, Any] | None:
    """What a line says, with its `step`; None where it was cut off in writing."""
    with contextlib.suppress(ValueError):
        values = json.loads(line) if line.endswith(b"\n") else None
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            return values
    return None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. UserError where one is damaged; one cut off in writing may end the file."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if exists(path) else []
    found = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is damaged: {error}") from None
    return found
