"""Runs whose checkpoints several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes
from small_runs import JOBS, run_jobs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two processes, with a checkpoint each. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("runs")
    run_processes(run_jobs, 2, str(folder), JOBS)
    return folder
