"""Curves of the report: a step that has nothing to measure a number on leaves a gap, and chance is shown."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_lcl.report.page import _curves

LINE = re.compile(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #2a6f97')


def lines_of(pairs: list[int], empty: float | None) -> list[dict[str, Any]]:
    """A line of metrics for each step; empty: what stands where there is no pair."""
    return [
        {
            "step": step,
            "num_pairs": n,
            "num_targets": 9,
            "generation": 6.0 - step / 10,
            "contrastive": 3.0 - step / 10 if n else empty,
            "image_accuracy": 0.5 + step / 100 if n else empty,
        }
        for step, n in enumerate(pairs, 1)
    ]


@pytest.mark.parametrize("empty", [None, 0.0], ids=["now", "as earlier versions wrote it"])
def test_a_curve_breaks_where_a_step_has_no_pair(empty: float | None) -> None:
    svg = _curves(lines_of([4, 4, 4, 0, 0, 4, 4, 0, 4, 0, 4, 4], empty))
    generation, contrastive, accuracy = LINE.findall(svg)
    assert generation.count("M") == 1
    for path in (contrastive, accuracy):
        assert path.count("M") == 4  # runs of steps, the single one among them
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", contrastive)]
    assert heights == sorted(heights)  # it falls all the way, and nowhere to 0 and back
    assert len(heights) == 8
    assert "<!-- chance (1 / pairs) -->" in svg


def test_what_was_never_measured_has_no_curve() -> None:
    svg = _curves([{**line, "contrastive": None, "image_accuracy": None} for line in lines_of([4] * 9, None)])
    assert len(LINE.findall(svg)) == 1
    assert "chance" not in svg
    assert _curves([]) == ""
    assert _curves([{"step": step, "loss": 1.0} for step in (1, 2)]) == ""  # another package's objective
