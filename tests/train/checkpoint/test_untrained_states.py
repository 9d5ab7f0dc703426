"""What an objective does not train stays as it is, at any layout, through checkpoints; another objective trains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from processes import run_processes
from small_runs import FIRST, run_each
from test_recipe_states import Run, run_job

from megatron_lcl import LCL, load_model
from megatron_lcl.train import parts
from megatron_lcl.train.checkpoint.folder import read_progress, step_folder
from megatron_lcl.train.parts import frozen_parameters

UNTRAINED = {
    "clip": ("5.vocabulary",),
    "generation": ("5.norm.", "5.projection.", "5.log_scale", "2.query", "2.norm_q.", "2.norm_k.", "2.q.", "2.k."),
}
"""beginnings of what an objective does not train, by our names"""


@dataclass(frozen=True)
class Alone(Run):
    """With plain AdamW, in which nothing else is frozen."""

    freeze: tuple[str, ...] = ()
    other: tuple[tuple[str, Any], ...] = (("optimizer__name", "adamw"),)
    trains_all: bool = False
    """as earlier versions: everything is trained, some of it with gradients of zero"""
    reads: frozenset[str] = frozenset()


STATES = frozenset({"every step", "averages", "moments"})
BEGUN = [
    Alone("clip", objective="clip", reads=STATES),
    Alone("clip with tensor ranks", tensor=2, objective="clip", dtype="bfloat16", reads=STATES),
    Alone("generation", pipeline=2, objective="generation", reads=STATES),
    Alone("generation with ZeRO-3", 3, objective="generation", reads=STATES),
]
JOBS = [
    *BEGUN,
    Alone("all of clip", objective="clip", trains_all=True),
    Alone("all of generation", 3, objective="generation", trains_all=True),
    Alone("same layout", 3, source="all of generation", objective="generation", seed=1),
    Alone("pipeline", pipeline=2, source="all of clip", objective="clip", seed=1),
    Alone("to lcl", source="clip", reads=frozenset({"loaded"})),
]
OF_EARLIER = [job for job in JOBS if job.source is not None and job.source.startswith("all of")]


def run(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    def run_of_version(folder: Path, job: Alone) -> dict[str, Any]:
        with patch.dict(parts._WITHOUT_GRADIENT, clear=job.trains_all):
            return run_job(folder, job)

    return run_each(run_of_version, Path(folder), JOBS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_processes(run, 2, str(folder), timeout=300.0)[0]


def drawn(job: Run) -> dict[str, np.ndarray]:
    config = job.config(Path())
    layers = LCL(config.model, config.train.seed, config.initial_log_scale).layers
    return {name: p.detach().numpy() for name, p in layers.named_parameters()}


def saved(folder: Path, name: str) -> dict[str, np.ndarray]:
    layers = load_model(step_folder(folder / name, FIRST)).layers
    return {name: p.detach().numpy() for name, p in layers.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("job", BEGUN, ids=lambda job: job.name)
def test_it_keeps_its_bits_and_has_no_state(job: Alone, runs: Any) -> None:
    """And is in every checkpoint."""
    folder, results = runs
    result, start = results[job.name], drawn(job)
    untrained = {name for name in start if name.startswith(UNTRAINED[job.objective])}
    assert untrained == frozen_parameters(job.config(Path()))
    if job.dtype == "float32":
        for name, value in start.items():
            assert np.array_equal(result["weights"][-1][name], value) == (name in untrained), name
    for name in untrained:
        assert np.array_equal(result["weights"][-1][name], saved(folder, job.name)[name]), name
        assert np.array_equal(result["weights"][-1][name], result["weights"][0][name]), name
    trained = start.keys() - untrained
    assert result["with gradient"] == result["moments"] == result["averages"]["ema_0.5"].keys() == trained
    split = job.tensor > 1  # each rank has what is not split
    assert split or result["in optimizer"] == sum(start[name].size for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("job", OF_EARLIER, ids=lambda job: f"{job.source} to {job.name}")
def test_a_checkpoint_that_has_its_states_is_gone_on_from(job: Alone, runs: Any) -> None:
    """With all else as in the run that was not interrupted, and what was decayed there as it was saved."""
    folder, results = runs
    before, ours, theirs = saved(folder, job.source or ""), results[job.name], results[job.source]
    assert not read_progress(step_folder(folder / (job.source or ""), FIRST)).layout.frozen
    assert np.array(ours["rows"]) == pytest.approx(np.array(theirs["rows"]), rel=1e-5)
    for name, value in before.items():
        is_untrained = name.startswith(UNTRAINED[job.objective])
        assert np.array_equal(ours["weights"][-1][name], value) == is_untrained, name
        if is_untrained and value.ndim > 1:
            assert np.linalg.norm(theirs["weights"][-1][name]) < 0.999 * np.linalg.norm(value), "it was decayed"
        elif not is_untrained and not name.endswith("k.bias"):  # whose gradients are rounding
            assert ours["weights"][-1][name] == pytest.approx(theirs["weights"][-1][name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_another_objective_trains_it_from_moments_of_zero(runs: Any) -> None:
    folder, results = runs
    before, result = saved(folder, "clip"), results["to lcl"]
    assert result["moments at first"]["exp_avg"] == {name for name in before if not name.startswith(UNTRAINED["clip"])}
    for name, value in before.items():
        assert not np.array_equal(result["weights"][-1][name], value), name
