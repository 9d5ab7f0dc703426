"""JSON files that other commands write for a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists


def read_json(path: Path, command: str = "evaluate") -> Any:
    """What a command wrote; None where there is no such file. UserError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if exists(path) else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); `megatron-lcl {command}` writes it") from None
