"""Images that did not decode, from the steps of a run to metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_lcl import config as configs
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train import loop
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.telemetry import Telemetry, read_metrics
from megatron_lcl.train.telemetry.bad_image_log import BadImageLog


class Two(Axis):
    """Of two processes the first; the other has read as many bad images."""

    def gather_objects(self, value: Any) -> list[Any]:
        GATHERED.append(len(value))
        return [value, [f"theirs, {reason}" for reason in value]]


GATHERED: list[int] = []


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A run of two processes whose steps compute nothing, logged every 10 steps."""
    for name in ("num_micro_batches", "learning_rate", "lowerable_scale", "broadcast_batches"):
        monkeypatch.setattr(loop, name, mock.Mock())
    GATHERED.clear()
    training = mock.MagicMock()
    training.progress, training.loader, training.phase.change = Progress(0, 0, {}), None, None
    training.phase.config.train.global_batch = 4
    training.profile.ends_after.return_value = False
    training.mesh.world = Two()
    config = configs.load(None, {"train.steps": "40", "train.log_every": "10", "train.progress": "false"})
    with Telemetry(tmp_path, config, True, 0) as training.telemetry:
        training.bad_images = BadImageLog(training.mesh.world, training.telemetry)
        yield training


def step(training: Any, number: int) -> None:
    """A step of which each process reads so many bad images."""
    made = training.progress.step + 1
    bad = tuple((slot, f"shard {made}, image {slot}: {'cut off ' * 15}") for slot in range(number))
    counts = {"num_bad_images": 2 * number, "num_images": 90, "num_tokens": 900, "num_pairs": 90}
    training.batches.take.return_value.read = [SimpleNamespace(bad_images=bad)]
    training.stepper.start.return_value = SimpleNamespace(
        counts=SimpleNamespace(counts=counts), loss=torch.tensor(1.0), skipped=False
    )
    loop.Training._step(training)


def test_processes_tell_each_other_at_logged_steps(training: Any, tmp_path: Path) -> None:
    for _ in range(9):
        step(training, 1)
    assert not GATHERED, "before the step that is logged"
    for _ in range(21):
        step(training, 0)
    assert GATHERED == [9], "once, and not where there is none"
    (line,) = read_metrics(tmp_path)
    assert (line["step"], line["num_bad_images_since"], len(line["bad_images"])) == (10, 18, 10)
    assert [reason.partition(":")[0] for reason in line["bad_images"]] == [
        *(f"shard {made}, image 0" for made in range(1, 10)),
        "theirs, shard 1, image 0",
    ]


def test_none_is_lost_or_counted_twice_at_a_save_and_a_rewind(training: Any, tmp_path: Path) -> None:
    """What was read since a save is dropped with the steps that a rewind makes again."""
    for _ in range(4):
        step(training, 1)
    loop.Training._save(training)
    for _ in range(3):
        step(training, 2)
    training.bad.began = (4, 16)
    with mock.patch.object(loop.checkpoint, "go_back", return_value=(None, {})), pytest.raises(loop.RunError):
        loop.Training._rewind(training)
    training.telemetry.rewind(4)
    training.progress = Progress(4, 16, {})
    for _ in range(6):
        step(training, 1)
    told = [(line["step"], line["num_bad_images_since"]) for line in read_metrics(tmp_path)]
    assert told == [(4, 8), (10, 12)]


def test_a_line_of_many_is_short(training: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.progress = Progress(9, 36, {})
    step(training, 500)
    assert (tmp_path / "metrics.jsonl").stat().st_size < 4_000
    (line,) = read_metrics(tmp_path)
    assert (line["num_bad_images_since"], len(line["bad_images"])) == (1_000, 10)
    assert GATHERED == [10], "nor does a process send more"
    assert "(1,000 so far, see metrics.jsonl)" in capsys.readouterr().out
