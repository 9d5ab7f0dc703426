"""Runs whose checkpoints several files look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run_processes
from small_runs import JOBS, run_jobs


@pytest.fixture(scope="session")
def runs(once: Callable[..., Any]) -> Path:
    """Two runs of two processes, with a checkpoint each. To be copied, not changed."""

    def make(folder: Path) -> Path:
        run_processes(run_jobs, 2, str(folder), JOBS)
        return folder

    return once("checkpoint-runs", make)
