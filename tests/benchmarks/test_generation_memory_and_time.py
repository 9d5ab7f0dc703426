"""The size of the generation loss's chunks, as benchmarks/generation_memory_and_time.py measures it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """With eight tokens, and nothing in processes of its own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found, threads = importlib.import_module("generation_memory_and_time"), torch.get_num_threads()
    for name, value in (("ROWS", 40), ("VOCABULARY", 8)):
        monkeypatch.setattr(found, name, value)
    yield found
    torch.set_num_threads(threads)
    mock.patch.stopall()


@pytest.mark.parametrize(("size", "chunks"), [(8, [8] * 5), (20, [20, 20]), (40, [40]), (1, [1] * 40)])
def test_the_logits_of_so_many_rows_exist_at_once(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int, chunks: list[int]
) -> None:
    seen: list[int] = []
    softmax = program.generation.softmax_torch
    statistics = softmax.statistics
    monkeypatch.setattr(softmax, "statistics", lambda rows, *rest: (seen.append(len(rows)), statistics(rows, *rest))[1])
    monkeypatch.setattr(sys, "argv", ["", "--once", str(size), "--width", "16"])
    program.main()
    assert seen[-len(chunks) :] == chunks
    assert sum(seen) == 64 + 40  # the first ones load libraries
    chunked = json.loads(capsys.readouterr().out.splitlines()[-1])[3]
    assert chunked == pytest.approx(program.once("plain formula", 16).loss)


@pytest.mark.parametrize(("width", "chosen"), [(512, 679), (768, 768)])
@pytest.mark.parametrize(("factor", "holds"), [(1.04, True), (1.06, False)])
def test_the_chosen_size_may_not_be_slower_than_others(
    program: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    holds: bool,
    width: int,
    chosen: int,
) -> None:
    """As many rows as the width, where they are more than those of 2^25 logits."""

    def fresh(_: str, once: str, size: str, *rest: str) -> Any:
        assert (once, *rest) == ("--once", "--width", str(width))
        seconds = factor if int(size) == chosen else 1.0
        return program.Measured(seconds, seconds, int(size) / 4, 0.0)

    monkeypatch.setattr(program, "in_a_fresh_process", fresh)
    monkeypatch.setattr(program, "VOCABULARY", 49411)
    monkeypatch.setattr(sys, "argv", ["", "--chunks", "22", "25", "--width", str(width)])
    if holds:
        program.main()
    else:
        with pytest.raises(SystemExit, match=f"{chosen} rows take at most 1.05 of the fastest"):
            program.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [int(row[0]) for row in rows] == sorted({84, 679, chosen})
    assert [row[2] for row in rows][:2] == ["2^22.0", "2^25.0"]
