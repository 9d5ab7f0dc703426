"""What the progress bar says, and metrics.jsonl as it is read."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import pytest

from megatron_lcl import config as configs
from megatron_lcl.train.step import StepResult
from megatron_lcl.train.telemetry import METRICS, Telemetry, read_metrics

RESULT = StepResult(1.0, 2.0, 1.0, 90, 4, 4, 100, 0, {"generation": 1.0, "contrastive": 1.0, "image_accuracy": 0.5})
SHOWN = re.compile(r"(\d+)/1000 \[\d\d:\d\d<(\d\d):(\d\d), +([\d.]+)(step/s|s/step)")


def test_time_left_after_resuming_and_after_a_rewind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configs.load(None, {"train.steps": "1000", "train.log_every": "1"})
    with Telemetry(tmp_path, config, True, 900) as telemetry:
        for first in (900, 500):
            if first == 500:
                telemetry.rewind(first)
            started = time.monotonic()
            for step in range(first + 1, first + 7):
                time.sleep(0.1)
                telemetry.step(step, RESULT, 1e-3, 0.1, 0.0)
            per_step = (time.monotonic() - started) / 6
            step, minutes, seconds, rate, unit = SHOWN.findall(capsys.readouterr().err)[-1]
            assert int(step) == first + 6
            assert (1 / float(rate) if unit == "step/s" else float(rate)) == pytest.approx(per_step, rel=0.5)
            left = int(minutes) * 60 + int(seconds)
            assert left == pytest.approx((1000 - int(step)) * per_step, rel=0.5, abs=1)


def test_a_cut_line_is_skipped_and_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')  # as a killed run, or one that is writing, leaves it
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    file.write_text('{"step": 1}\n{"st\n')
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        read_metrics(tmp_path)


def test_bad_images_are_said_when_they_first_come_and_at_powers_of_ten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configs.load(None, {"train.progress": "false"})
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        for step in range(1, 61):
            telemetry.bad_images(step, [f"image {step}: cut off", f"image {step} b: empty"])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["step 1", "step 5", "step 50"]
    assert said[1] == "step 5: an image is skipped, image 5: cut off (10 so far, see metrics.jsonl)"
    assert read_metrics(tmp_path)[6]["bad_images"] == ["image 7: cut off", "image 7 b: empty"]


@pytest.mark.parametrize("objective", ["lcl", "generation"])
def test_steps_without_pairs_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    overrides = {"train.steps": "9", "train.log_every": "2", "train.progress": "false", "objective.name": objective}
    with Telemetry(tmp_path, configs.load(None, overrides), True, 0) as telemetry:
        for step in range(1, 9):
            telemetry.step(step, dataclasses.replace(RESULT, num_pairs=4 if step in (2, 6) else 0), 1e-3, 0.1, 0.0)
    lines = read_metrics(tmp_path)
    assert all(line["image_accuracy"] == 0.5 and "metrics" not in line for line in lines)
    counted = [line["steps_without_pairs"] for line in lines]
    said = capsys.readouterr().out.splitlines()
    if objective == "generation":
        assert (counted, said) == ([0, 0, 0, 0], [])
    else:
        assert counted == [1, 3, 4, 6]
        assert said[0].startswith("step 1 has no pair: no image is compared with a text in it")
        assert said[1:] == ["6 steps had no pair: no image was compared with a text in them"]
