"""The trackers themselves, without a network: Weights & Biases offline, MLflow's files."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.objectives.base import COUNTS
from megatron_lcl.train.checkpoint.checkpointer import quiet
from megatron_lcl.train.resilience.signals import Stopped
from megatron_lcl.train.result import StepResult
from megatron_lcl.train.telemetry import Telemetry, feed, log, read_metrics, sinks
from megatron_lcl.train.telemetry.sinks import IDS, PACKAGES, WeightsAndBiases, check_trackers

RESULT = StepResult(1.0, 2.0, 1.5, 90, 4, 100, 90, 0, {"generation": 1.0, "contrastive": 1.0})
RATES = {"images_per_second": 1000.0, "tokens_per_second": 900.0, "step_seconds": 0.1}


def config_of(*names: str) -> Config:
    return configs.load(None, {"train.trackers": f"[{', '.join(names)}]", "train.log_every": "1", "train.steps": "9"})


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed (extra trackers)")


def steps(run: Path, config: Config, first: int, last: int) -> None:
    """The process makes steps first + 1 to last."""
    with Telemetry(run, config, True, first) as telemetry:
        for step in range(first + 1, last + 1):
            telemetry.count(step, {name: getattr(RESULT, name) for name in COUNTS})
            telemetry.step(step, RESULT, 1e-3, {**RATES, "grad_norm/vision": 0.5 * step})


def test_trackers_and_tensorboard_get_the_times_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number cannot be a list: the least, the median and the largest."""
    got: list[dict[str, float]] = []

    class Sink:
        def __init__(self, *_: Any) -> None: ...

        def write(self, _step: int, numbers: Mapping[str, float]) -> None:
            got.append(dict(numbers))

        def close(self, failed: bool = False) -> None: ...

    monkeypatch.setitem(log.TRACKERS, "mlflow", Sink)
    monkeypatch.setattr(log, "TensorBoard", Sink)
    with Telemetry(tmp_path, config_of("mlflow"), True, 0) as telemetry:
        telemetry.count(1, {name: getattr(RESULT, name) for name in COUNTS})
        more = {"rank_step_seconds": [0.4, 0.1, 0.2], "rank_work_seconds": [0.3, 0.1, 0.1], "slowest_lag_seconds": 0.2}
        telemetry.step(1, RESULT, 1e-3, RATES | more)
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
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    for error, status in ((RunError("no room"), "FAILED"), (Stopped(signal.SIGTERM, 2, 2), "FINISHED")):
        with contextlib.suppress(RunError, Stopped), Telemetry(tmp_path, config, True, 2):
            assert client.get_run(number).info.status == "RUNNING"
            raise error
        assert client.get_run(number).info.status == status
    longer = configs.replace(config, train__steps=12)
    steps(tmp_path, longer, 2, 4)
    assert json.loads((tmp_path / IDS).read_text())["mlflow"] == number
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


def test_an_original_that_may_not_be_entered_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: Path, **given: Any) -> os.stat_result:
        if path.is_relative_to("/home/another"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return os.stat(path, **given)

    monkeypatch.setattr(Path, "stat", stat)  # root may enter all
    (tmp_path / IDS).write_text('{"wandb": "run 8", "folder": "/home/another/run"}')
    assert sinks._with_id(tmp_path, "wandb", lambda known: (known, str(known))) == "run 8"


def test_trackers_that_begin_at_once_are_both_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, names = sinks.replace_text, ("wandb", "mlflow")
    both = threading.Barrier(2)

    def slowly(path: Path, text: str) -> None:
        time.sleep(0.2)
        replace(path, text)

    def begin(known: str | None) -> tuple[None, str]:
        both.wait(60)
        return None, "1"

    monkeypatch.setattr(sinks, "replace_text", slowly)
    threads = [threading.Thread(target=sinks._with_id, args=(tmp_path, name, begin)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {*json.loads((tmp_path / IDS).read_text())} == {*names, "folder"}


def test_mlflow_has_the_config_of_a_run_folder_that_is_reached_by_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for link in ("a", "b"):
        (tmp_path / link).symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    steps(tmp_path / "a", config_of("mlflow"), 0, 1)
    (written,) = (tmp_path / "run/mlruns").glob("*/*/artifacts/config.json")
    written.unlink()
    steps(tmp_path / "b", config_of("mlflow"), 1, 2)
    assert written.exists()


def test_mlflow_writes_nothing_where_a_run_folder_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_of("mlflow")
    steps(tmp_path / "run", config, 0, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    for _ in range(2):
        steps(tmp_path / "moved", config, 1, 2)
    assert not (tmp_path / "run").exists()


def test_mlflow_without_its_store_of_artifacts_has_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    (tmp_path / "full").write_text("")
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.create_experiment("megatron-lcl", (tmp_path / "full/store").as_uri())
    for first in (0, 1):
        steps(tmp_path, config_of("mlflow"), first, first + 1)
    (run,) = client.search_runs([experiment])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    assert [line.message.partition(": ")[0] for line in caplog.records if "config.json" in line.message] == [
        "mlflow has no config.json of this run"
    ] * 2


@pytest.mark.parametrize("stores", ["metrics", "artifacts"])
def test_a_password_in_a_trackers_address_is_not_said(
    stores: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    needs("mlflow")
    from mlflow import MlflowClient

    closed = "http://user:planted@127.0.0.1:9/x"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if stores == "metrics":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{closed}?token=planted")
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        MlflowClient((tmp_path / "mlruns").as_uri()).create_experiment("megatron-lcl", closed)
    steps(tmp_path, config_of("mlflow"), 0, 1)
    said = capfd.readouterr()
    about = "mlflow gets no more metrics" if stores == "metrics" else "mlflow has no config.json of this run"
    assert f"{about}: " in said.out + caplog.text
    assert "planted" not in said.out + said.err + caplog.text


def test_a_server_that_never_answers_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes connections, as one does whose process hangs. MLflow would wait for twenty minutes."""
    needs("mlflow")
    monkeypatch.setattr(feed, "START_SECONDS", 0.5)
    monkeypatch.setattr(feed, "END_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # so that its thread ends soon
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        steps(tmp_path, config_of("mlflow"), 0, 9)
        assert time.monotonic() - began < 60
        assert server.accept()
    said = "mlflow gets no more metrics: its server has not answered for 0.5 s; metrics.jsonl has"
    assert capsys.readouterr().out.count(said) == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, 10)]


def test_a_tracker_that_falls_behind_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, asked = threading.Event(), threading.Event()
    got: list[int] = []

    class Slow:
        def __init__(self, run: Path, config: Config) -> None: ...

        def write(self, step: int, numbers: object) -> None:
            got.append(step)
            asked.set()
            answers.wait(60)

        def close(self, failed: bool) -> None: ...

    monkeypatch.setitem(log.TRACKERS, "wandb", Slow)
    monkeypatch.setattr(feed, "WAITING", 3)
    with Telemetry(tmp_path, config_of("wandb"), True, 0) as telemetry:
        for step in range(1, 10):
            telemetry.write({"step": step, "loss": 1.0})
            assert asked.wait(60)
    assert capsys.readouterr().out.count("wandb gets no more metrics: 3 lines wait for its server; metrics.jsonl") == 1
    assert got == [1]
    answers.set()


def test_an_end_waits_until_it_is_said_that_a_tracker_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the process may end before its thread has said it."""
    saying, said = threading.Event(), list[str]()

    class Failing:
        def __init__(self, run: Path, config: Config) -> None: ...

        def write(self, step: int, numbers: object) -> None:
            raise RuntimeError("the server is gone")

        def close(self, failed: bool) -> None: ...

    def slowly(_: object, message: str) -> None:
        if message.startswith("mlflow"):
            saying.set()
            time.sleep(0.3)
            said.append(message)

    monkeypatch.setitem(log.TRACKERS, "mlflow", Failing)
    monkeypatch.setattr(Telemetry, "say", slowly)
    with Telemetry(tmp_path, config_of("mlflow"), True, 0) as telemetry:
        telemetry.write({"step": 1, "loss": 1.0})
        assert saying.wait(60)
    assert said == ["mlflow gets no more metrics: the server is gone; metrics.jsonl has them all"]


def test_a_trackers_package_is_imported_by_the_main_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes that are forked while another thread imports would wait for it for ever."""
    by, load = list[threading.Thread](), importlib.import_module

    def broken(name: str) -> ModuleType:
        if name != "mlflow":
            return load(name)
        by.append(threading.current_thread())
        raise ImportError(f"{name} needs another protobuf")

    class Sink:
        def __init__(self, run: Path, config: Config) -> None:
            broken("mlflow")

    monkeypatch.setitem(log.TRACKERS, "mlflow", Sink)
    monkeypatch.setattr(importlib, "import_module", broken)
    steps(tmp_path, config_of("mlflow"), 0, 1)
    assert by[0] is threading.main_thread()
    assert capsys.readouterr().out.count("mlflow gets no more metrics: mlflow needs another protobuf; metrics") == 1


def test_tensorboard_may_fail_by_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its package may raise what is no OSError."""
    drawn: list[int] = []

    class Board:
        def __init__(self, run: Path, first_step: int) -> None:
            if first_step == 1:
                raise RuntimeError("protobuf does not fit")

        def write(self, step: int, numbers: object) -> None:
            if step < 3:
                raise RuntimeError("protobuf does not fit")
            drawn.append(step)

        def close(self) -> None:
            raise RuntimeError("protobuf does not fit")

    monkeypatch.setattr(log, "TensorBoard", Board)
    steps(tmp_path, config_of(), 0, 4)
    assert drawn == [3, 4]
    assert capsys.readouterr().out.count("metrics cannot be written: protobuf does not fit") == 2
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_tensorboard_that_is_opened_again_hides_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of a save in the background is of an earlier one."""
    opened: list[int] = []

    class Board:
        def __init__(self, run: Path, first_step: int) -> None:
            opened.append(first_step)

        def write(self, step: int, numbers: object) -> None:
            if step == 5 and len(opened) == 1:
                raise OSError("no space")

        def close(self) -> None: ...

    monkeypatch.setattr(log, "TensorBoard", Board)
    with Telemetry(tmp_path, config_of(), True, 0) as telemetry:
        for step in range(1, 6):
            telemetry.count(step, {name: getattr(RESULT, name) for name in COUNTS})
            telemetry.step(step, RESULT, 1e-3, RATES)
        telemetry.write({"step": 2, "checkpoint_bytes": 7})
    assert opened == [1, 6]


def test_what_is_said_while_a_checkpoint_is_loaded_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tracker's thread may give up then, and says so once."""
    with Telemetry(tmp_path, config_of(), True, 0) as telemetry, quiet():
        thread = threading.Thread(target=telemetry.say, args=("mlflow gets no more metrics",))
        thread.start()
        thread.join()
        print("what a library prints")
    assert capsys.readouterr().out == "mlflow gets no more metrics\n"


def test_weights_and_biases_is_told_how_a_run_ends() -> None:
    codes: list[int] = []
    sink = object.__new__(WeightsAndBiases)
    sink._run = SimpleNamespace(finish=lambda exit_code: codes.append(exit_code))
    sink.close(True)
    sink.close(False)
    assert codes == [1, 0]


@pytest.mark.parametrize("mode", ["online", "run", "offline"])
def test_weights_and_biases_asks_for_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """On a terminal it would ask, in a thread; and its end has a limit, as the process's own waits for it."""
    begun: list[dict[str, Any]] = []

    def init(**given: Any) -> SimpleNamespace:
        begun.append(given)
        return SimpleNamespace(id="1", define_metric=lambda *_, **__: None)

    fake = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)),
        run=None,
        login=lambda prompt, verify: prompt or verify,
        init=init,
        Settings=lambda **given: given,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    if mode != "offline":
        with pytest.raises(UserError, match="no API key: give one by `wandb login` or WANDB_API_KEY"):
            WeightsAndBiases(tmp_path, config_of("wandb"))
        assert not begun
    else:
        WeightsAndBiases(tmp_path, config_of("wandb"))
        assert 0 < begun[0]["settings"]["finish_timeout"] < feed.END_SECONDS


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

        def close(self, failed: bool) -> None: ...

    monkeypatch.setitem(sinks.TRACKERS, "wandb", Failing)
    with Telemetry(tmp_path, config_of("wandb"), True, 0) as telemetry:
        for step in (1, 2, 3):
            telemetry.write({"step": step, "loss": 1.0})
        telemetry.rewind(2)
        telemetry.write({"step": 3, "loss": 1.0})
    assert capsys.readouterr().out.count("wandb gets no more metrics: the server is gone; metrics.jsonl has") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert len(begun) == 1
