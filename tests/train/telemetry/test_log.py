"""What the progress bar says, what a log gets in its place, and metrics.jsonl as it is read."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import pytest
import tqdm.std
from tensorboard.backend.event_processing import event_accumulator

from megatron_lcl import config as configs
from megatron_lcl.objectives.base import COUNTS
from megatron_lcl.run_folder import METRICS
from megatron_lcl.train.result import StepResult
from megatron_lcl.train.telemetry import Telemetry, read_metrics

METRICS_OF_A_STEP = {"generation": 1.0, "contrastive": 1.0, "image_accuracy": 0.5, "text_accuracy": 0.3}
RESULT = StepResult(1.0, 2.0, 1.0, 90, 4, 100, 90, 0, METRICS_OF_A_STEP)
SHOWN = re.compile(r"(\d+)/1000 \[\d\d:\d\d<(\d\d):(\d\d), +([\d.]+)(step/s|s/step)")


LINE = re.compile(
    r"step (\d+)/9 loss 1\.000 \(([^()]*)\) (?:acc (.*) )?lr 1\.00e-3 1000 img/s, 900 tok/s "
    r"(\d+):(\d\d) left"
)


def rates(result: StepResult) -> dict[str, float]:
    """Of a step of 0.1 s."""
    per_second = {f"{name}_per_second": getattr(result, f"num_{name}") / 0.1 for name in ("images", "tokens")}
    return {**per_second, "step_seconds": 0.1}


def done(telemetry: Telemetry, step: int, result: StepResult = RESULT) -> None:
    """A step of 0.1 s."""
    telemetry.count(step, {name: getattr(result, name) for name in COUNTS})
    if telemetry.is_logged(step):
        telemetry.step(step, result, 1e-3, rates(result))


def terminals(monkeypatch: pytest.MonkeyPatch, out: bool, err: bool) -> None:
    """What stdout and stderr are taken for."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: out)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: err)


@pytest.mark.parametrize("goes_back", [False, True])
def test_what_follows_lines_that_were_dropped_is_in_the_file(goes_back: bool, tmp_path: Path) -> None:
    """A save's line stands behind those of later steps, where it is written in the background."""
    written = [{"step": step} for step in (1, 2, 3, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    config = configs.load(None, {"train.output": str(tmp_path), "train.steps": "9", "train.progress": "false"})
    with Telemetry(tmp_path, config, True, 3 if goes_back else 2) as telemetry:
        if goes_back:
            telemetry.rewind(2)
        telemetry.write({"step": 3, "loss": 1.0})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 2, 3]
    assert time.time() - lines[-1]["time"] == pytest.approx(time.monotonic() - lines[-1]["clock"], abs=5)


def test_a_clock_that_is_set_back_hides_no_step_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after a rewind nor at a later start, as on a machine whose clock is behind."""
    config = configs.load(None, {"train.output": str(tmp_path), "train.steps": "9", "train.progress": "false"})

    def write(telemetry: Telemetry, first: int, last: int, value: float) -> None:
        for step in range(first, last + 1):
            telemetry.write({"step": step, "loss": value})

    clock = 1e9 + 7200
    monkeypatch.setattr(time, "time", lambda: clock)
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        write(telemetry, 1, 4, 1.0)
        clock -= 3600
        telemetry.rewind(2)
        write(telemetry, 3, 5, 2.0)
    clock -= 3600
    with Telemetry(tmp_path, config, True, 3) as telemetry:
        write(telemetry, 4, 6, 3.0)
        accumulator = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0), (6, 3.0)]


@pytest.mark.parametrize("goes_back", [False, True])
def test_results_of_steps_that_were_dropped_are_gone(goes_back: bool, tmp_path: Path) -> None:
    """Of a model that the run no longer comes from; not those up to the step, nor of unknown steps."""
    config = configs.load(None, {"train.output": str(tmp_path), "train.steps": "9", "train.progress": "false"})

    def open_at(step: int, heldout: str, labeled: str) -> list[str]:
        (tmp_path / "heldout.json").write_text(heldout)
        (tmp_path / "heldout_examples.json").write_text("[]")
        (tmp_path / "labeled.json").write_text(labeled)
        with Telemetry(tmp_path, config, True, 9 if goes_back else step) as telemetry:
            if goes_back:
                telemetry.rewind(step)
        return sorted(path.stem for path in tmp_path.glob("*.json"))

    assert open_at(2, '{"step": 3}', '{"step": 2}') == ["labeled"]
    assert open_at(2, '{"step": null}', '{"step": 3}') == ["heldout", "heldout_examples"]
    assert open_at(3, '{"step": 3}', '{"st') == ["heldout", "heldout_examples", "labeled"]


def test_time_left_after_resuming_and_after_a_rewind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminals(monkeypatch, True, True)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    config = configs.load(None, {"train.steps": "1000", "train.log_every": "1"})
    with Telemetry(tmp_path, config, True, 900) as telemetry:
        for first in (900, 500):
            if first == 500:
                telemetry.rewind(first)
            for step in range(first + 1, first + 7):
                clock[0] += 0.5
                done(telemetry, step)
            step, minutes, seconds, rate, unit = SHOWN.findall(capsys.readouterr().err)[-1]
            assert int(step) == first + 6
            assert (1 / float(rate) if unit == "step/s" else float(rate)) == pytest.approx(0.5)
            left = int(minutes) * 60 + int(seconds)
            assert left == (1000 - int(step)) * 0.5


@pytest.mark.parametrize(
    ("out", "err", "progress", "bar", "lines"),
    [
        (True, True, True, True, False),
        (True, True, False, False, True),  # in a terminal too, false means no bar and nothing else
        (False, False, True, False, True),
        (False, False, False, False, True),  # what the sbatch scripts passed once: no line came
        (False, True, True, True, True),  # `train … > log`
        (True, False, True, False, True),  # `train … 2> errors`
    ],
)
def test_a_terminal_has_a_bar_and_a_log_has_lines(
    out: bool,
    err: bool,
    progress: bool,
    bar: bool,
    lines: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminals(monkeypatch, out, err)
    overrides = {"train.steps": "9", "train.log_every": "4", "train.progress": str(progress).lower()}
    with Telemetry(tmp_path, configs.load(None, overrides), True, 0) as telemetry:
        for step in range(1, 10):
            done(telemetry, step)
    said = capsys.readouterr()
    assert ("loss 1.000, accuracy 50.0% (chance 25%), 1000 img/s" in said.err) == bar
    matches = [LINE.fullmatch(line) for line in said.out.splitlines()]
    assert [match and match[1] for match in matches] == (["4", "8", "9"] if lines else [])
    assert {match.groups()[1:3] for match in matches if match} <= {
        ("generation 1.000, contrastive 1.000", "50.0/30.0% (chance 25%)")
    }


def test_a_line_shows_what_the_step_has_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Telemetry(tmp_path, configs.load(None, {"train.steps": "9", "train.log_every": "1"}), True, 2) as telemetry:
        for step, pairs in ((3, 4), (4, 0), (5, 1)):
            done(telemetry, step, dataclasses.replace(RESULT, num_pairs=pairs))
            clock[0] += 70  # with what lies between the steps, such as saving
    lines = [match for line in capsys.readouterr().out.splitlines() if (match := LINE.fullmatch(line))]
    both = "generation 1.000, contrastive 1.000"
    assert [match[2] for match in lines] == [both, "generation 1.000", both]
    assert [match[3] for match in lines] == ["50.0/30.0% (chance 25%)", None, "50.0/30.0% (chance 100%)"]
    assert [60 * int(match[4]) + int(match[5]) for match in lines] == [6 * 0.1 // 1, 5 * 70, 4 * 70]


def test_a_line_names_the_wait_for_data_and_the_peak_where_they_say_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminals(monkeypatch, False, False)
    config = configs.load(None, {"train.steps": "100000", "train.log_every": "1"})
    result = dataclasses.replace(RESULT, num_images=9_876, num_tokens=2_345_678, num_pairs=9_000)
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        for step, (wait, peak) in enumerate(((0.009, 6e10), (0.123, 6.05e10), (0.0, 6.12e10)), 1):
            telemetry.count(step, {name: getattr(result, name) for name in COUNTS})
            telemetry.step(
                step, result, 1e-3, {**rates(result), "mfu": 0.412, "data_wait": wait, "memory_peak_bytes": peak}
            )
    said = capsys.readouterr().out
    assert "(chance 0.011%)" in said, "of 9,000 pairs"
    lines = re.findall(r"lr 1\.00e-3 (.*) [\d:]+ left$", said, re.MULTILINE)
    speed = "98.8k img/s, 23.5M tok/s, MFU 41.2%"
    assert lines == [f"{speed}, peak 60 GB", f"{speed}, data wait 12%", f"{speed}, peak 61.2 GB"]


def test_a_line_has_room_in_160_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With losses above 10, a wait for data, and hours to come."""
    terminals(monkeypatch, False, False)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    metrics = {"generation": 10.825, "contrastive": 12.25, "image_accuracy": 0.187, "text_accuracy": 0.186}
    result = dataclasses.replace(RESULT, loss=47.575, num_images=15, num_tokens=749, num_pairs=200, metrics=metrics)
    config = configs.load(None, {"train.steps": "46000", "train.log_every": "1"})
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        for step in (19_999, 20_000):
            telemetry.count(step, {name: getattr(result, name) for name in COUNTS})
            telemetry.step(step, result, 1.234e-4, {**rates(result), "data_wait": 0.123})
            clock[0] += 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "step 20000/46000 loss 47.58 (generation 10.82, contrastive 12.25) acc 18.7/18.6% (chance 0.5%) lr 1.23e-4 "
        "150 img/s, 7490 tok/s, data wait 12% 7:13:20 left"
    )
    assert len(line) <= 160


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 closing it fails, as is wanted
    monkeypatch.setattr(sys, "stdout", full)
    with Telemetry(tmp_path, configs.load(None, {"train.log_every": "1"}), True, 0) as telemetry:
        done(telemetry, 1)
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):  # the line still waits
        full.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_cut_line_is_skipped_and_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')  # as a killed run, or one that is writing, leaves it
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    file.write_text('{"step": 1}\n{"st\n')
    with pytest.raises(ValueError, match=f"{file}, line 2 is damaged"):
        read_metrics(tmp_path)


def test_bad_images_are_said_when_they_first_come_and_at_powers_of_ten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configs.load(None, {"train.progress": "false"})
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        for step in range(1, 61):
            telemetry.bad_images(step, 2, [f"image {step}: cut off"])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["step 1", "step 5", "step 50"]
    assert said[1] == "step 5: an image is skipped, image 5: cut off (10 so far, see metrics.jsonl)"
    line = read_metrics(tmp_path)[6]
    assert (line["bad_images"], line["num_bad_images_since"]) == (["image 7: cut off"], 2)


@pytest.mark.parametrize("objective", ["lcl", "generation"])
def test_steps_without_pairs_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    overrides = {"train.steps": "9", "train.log_every": "2", "train.progress": "false", "objective.name": objective}
    with Telemetry(tmp_path, configs.load(None, overrides), True, 0) as telemetry:
        for step in range(1, 9):
            done(telemetry, step, dataclasses.replace(RESULT, num_pairs=4 if step in (2, 6) else 0))
    lines = read_metrics(tmp_path)
    contrasted = (2, 6) if objective == "lcl" else ()
    for line in lines:
        of_pairs = (0.5, 1.0, 0.25) if line["step"] in contrasted else (None, None, None)
        assert (line["image_accuracy"], line["contrastive"], line.get("chance_accuracy")) == of_pairs, line["step"]
        assert (line["loss"], line["generation"], line["num_pairs"]) == (1.0, 1.0, 4 if line["step"] in (2, 6) else 0)
        assert "metrics" not in line
    counted = [line["steps_without_pairs"] for line in lines]
    said = [line for line in capsys.readouterr().out.splitlines() if not LINE.fullmatch(line)]
    if objective == "generation":
        assert (counted, said) == ([0, 0, 0, 0], [])
    else:
        assert counted == [1, 3, 4, 6]
        assert said[0].startswith("step 1 has no pair: no image is compared with a text in it")
        assert said[1:] == ["6 steps had no pair: no image was compared with a text in them"]


def test_a_step_without_targets_has_no_generation_loss(tmp_path: Path) -> None:
    config = configs.load(None, {"train.log_every": "1", "train.progress": "false"})
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        done(telemetry, 1, dataclasses.replace(RESULT, num_targets=0))
    (line,) = read_metrics(tmp_path)
    assert (line["generation"], line["contrastive"]) == (None, 1.0)


def test_chance_stands_beside_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminals(monkeypatch, True, True)
    config = configs.load(None, {"train.log_every": "1", "train.steps": "9"})
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        for step, pairs in ((1, 4), (2, 0)):
            done(telemetry, step, dataclasses.replace(RESULT, num_pairs=pairs))
            said = capsys.readouterr().err.rstrip().rpartition("\r")[2]
            assert ("accuracy 50.0% (chance 25%)" in said) == bool(pairs), said
