"""What a report says of zero-shot evaluations: pictures with the names they were given, a map, the numbers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from megatron_lcl.filesystem import is_file, matching
from megatron_lcl.report.files import read_json
from megatron_lcl.run_folder import GALLERY, RESULTS


def read_gallery(run: Path) -> dict[str, Any] | None:
    """Of the zero-shot evaluation whose `--output` was the run folder; None where there was none."""
    return read_json(run / GALLERY)


def results_inside(run: Path) -> list[Path]:
    """The files of results in the folders of the run folder, but for those that this user may not look into."""
    found = []
    for folder in matching(run, "*"):
        with contextlib.suppress(PermissionError):
            if is_file(folder / RESULTS):
                found.append(folder / RESULTS)
    return found


def read_others(run: Path) -> list[dict[str, Any]]:
    """Zero-shot results of evaluations in folders of the run folder, each with `folder`, its name."""
    return [
        {**result, "folder": file.parent.name}
        for file in results_inside(run)
        for result in read_json(file)
        if result.get("task") == "zero-shot classification"
    ]
