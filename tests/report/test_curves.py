"""Charts of the report: which there are, gaps where nothing was measured, levels, marks, and what a curve says."""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from megatron_lcl.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Line, chart, short, shorts, ticks
from megatron_lcl.report.curves import MAX_LINES, groups, specs_for
from megatron_lcl.report.events import Event, Events
from megatron_lcl.report.series import Metrics, Series

POWERS = str.maketrans({"k": "e3", "M": "e6", "G": "e9", "T": "e12"})
PATH = re.compile(r'<path class="line (\w+)" data-label="([^"]*)"[^>]* d="([^"]*)"')


def lines_of(pairs: list[int], empty: float | None) -> list[dict[str, Any]]:
    """A line of metrics for each step; empty: what stands where there is no pair."""
    return [
        {
            "step": step,
            "num_pairs": n,
            "num_targets": 9,
            "loss": 1.0,
            "generation": 6.0 - step / 10,
            "contrastive": 3.0 - step / 10 if n else empty,
            "image_accuracy": 0.5 + step / 100 if n else empty,
        }
        for step, n in enumerate(pairs, 1)
    ]


def drawn(lines: Sequence[Mapping[str, Any]], events: Sequence[Event] = ()) -> dict[str, str]:
    """The figures of a run with these lines of metrics, by title."""
    metrics = Metrics(run=None)  # type: ignore[arg-type]
    for line in lines:
        metrics._take(line)
    by_kind = {kind: Events(e for e in events if e.kind == kind) for kind in dict.fromkeys(e.kind for e in events)}
    figures = [f for group in groups(metrics.series, metrics.last_step, by_kind) for f in group.figures]
    return {html.unescape(re.findall(r"<b>(.*?)</b>", figure)[0]): str(figure) for figure in figures}


@pytest.mark.parametrize("empty", [None, 0.0], ids=["now", "as earlier versions wrote it"])
def test_a_curve_breaks_where_a_step_has_no_pair(empty: float | None) -> None:
    found = drawn(lines_of([4, 4, 4, 0, 0, 4, 4, 0, 4, 0, 4, 4], empty))
    (generation,) = PATH.findall(found["generation loss (nats a token)"])
    (contrastive,) = PATH.findall(found["contrastive loss (nats)"])
    accuracy, chance = PATH.findall(found["accuracy of the contrast in the batch (%)"])
    assert generation[2].count("M") == 1
    for path in (contrastive, accuracy, chance):
        assert path[2].count("M") == 4  # runs of steps, the single one among them
        assert path[2].count("h0") == 1  # which is a dot
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", contrastive[2])]
    assert heights == sorted(heights)  # it falls all the way, and nowhere to 0 and back
    assert len(heights) == 8
    assert (chance[0], chance[1]) == ("quiet", "chance (1 / pairs)")


def test_levels_of_one_chart_are_told_apart() -> None:
    """Each way of retrieval has its chance; in runs by earlier rules both have one."""
    ways, level = ("image to context", "context to image"), "heldout/chance_at_10"
    lines = [{"step": s, **{f"heldout/{w.replace(' ', '_')}_recall_at_10": 0.5 for w in ways}} for s in (1, 2)]
    title, of_level = "held-out recall@10 (%)", re.compile(r'<path class="line quiet"[^>]*>')
    earlier = drawn([{**line, level: 0.2} for line in lines])[title]
    assert re.findall(r'class="line quiet" data-label="([^"]*)"', earlier) == ["chance"]
    both = drawn([{**line, level: 0.2, "heldout/context_to_image_chance_at_10": 0.1} for line in lines])[title]
    chart, key = both.split('<p class="key">')
    for part in (chart, key):
        dashes = [re.findall(r'stroke-dasharray="([^"]*)"', path) for path in of_level.findall(part)]
        assert len({dash for (dash,) in dashes}) == len(dashes) == 2
    labels = [f"chance, {way}" for way in ways]
    assert re.findall(r'class="line quiet" data-label="([^"]*)"', chart) == labels
    assert re.findall(r">([^<>]+)</span>", key) == [*ways, *labels]


def test_what_was_never_measured_has_no_curve() -> None:
    found = drawn([{**line, "contrastive": None, "image_accuracy": None} for line in lines_of([4] * 9, None)])
    assert "generation loss (nats a token)" in found
    assert not {"contrastive loss (nats)", "accuracy of the contrast in the batch (%)"} & set(found)
    assert drawn([]) == {}
    assert drawn([{"step": 1, "loss": 1.0}]) == {}, "one value is no curve"
    assert drawn([{"step": step, "loss": 0.0} for step in (1, 2)]) == {}, "always 0"


def test_others_metrics_have_charts_too() -> None:
    lines = [
        {
            "step": s, "loss": 1.0, "grad_norm/vision": 1.0 + s, "grad_norm/language": 2.0 + s, "mfu": 0.3 + s / 100,
            "slowest_rank": s % 3, "theirs/one_thing": 1.0 * s, "theirs/another": 5.0, "lonely": 2.0 * s,
            "heldout/bits_per_token": 8.0 - s, "generation": 5.0,
        }
        for s in range(1, 5)
    ]  # fmt: skip
    found = drawn(lines)
    by_part = PATH.findall(found["gradient norm by part"])
    assert [(color, label) for color, label, _ in by_part] == [("k0", "vision"), ("k1", "language")]
    assert {"theirs one thing", "theirs another", "lonely", "model FLOPs utilization, MFU (%)"} <= set(found)
    assert [label for _, label, _ in PATH.findall(found["generation loss (nats a token)"])] == ["training", "held out"]
    metrics = Metrics(run=None)  # type: ignore[arg-type]
    for line in lines:
        metrics._take(line)
    assert [g.title for g in groups(metrics.series, 4, {})][-2:] == ["Further metrics", "Theirs"]


def test_many_parts_have_several_charts() -> None:
    names = [f"grad_norm/{k}" for k in range(MAX_LINES + 2)]
    ((_, specs),) = specs_for(names)
    assert [spec.names for spec in specs] == [tuple(names[:MAX_LINES]), tuple(names[MAX_LINES:])]


@pytest.mark.parametrize(
    ("name", "title", "value", "shown"),
    [
        ("flops_per_second", "TFLOP/s of all processes", 5e14, 500.0),
        ("memory_peak_bytes", "peak memory of a device (GiB)", 3 * 2**30, 3.0),
        ("checkpoint_bytes", "size of a checkpoint (MB)", 7e6, 7.0),
        ("heldout/bits_per_token", "generation loss (nats a token)", 2.0, 2 * math.log(2)),
        ("mfu", "model FLOPs utilization, MFU (%)", 0.25, 25.0),
        ("data_wait", "time spent waiting for data (%)", 0.25, 25.0),
    ],
)
def test_values_are_drawn_in_the_unit_of_the_title(name: str, title: str, value: float, shown: float) -> None:
    figure = drawn([{"step": step, "loss": 1.0, name: step * value} for step in (1, 2, 3)])[title]
    *_, low, high = map(float, re.findall(r'data-range="([^"]*)"', figure)[0].split())
    assert (low, high) == pytest.approx((0.92 * shown, 3.08 * shown)), "a margin of 4 % on either side"
    assert f'data-now="{short(3 * shown)}"' in figure


def test_a_curve_stands_where_its_numbers_say() -> None:
    """Read back by the ranges that the SVG carries, as the script of the page does."""
    steps = np.array([10.0, 20.0, 40.0])
    values = np.array([3.0, -1.0, 2.0])
    svg = chart([Line("x", steps, steps, values, values)], 50)
    start, stop, low, high = map(float, re.findall(r'data-range="([^"]*)"', svg)[0].split())
    ((_, _, path),) = PATH.findall(svg)
    for (x, y), step, value in zip(re.findall(r"[ML]([\d.]+) ([\d.]+)", path), steps, values, strict=True):
        assert start + (float(x) - LEFT) / (WIDTH - LEFT - RIGHT) * (stop - start) == pytest.approx(step, abs=0.05)
        read = low + (HEIGHT - BOTTOM - float(y)) / (HEIGHT - 12 - BOTTOM) * (high - low)
        assert read == pytest.approx(value, abs=0.01)
    assert (start, stop) == (10, 50)


@pytest.mark.parametrize("last", [300, 4000, 20_000, 306_000, 3_000_000])
def test_steps_are_read_back_exactly(last: int) -> None:
    """As the script of the page does; with no more digits than that takes."""
    steps = np.round(np.linspace(7, last, 400))
    values = np.arange(400.0)
    for mean in (None, values):
        svg = chart([Line("x", steps, steps, values, values, mean=mean)], last)
        start, stop, *_ = map(float, re.findall(r'data-range="([^"]*)"', svg)[0].split())
        ((_, _, path),) = PATH.findall(svg)
        places = re.findall(r"[ML]([\d.]+) ", path)
        read = [round(start + (float(x) - LEFT) / (WIDTH - LEFT - RIGHT) * (stop - start)) for x in places]
        assert read == steps.tolist()
        assert max(len(x.partition(".")[2]) for x in places) == max(1, len(str(int((stop - start) / 306))))


def test_a_wide_range_is_logarithmic_and_a_constant_is_drawn() -> None:
    steps = np.arange(1.0, 30)
    values = np.ones(29)
    flat = chart([Line("x", steps, steps, values, values)], 29)
    assert 'data-log="0"' in flat
    values = values.copy()
    values[7] = 1e4
    assert 'data-log="1"' in chart([Line("x", steps, steps, values, values)], 29)
    values[8] = -1
    assert 'data-log="0"' in chart([Line("x", steps, steps, values, values)], 29)


def test_phases_and_incidents_are_marked_and_many_of_them_are_one() -> None:
    events = [
        Event("phase", 3, None, "phase 2: image size 32"),
        Event("resumed", 5, None, "went on"),
        Event("rewind", 8, None, "back <to> step 4"),
        Event("changed", 8, None, "train.steps 4 → 9, " * 90),
        *(Event("skipped", 9, None, f"reason {i}") for i in range(50)),
        *(Event("stopped", step, None, "at no step that is drawn") for step in (0, 13)),
    ]
    found = drawn(lines_of([4] * 12, None), events)["loss that is minimized"]
    marks = re.findall(r'<path class="mark ([\w ]+)" d="M([\d.]+) [^"]*"><title>(.*?)</title>', found)
    assert [kind for kind, *_ in marks] == [
        "phase",
        "resumed",
        "incident rewind",
        "incident changed",
        "incident skipped",
    ]
    places = [float(x) for _, x, _ in marks]
    assert places == pytest.approx([LEFT + (s - 1) / 11 * (WIDTH - LEFT - RIGHT) for s in (3, 5, 8, 8, 9)], abs=0.06)
    assert marks[2][2] == "step 8, rewind: back &lt;to&gt; step 4"
    assert marks[3][2].startswith("step 8, settings changed: train.steps 4 → 9, train.steps")
    assert len(marks[3][2]) < 220, "each chart has it; the table has all"
    assert marks[4][2] == "step 9, step skipped: reason 0, and 49 more"


def test_names_are_text_wherever_they_come_from() -> None:
    found = drawn([{"step": s, "<script>/x": 1.0 * s, "lr/<b>": 1.0 * s, "loss": 1.0 * s} for s in (1, 2)])
    assert not any("<script>" in figure or '<b>"' in figure or "/<b>" in figure for figure in found.values())
    assert "learning rate by part" in found


def test_ticks_and_numbers_are_round() -> None:
    assert ticks(0, 1, 4) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3, 1e6, 4) == [0, 250_000, 500_000, 750_000, 1_000_000]
    assert ticks(5, 5, 4) == [5]
    assert [short(x) for x in (0, 1234567, 999, 0.5, 3e-5, -2500, 1e9)] == [
        "0", "1.23M", "999", "0.5", "3e-5", "-2.5k", "1G"
    ]  # fmt: skip
    assert [short(x) for x in (999.6, 999_600, -999.6, 1.5e15, 9.99e-4)] == ["1k", "1M", "-1k", "1,500T", "1e-3"]
    for size in (1e-13, 3e-10, 1.0, 7e14):
        found = ticks(0.0, size, 4)
        assert len(found) > 2
        assert np.diff(found) == pytest.approx(found[1] - found[0])


def test_labels_of_an_axis_differ() -> None:
    assert shorts([3.0001, 3.0002]) == ["3.0001", "3.0002"]
    assert shorts([1000, 1001]) == ["1k", "1.001k"]
    assert shorts([0, 0.5, 1]) == ["0", "0.5", "1"]


def test_labels_of_an_axis_say_where_the_ticks_are() -> None:
    assert shorts([9.75, 10.0, 10.25]) == ["9.75", "10", "10.25"]
    for around, power, factor in itertools.product((0.0, 10.0, 1e6), range(-6, 7), (1, 2, 2.5, 5)):
        step = factor * 10.0**power
        found = ticks(around - step / 3, around + 4.1 * step, 4)
        read = [float(text.translate(POWERS).replace(",", "")) for text in shorts(found)]
        assert read == pytest.approx(found, rel=1e-12, abs=1e-12 * step)


def test_a_tiny_range_has_an_axis() -> None:
    steps = np.arange(1.0, 30)
    values = steps * 1e-14
    labels = re.findall(r'text-anchor="end">([^<]*)</text>', chart([Line("x", steps, steps, values, values)], 29))
    assert {"1e-13", "2e-13"} <= set(labels)


def test_a_process_is_named_whole_and_not_read_from_the_chart() -> None:
    found = drawn([{"step": step, "loss": 1.0 * step, "slowest_rank": 1020 + step} for step in range(1, 4)])
    assert 'data-now="1023"' in found["slowest process (rank)"]
    assert "data-range" not in found["slowest process (rank)"]
    assert "data-range" in found["loss that is minimized"]


def test_a_downsampled_curve_goes_through_both_ends() -> None:
    series = Series()
    for step in range(1, 2001):
        series.add(step, float(step % 2))
    points = series.points()
    svg = chart([Line("x", points.first, points.final, points.low, points.high)], 2000)
    ((_, _, path),) = PATH.findall(svg)
    assert len(re.findall("[ML]", path)) == 2 * len(points.first) - 1, "the last stretch has one step"
