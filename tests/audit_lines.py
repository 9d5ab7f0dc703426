"""What a run's audit says, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lcl.train.resilience.audit import AUDIT


def read_audit(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's audit.jsonl, oldest first; one that was cut off in writing is skipped."""
    path, lines = run / AUDIT, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
