"""What a report says of zero-shot evaluations: pictures with the names they were given, a map, the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lcl.report.files import read_json
from megatron_lcl.run_folder import GALLERY
from megatron_lcl.train.telemetry.lines import results_inside


def read_gallery(run: Path) -> dict[str, Any] | None:
    """Of the zero-shot evaluation whose `--output` was the run folder; None where there was none."""
    return read_json(run / GALLERY)


def read_others(run: Path) -> list[dict[str, Any]]:
    """Zero-shot results of evaluations in folders of the run folder, each with `folder`, its name."""
    return [
        {**result, "folder": file.parent.name}
        for file in results_inside(run)
        for result in read_json(file)
        if result.get("task") == "zero-shot classification"
    ]
