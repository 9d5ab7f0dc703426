"""The trackers themselves, without a network: Weights & Biases offline, MLflow's files."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.objectives.base import COUNTS
from megatron_lcl.train.result import StepResult
from megatron_lcl.train.telemetry import Telemetry, log, read_metrics, sinks
from megatron_lcl.train.telemetry.sinks import IDS, PACKAGES, check_trackers

RESULT = StepResult(1.0, 2.0, 1.5, 90, 4, 100, 90, 0, {"generation": 1.0, "contrastive": 1.0})


def config_of(*names: str) -> Config:
    return configs.load(None, {"train.trackers": f"[{', '.join(names)}]", "train.log_every": "1", "train.steps": "9"})


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed (extra trackers)")


def steps(run: Path, config: Config, first: int, last: int) -> None:
    """The process makes steps first + 1 to last."""
    with Telemetry(run, config, True, first) as telemetry:
        for step in range(first + 1, last + 1):
            telemetry.count(step, {name: getattr(RESULT, name) for name in COUNTS}, 0.1)
            telemetry.step(step, RESULT, 1e-3, {"grad_norm/vision": 0.5 * step})


def test_trackers_and_tensorboard_get_the_times_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number cannot be a list: the least, the median and the largest."""
    got: list[dict[str, float]] = []

    class Sink:
        def __init__(self, *_: Any) -> None: ...

        def write(self, _step: int, numbers: Mapping[str, float]) -> None:
            got.append(dict(numbers))

        def close(self) -> None: ...

    monkeypatch.setitem(log.TRACKERS, "mlflow", Sink)
    monkeypatch.setattr(log, "TensorBoard", Sink)
    with Telemetry(tmp_path, config_of("mlflow"), True, 0) as telemetry:
        telemetry.count(1, {name: getattr(RESULT, name) for name in COUNTS}, 0.1)
        more = {"rank_step_seconds": [0.4, 0.1, 0.2], "rank_work_seconds": [0.3, 0.1, 0.1], "slowest_lag_seconds": 0.2}
        telemetry.step(1, RESULT, 1e-3, more)
    assert len(got) == 2
    for numbers in got:
        of_ranks = {name: value for name, value in numbers.items() if name.startswith(("rank", "slowest"))}
        assert of_ranks == {
            "rank_step_seconds/min": 0.1, "rank_step_seconds/median": 0.2, "rank_step_seconds/max": 0.4,
            "rank_work_seconds/min": 0.1, "rank_work_seconds/median": 0.1, "rank_work_seconds/max": 0.3,
            "slowest_lag_seconds": 0.2,
        }  # fmt: skip
    (line,) = read_metrics(tmp_path)
    assert line["rank_step_seconds"] == [0.4, 0.1, 0.2]
    assert not any("/" in name for name in line if name.startswith("rank"))


def test_mlflow_has_the_numbers_of_a_run_that_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    config = config_of("mlflow")
    steps(tmp_path, config, 0, 2)
    number = json.loads((tmp_path / IDS).read_text())["mlflow"]
    longer = configs.replace(config, train__steps=12)
    steps(tmp_path, longer, 2, 4)
    assert json.loads((tmp_path / IDS).read_text())["mlflow"] == number
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    history = client.get_metric_history(number, "grad_norm.vision")
    assert [(metric.step, metric.value) for metric in history] == [(step, 0.5 * step) for step in (1, 2, 3, 4)]
    assert [metric.value for metric in client.get_metric_history(number, "loss")] == [1.0] * 4
    run = client.get_run(number)
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    written = list((tmp_path / "mlruns").glob("*/*/artifacts/config.json"))
    assert [json.loads(path.read_text())["train"]["steps"] for path in written] == [12], "of the last start"


def test_the_copy_of_a_run_folder_has_a_run_of_its_own(tmp_path: Path) -> None:
    """With all trackers; a folder that was moved goes on with its own, and so does one of an earlier version."""
    drawn = iter(range(10))

    def begun(run: Path) -> list[str]:
        def begin(known: str | None) -> tuple[str, str]:
            number = known or f"run {next(drawn)}"
            return number, number

        return [sinks._with_id(run, name, begin) for name in ("wandb", "mlflow")]

    run, copy, moved = tmp_path / "run", tmp_path / "copy", tmp_path / "moved"
    run.mkdir()
    assert begun(run) == begun(run) == ["run 0", "run 1"]
    shutil.copytree(run, copy)
    assert begun(copy) == begun(copy) == ["run 2", "run 3"]
    assert begun(run) == ["run 0", "run 1"]
    run.rename(moved)
    run.mkdir()  # another one begins there
    assert begun(run) == ["run 4", "run 5"]
    assert begun(moved) == ["run 0", "run 1"]
    (moved / IDS).write_text('{"wandb": "run 8"}')
    assert begun(moved)[0] == "run 8"


def test_mlflow_writes_nothing_where_a_run_folder_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_of("mlflow")
    steps(tmp_path / "run", config, 0, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    for _ in range(2):
        steps(tmp_path / "moved", config, 1, 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of("wandb")
    steps(tmp_path, config, 0, 2)
    number = json.loads((tmp_path / IDS).read_text())["wandb"]
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb")
    deadline = time.monotonic() + 60  # its own process writes, and may still do so when the run has ended
    while missing := [name for name in (b"grad_norm", b"contrastive", b"log_every") if name not in file.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)
    steps(tmp_path, config, 2, 3)
    assert json.loads((tmp_path / IDS).read_text())["wandb"] == number


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="names mlflow, and its package is not installed; pip install mlflow-skinny"):
        check_trackers(config_of("mlflow"))
    check_trackers(config_of())


@pytest.mark.parametrize("at_start", [False, True])
def test_a_tracker_that_fails_ends_no_run(
    at_start: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is it tried again after a rewind."""
    begun = []

    class Failing:
        def __init__(self, run: Path, config: Config) -> None:
            assert os.path.isdir(run)
            begun.append(run)
            if at_start:
                raise ConnectionError("the server\nis gone")

        def write(self, step: int, numbers: object) -> None:
            raise RuntimeError("the server\nis gone")

        def close(self) -> None: ...

    monkeypatch.setitem(sinks.TRACKERS, "wandb", Failing)
    with Telemetry(tmp_path, config_of("wandb"), True, 0) as telemetry:
        for step in (1, 2, 3):
            telemetry.write({"step": step, "loss": 1.0})
        telemetry.rewind(2)
        telemetry.write({"step": 3, "loss": 1.0})
    assert capsys.readouterr().out.count("wandb gets no more metrics: the server is gone; metrics.jsonl has") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert len(begun) == 1
