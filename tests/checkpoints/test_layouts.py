"""A checkpoint of any layout goes on at any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from small_runs import Job, run_jobs

ZERO = (1, 2, 3)
SAVES = [Job(f"zero{stage}", stage) for stage in ZERO]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Runs of two processes, one of each ZeRO stage, and what each gave when it went on from its own checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    again = [Job(f"again{stage}", stage, source=f"zero{stage}") for stage in ZERO]
    return folder, run_processes(run_jobs, 2, str(folder), [*SAVES, *again])[0]


@pytest.mark.slow
def test_at_the_same_layout_the_losses_are_the_same_to_the_last_bit(saved: tuple[Path, dict[str, Any]]) -> None:
    _, results = saved
    for stage in ZERO:
        again = results[f"again{stage}"]
        assert again["rows"] == results[f"zero{stage}"]["rows"]
        assert again["said"] == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_at_any_other_layout_they_are_equal(processes: int, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = saved
    jobs = [
        Job(f"{processes}-{source}-{stage}", stage, source=f"zero{source}")
        for source in ZERO
        for stage in ZERO
        if processes != 2 or source != stage
    ]
    results = run_processes(run_jobs, processes, str(folder), jobs)[0]
    for job in jobs:
        result = results[job.name]
        assert_close(result["rows"], expected[job.source]["rows"], job)
        assert [decay for decay, _ in result["groups"]] == [0.3, 0.0], job


def assert_close(ours: Any, theirs: Any, job: Job) -> None:
    ours, theirs = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours[:, :2], theirs[:, :2], rtol=1e-5, atol=0, msg=lambda text: f"{job}\n{text}")
    torch.testing.assert_close(ours[:, 2], theirs[:, 2], rtol=1e-4, atol=0, msg=lambda text: f"{job}\n{text}")
