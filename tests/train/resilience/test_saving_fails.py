"""A disk that is full and a folder that is read-only: training goes on, and stops after so many saves in a row."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
from audit_lines import read_audit
from fleet import lines, losses, train

from megatron_lcl.run_folder import CHECKPOINTS
from megatron_lcl.train.checkpoint import folder as checkpoint


def without_tensorboard() -> None:
    """It would meet the limits, too."""
    from megatron_lcl.train.telemetry import sinks

    sinks.TensorBoard.write = lambda *_: None  # type: ignore[method-assign]


def full_disk(rank: int, faulty: int, failing: Container[int]) -> None:
    """A limit on the size of files stands in for the disk of one process, in some of its saves, counted from 1.

    The write fails in the middle of a file.
    """
    from megatron_lcl.train.checkpoint import checkpointer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    without_tensorboard()
    plain, calls = checkpointer.write_files, []

    def write_files(*arguments: Any) -> Any:
        calls.append(1)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == faulty and len(calls) in failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        try:
            return plain(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    checkpointer.write_files = write_files


def full_disk_for_all(rank: int) -> None:
    """From the end of the third step to the end of the seventh no file of the first process grows past metrics.jsonl.

    That is past the log, where it says so, however many lines of progress a slow machine has written there. There is no
    room at all for the files of the first evaluation, which comes later: its loaders need some.
    """
    from megatron_lcl.run_folder import METRICS
    from megatron_lcl.train import heldout
    from megatron_lcl.train.telemetry import Telemetry

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    without_tensorboard()
    plain, write_heldout = Telemetry.step, heldout.write_heldout

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def step(self: Telemetry, number: int, *arguments: Any) -> None:
        if rank == 0 and number in (3, 7):
            limit((self._run / METRICS).stat().st_size if number == 3 else resource.RLIM_INFINITY)
        plain(self, number, *arguments)

    def write(*arguments: Any) -> None:
        heldout.write_heldout = write_heldout
        limit(0)
        try:
            write_heldout(*arguments)
        finally:
            limit(resource.RLIM_INFINITY)

    Telemetry.step = step  # type: ignore[method-assign]
    heldout.write_heldout = write


@pytest.mark.slow
def test_metrics_wait_for_space(config_file: str, undisturbed: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """A disk that is full is full for metrics too, and for the files of an evaluation."""
    run = tmp_path / "run"
    corpus = json.loads(Path(config_file).with_suffix(".json").read_text())["corpus"]
    evaluates = ["--train.evaluate_every", "9", "--evaluate.corpus", corpus, "--checkpoint.background", "false"]
    said = train(run, "--config", config_file, *evaluates, plant=full_disk_for_all)
    assert losses(run) == undisturbed
    assert said.count("metrics cannot be written") == 1
    assert said.count(f"the report will not have the evaluation after step 9: {run / 'heldout'}") == 1
    assert json.loads((run / "heldout.json").read_text())["step"] == 12
    assert [line["step"] for line in lines(run) if "heldout/seconds" in line] == [9, 12]
    assert [checkpoint.step_of(f) for f in checkpoint.list_checkpoints(run)] == [8, 12]
    assert [(line["event"], line["step"]) for line in read_audit(run)] == [
        ("checkpoint failed", 4),
        ("evaluation not written", 9),
    ]
    assert "Traceback" not in said


def no_room_for_an_evaluation(_rank: int) -> None:
    from megatron_lcl.train import heldout

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    heldout.write_heldout = write


@pytest.mark.slow
def test_the_last_evaluation_is_made_again_where_there_was_no_room(config_file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    corpus = json.loads(Path(config_file).with_suffix(".json").read_text())["corpus"]
    words = ["--config", config_file, "--train.steps", "2", "--train.evaluate_every", "2", "--evaluate.corpus", corpus]
    said = train(run, *words, size=1, plant=no_room_for_an_evaluation)
    assert "the report will not have the evaluation after step 2" in said
    assert not any("heldout/seconds" in line for line in lines(run))
    train(run, *words, size=1)
    assert json.loads((run / "heldout.json").read_text())["step"] == 2
    assert [line["step"] for line in lines(run) if "heldout/seconds" in line] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("background", ["true", "false"])
def test_training_goes_on_when_the_disk_is_full_for_a_while(
    background: str, config_file: str, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Saves of steps 2, 4, …, 12; those of 4, 6 and 10 fail, on the second process. Three in a row would end it."""
    run = tmp_path / "run"
    words = ["--config", config_file, "--checkpoint.every", "2", "--checkpoint.background", background]
    said = train(run, *words, "--checkpoint.keep_last", "9", plant=full_disk, planted=(1, (2, 3, 5)))
    assert losses(run) == undisturbed
    assert [checkpoint.step_of(f) for f in checkpoint.list_checkpoints(run)] == [2, 8, 12]
    assert all(checkpoint.verify(folder) == [] for folder in checkpoint.list_checkpoints(run))
    assert not list((run / CHECKPOINTS).glob(".*"))
    events = [(line["event"], line["step"], line["consecutive"]) for line in read_audit(run)]
    assert events == [("checkpoint failed", 4, 1), ("checkpoint failed", 6, 2), ("checkpoint failed", 10, 1)]
    assert "process 1 could not write the checkpoint" in read_audit(run)[0]["reason"]
    assert "no checkpoint of step 4" in said
    assert "the last complete checkpoint is of step 2" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_it_stops_after_so_many_failures_in_a_row(config_file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--config", config_file, "--checkpoint.every", "2", "--checkpoint.max_failures", "2"]
    said = train(run, *words, code=2, plant=full_disk, planted=(0, range(2, 99)))
    assert said.count("megatron-lcl train:") == 1
    assert "save number 2 in a row that failed; the last complete checkpoint is of step 2" in said
    assert "Traceback" not in said
    (left,) = checkpoint.list_checkpoints(run)
    assert checkpoint.step_of(left) == 2
    assert checkpoint.verify(left) == []
    assert not list((run / CHECKPOINTS).glob(".*"))


@pytest.mark.slow
def test_a_read_only_folder(config_file: str, undisturbed: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """Checkpoints go to a file system that takes no files: all steps are done, and the end says why none is saved."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(Path(config_file).read_text())
    (run / CHECKPOINTS).symlink_to("/proc/sys")
    said = train(run, "--config", config_file, "--checkpoint.max_failures", "9", code=2)
    assert losses(run) == undisturbed
    assert [line["event"] for line in read_audit(run)] == ["checkpoint failed"] * 3
    assert said.count("megatron-lcl train:") == 1
    assert "all steps are done, but there is no checkpoint yet" in said
    assert "Traceback" not in said
