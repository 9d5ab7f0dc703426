"""Numbers of a run as a stream: what is kept does not grow with the run, and nothing that matters is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lcl.report import series
from megatron_lcl.report.events import MAX_EVENTS, MAX_STRETCHES, Event, Events, audited, newest, numbers
from megatron_lcl.report.series import MAX_BUCKETS, MAX_METRICS, Metrics, Series
from megatron_lcl.train.telemetry.lines import keep_lines_before


def write(run: Path, lines: Iterable[Mapping[str, Any]], mode: str = "w", name: str = "metrics.jsonl") -> None:
    run.mkdir(exist_ok=True)
    with (run / name).open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize("number", [1, 400, 401, 4096, 30_011])
def test_stretches_say_what_all_values_say(number: int) -> None:
    rng = np.random.default_rng(number)
    steps = np.cumsum(rng.integers(1, 4, number))
    values = rng.normal(size=number)
    values[number // 3] = 1e6
    values[number // 2 :: 7] = math.nan
    series = Series()
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        series.add(step, value)
    assert len(series.points().first) <= MAX_BUCKETS
    for width in (1, 4 * series.width):
        points, stretches = series.points(width), steps // max(width, series.width)
        for i, stretch in enumerate(np.unique(stretches)):
            inside = stretches == stretch
            assert (points.first[i], points.final[i]) == (steps[inside].min(), steps[inside].max())
            there = values[inside & np.isfinite(values)]
            if not len(there):
                assert np.isnan([points.low[i], points.high[i], points.mean[i]]).all()
                continue
            assert (points.low[i], points.high[i]) == (there.min(), there.max())
            assert points.mean[i] == pytest.approx(there.mean())
    assert series.num_values == np.isfinite(values).sum()


def test_a_spike_of_one_step_is_kept() -> None:
    series = Series()
    for step in range(1, 200_001):
        series.add(step, 50.0 if step == 154_321 else 1.0)
    points = series.points()
    assert len(points.first) <= MAX_BUCKETS
    (spike,) = np.flatnonzero(points.high > 1)
    assert points.first[spike] <= 154_321 <= points.final[spike]
    assert (points.high[spike], points.low[spike]) == (50.0, 1.0)
    assert len(series._pending) < 5000, "memory does not grow with the run"


def test_reading_on_gives_what_reading_at_once_gives(tmp_path: Path) -> None:
    lines = [
        {"step": s, "loss": 1 / s, "num_targets": 3, "generation": 2.0 * s, "time": 10.0 * s} for s in range(1, 900)
    ]
    write(tmp_path / "a", lines[:10])
    grown = Metrics.of(tmp_path / "a")
    assert not grown.read()
    for first in range(10, len(lines), 100):
        write(tmp_path / "a", lines[first : first + 100], "a")
        with (tmp_path / "a/metrics.jsonl").open("a") as file:
            file.write('{"step": 1')  # being written
        assert grown.read()
        with (tmp_path / "a/metrics.jsonl").open("r+") as file:
            file.truncate((tmp_path / "a/metrics.jsonl").stat().st_size - len('{"step": 1'))
    write(tmp_path / "b", lines)
    whole = Metrics.of(tmp_path / "b")
    for name in ("loss", "generation"):
        np.testing.assert_array_equal(grown.series[name].points()[2], whole.series[name].points()[2])
    assert grown.last == whole.last == lines[-1]
    assert grown.seconds == whole.seconds == 10.0 * 898
    # a rewind: the file is another, shorter one, and nothing of the steps after it stays
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", lines[:5])
    (tmp_path / "new/metrics.jsonl").replace(tmp_path / "a/metrics.jsonl")
    assert grown.read()
    assert (grown.last_step, grown.series["loss"].num_values) == (5, 5)
    write(tmp_path / "a", lines[:3])  # in its place
    assert grown.read()
    assert (grown.last_step, grown.series["loss"].num_values) == (3, 3)


def test_time_between_starts_does_not_count(tmp_path: Path) -> None:
    """Lines in the order in which a process writes them; the last starts are those of a finished run, for the
    evaluation that it had missed, and for nothing."""

    def start(step: int, time: float) -> list[dict[str, Any]]:
        return [
            {"step": step, "strategy": "retain", "retain_bytes": 7, "time": time},
            {"step": step, "phase": 1, "image_size": 16, "time": time + 1},
            {"step": step, "images_per_pack": 4, "contrast_share": 0.5, "time": time + 2},
        ]

    kernels = {"attention": "dense", "loss_kernels": "torch"}
    first = [*start(0, 0.0), {"step": 0, **kernels, "time": 5.0}, {"step": 1, "loss": 2.0, "time": 10.0}]
    phase = [{"step": 1, "phase": 2, "image_size": 32, "time": 12.0}, {"step": 2, "loss": 2.0, "time": 15.0}]
    evaluation = [*start(3, 50_000.0), {"step": 3, "heldout/bits_per_token": 8.0, "time": 50_042.0}]
    second = [*start(2, 9000.0), {"step": 2, **kernels, "time": 9005.0}, {"step": 3, "loss": 2.0, "time": 9008.0}]
    write(tmp_path, [*first, *phase, *second, *evaluation, *start(3, 99_000.0)])
    assert Metrics.of(tmp_path).seconds == 5.0 + 3.0 + 3.0 + 40.0, "up to the phase, in it, from there, evaluating"


def test_time_in_which_the_machine_sleeps_does_not_count(tmp_path: Path) -> None:
    """The clock of the lines stands still meanwhile, and does not jump where the time is set; a start may have another
    one, as on another machine."""
    start = {"step": 0, "phase": 1, "image_size": 16, "time": 1e6, "clock": 500.0}
    steps = [(1, 1e6 + 10, 510.0), (2, 1e6 + 30_000, 530.0), (3, 1e6 - 9, 545.0)]
    again = [{"step": 3, "loss_kernels": "torch", "time": 2e6, "clock": 7.0}]
    again += [{"step": 4, "loss": 1.0, "time": 2e6 + 8, "clock": 15.0}]
    write(tmp_path, [start, *({"step": s, "loss": 1.0, "time": t, "clock": c} for s, t, c in steps), *again])
    metrics = Metrics.of(tmp_path)
    assert metrics.seconds == 45.0 + 8.0
    assert (metrics.first_time, metrics.last_time) == (1e6, 2e6 + 8)
    assert "clock" not in metrics.series
    assert next(event.text for event in newest(metrics.events)) == "phase 1: image size 16"


def test_time_that_was_set_back_counts_for_nothing(tmp_path: Path) -> None:
    """In lines of earlier versions, which have no clock."""
    times = {0: 1000.0, 1: 1010.0, 2: 20.0, 3: 25.0}
    write(tmp_path, [{"step": step, "loss": 1.0, "time": time} for step, time in times.items()])
    assert Metrics.of(tmp_path).seconds == 10.0 + 5.0


def test_a_phase_begins_where_another_is_told_of(tmp_path: Path) -> None:
    """Each start tells of the phase in which it goes on; with other settings it may be another one of that number."""
    phases = ((0, 1, 16), (7, 1, 16), (9, 2, 16), (12, 2, 16), (13, 1, 16), (14, 1, 32))
    lines = [{"step": step, "phase": n, "image_size": size, "time": 9.0 * step} for step, n, size in phases]
    write(tmp_path, lines)
    assert [event.step for event in newest(Metrics.of(tmp_path).events)] == [0, 9, 13, 14]


def test_what_is_no_number_of_a_step(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            {"step": 0, "attention": "dense", "loss_kernels": "torch", "hardware": {"device": "a"}, "time": 0.0},
            {"step": 0, "phase": 1, "image_size": 16, "time": 0.0},
            {"step": 1, "loss": math.nan, "grad_norm": math.inf, "num_pairs": 0, "contrastive": 0.0, "time": 5.0},
            {"step": 2, "skipped": "loss is nan", "lr": 0.1, "time": 6.0},
            {"step": 2, "bad_images": ["a: empty", "b: cut"], "time": 6.0},  # of an earlier version
            {"step": 3, "bad_images": ["a: empty", "b: cut"], "num_bad_images_since": 40, "time": 7.0},
            {"step": 3, "loss": 2.0, "num_pairs": 4, "contrastive": 1.0, "image_accuracy": 0.5, "time": 9.0},
            {"step": 3, "attention": "dense", "loss_kernels": "torch", "hardware": {"device": "b"}, "time": 1000.0},
            {"step": 4, "loss": 1.0, "num_targets": 0, "generation": 0.0, "time": 1003.0, "on": True, "words": "x"},
            {"step": 4, "health": {"metric": "latent_spread", "says": "all the same"}, "time": 1003.0},
            {
                "step": 4,
                "time": 1003.0,
                "stragglers": [{"node": "n1", "rank": 3, "last": 2, "of": 9, "lag_seconds": 0.5, "phase": "data"}],
            },
        ],
    )
    audit = [
        {"time": 6.0, "event": "step skipped", "step": 2, "reason": "loss is nan"},
        {"time": 7.0, "event": "step skipped", "step": 9, "reason": "gone with a rewind"},
        {"time": 8.0, "event": "rewind", "step": 9, "to": 3},
        {"time": 9.0, "event": "stopped", "step": 3, "signal": 15, "saved": 3},
        {"time": 9.5, "event": "blend changed", "step": 3, "from_pack": 12, "gone": [], "new": [["b", "5f"]]},
    ]
    write(tmp_path, audit, name="audit.jsonl")
    with (tmp_path / "audit.jsonl").open("a") as file:
        file.write('{"cut')
    metrics = Metrics.of(tmp_path)
    happened = newest(metrics.events)
    assert [(e.kind, e.step) for e in happened] == [
        ("phase", 0), ("skipped", 2), ("skipped", 9), ("rewind", 9), ("stopped", 3), ("blend changed", 3),
        ("resumed", 3), ("health", 4), ("stragglers", 4),
    ]  # fmt: skip
    said = {e.kind: e.text for e in happened}
    assert said["blend changed"] == "without nothing, with b"
    assert said["stragglers"] == "process 3 (node n1) last in 2 of 9 lines, by 0.5 s a step, in data"
    assert metrics.seconds == 12.0, "not the time in which nothing ran"
    assert metrics.series["loss"].num_values == 2
    assert metrics.series["contrastive"].num_values == 1, "no mean over no pairs"
    assert metrics.series["generation"].num_values == 0, "nor over no targets"
    assert metrics.series["chance_accuracy"].last == 0.25, "earlier versions did not write it"
    assert metrics.hardware == {"device": "b"}, "that of the last process"
    others = {"on", "words", "skipped", "phase", "image_size", "step", "time", "num_bad_images_since"}
    assert others.isdisjoint(metrics.series)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{damaged}\n[1]\n{"step": 8, "loss": NaN}\n{"step": 7, "checkpoint_write_seconds": 9.0}\n')
    metrics = Metrics.of(tmp_path)
    assert metrics.damage == f"{tmp_path / 'metrics.jsonl'}: 2 damaged lines passed over (the first is line 12)"
    assert metrics.last_step == 8


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": "stopped", "signal": 15, "saved": 1200}, "signal 15; saved at step 1,200"),
        ({"event": "initial weights", "path": "runs/a"}, "runs/a"),
        (
            {"event": "checkpoint rejected", "folder": "runs/a/step-00000100", "faults": ["a: gone", "b: 3 bytes"]},
            "step-00000100: a: gone; b: 3 bytes",
        ),
    ],
)
def test_what_is_said_of_an_event(event: dict[str, Any], said: str) -> None:
    found = audited(json.dumps({"step": 3, "time": 1.0, **event}).encode())
    assert found is not None
    assert found.text == said


def test_names_and_events_without_end_are_bounded(tmp_path: Path) -> None:
    write(tmp_path, [{"step": s, f"name{s}": 1.0, "skipped": None} for s in range(1000)])
    write(tmp_path, [{"event": "step skipped", "step": s, "reason": "x"} for s in range(1000)], name="audit.jsonl")
    metrics = Metrics.of(tmp_path)
    assert len(metrics.series) <= MAX_METRICS
    assert [e.step for e in newest(metrics.events)] == list(range(1000))[-MAX_EVENTS:]


def test_a_clock_that_is_set_back_changes_no_order(tmp_path: Path) -> None:
    """Within a file; events of the other stand where the latest time so far puts them."""
    times = [1e9 + 60 * step - 3600 * (step > 80) for step in range(101)]
    phases = {70: {"phase": 1}, 99: {"phase": 2}}
    write(tmp_path, [{"step": s, "time": times[s] + 1, **phases.get(s, {"loss": 1.0})} for s in range(101)])
    audit = ({"event": "rewind", "step": s, "to": s - 1, "time": times[s]} for s in range(1, 101))
    write(tmp_path, audit, name="audit.jsonl")
    happened = newest(Metrics.of(tmp_path).events)
    assert [event.step for event in happened] == [*range(43, 71), 70, *range(71, 101), 99]


def test_marks_of_many_events_are_spread_over_the_steps_of_the_run() -> None:
    events = Events(Event("skipped", step, None, "x") for step in range(0, 1_000_000, 100))
    first, numbers = zip(*events.stretches, strict=True)
    assert MAX_STRETCHES // 3 < len(first) <= MAX_STRETCHES
    assert sum(numbers) == events.number == 10_000
    assert max(numbers) <= 2 * min(numbers[:-1])
    assert [event.step for event in events.newest] == list(range(0, 1_000_000, 100))[-MAX_EVENTS:]


def test_of_a_file_that_was_cut_and_has_grown_again_nothing_old_stays(tmp_path: Path) -> None:
    """No look comes between the cut, which is in place, and the lines after it, which are other ones."""
    lines = [{"step": s, "loss": 1 / s, "time": 10.0 * s} for s in range(1, 60)]
    write(tmp_path, [{"step": 0, "loss_kernels": "torch", "time": 0.0}, *lines])
    write(tmp_path, [{"time": 1.0, "event": "stopped", "step": 59, "signal": 15}], name="audit.jsonl")
    followed = Metrics.of(tmp_path)
    keep_lines_before(tmp_path / "metrics.jsonl", 20)
    start = {"step": 20, "loss_kernels": "torch", "hardware": {"device": "other"}, "time": 1e6}
    write(tmp_path, [start, *({**line, "loss": 2.0, "time": 1e6 + 9 * s} for s, line in enumerate(lines[20:]))], "a")
    write(tmp_path, ({"step": s, "loss": 3.0, "time": 2e6 + s} for s in range(60, 90)), "a")
    assert followed.read()
    anew = Metrics.of(tmp_path)
    assert anew.events["resumed"].number == 1
    for name in ("last_step", "last", "seconds", "hardware", "first_time", "last_time"):
        assert getattr(followed, name) == getattr(anew, name), name
    assert newest(followed.events) == newest(anew.events)
    assert numbers(followed.events) == numbers(anew.events) == "1 × resumed, 1 × stopped"
    np.testing.assert_array_equal(followed.series["loss"].points()[2], anew.series["loss"].points()[2])
    assert not followed.read()


def test_the_audit_is_read_on_and_not_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = [{"time": 1.0 * s, "event": "step skipped", "step": s, "reason": "x"} for s in range(1000)]
    write(tmp_path, audit[:-1], name="audit.jsonl")
    followed, read = Metrics.of(tmp_path), []

    def counted(raw: bytes) -> Event | None:
        read.append(raw)
        return audited(raw)

    monkeypatch.setattr(series, "audited", counted)
    assert not followed.read()
    write(tmp_path, audit[-1:], "a", "audit.jsonl")
    assert followed.read()
    assert len(read) == 1
    assert numbers(followed.events) == "1,000 × step skipped"
    (tmp_path / "audit.jsonl").unlink()
    assert followed.read()
    assert not followed.events
