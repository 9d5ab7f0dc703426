"""What a report says of zero-shot evaluations: pictures with the names they were given, a map, the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.gallery import GALLERY
from megatron_lcl.evaluate.results import RESULTS


def read_gallery(run: Path) -> dict[str, Any] | None:
    """Of the zero-shot evaluation whose `--output` was the run folder; None where there was none."""
    return read_json(run / GALLERY)


def read_others(run: Path) -> list[dict[str, Any]]:
    """Zero-shot results of evaluations in folders of the run folder, each with `folder`, its name."""
    return [
        {**result, "folder": file.parent.name}
        for file in sorted(run.glob(f"*/{RESULTS}"))
        for result in read_json(file)
        if result["task"] == "zero-shot classification"
    ]


def read_json(path: Path, command: str = "evaluate") -> Any:
    """What a command wrote; None where there is no such file. UserError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); `megatron-lcl {command}` writes it") from None
