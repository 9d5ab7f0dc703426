"""The size of the generation loss's chunks, as benchmarks/generation_memory_and_time.py measures it."""

from __future__ import annotations

import importlib
import json
import re
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


@pytest.mark.parametrize(("logits", "chunks"), [(64, [8] * 5), (160, [20, 20]), (320, [40]), (4, [1] * 40)])
def test_so_many_logits_exist_at_once(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logits: int, chunks: list[int]
) -> None:
    seen: list[int] = []
    softmax = program.generation.softmax_torch
    statistics = softmax.statistics
    monkeypatch.setattr(softmax, "statistics", lambda rows, *rest: (seen.append(len(rows)), statistics(rows, *rest))[1])
    monkeypatch.setattr(sys, "argv", ["", "--once", str(logits), "--width", "16"])
    program.main()
    assert seen[-len(chunks) :] == chunks
    assert sum(seen) == 64 + 40  # the first ones load libraries
    chunked = json.loads(capsys.readouterr().out.splitlines()[-1])[3]
    assert chunked == pytest.approx(program.once("plain formula", 16).loss)


@pytest.mark.parametrize(("factor", "holds"), [(1.04, True), (1.06, False)])
def test_the_chosen_size_may_not_be_slower_than_others(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float, holds: bool
) -> None:
    def fresh(_: str, once: str, size: str, *rest: str) -> Any:
        assert (once, *rest) == ("--once", "--width", "768")
        seconds = factor if int(size) == program.generation.CHUNK_LOGITS else 1.0
        return program.Measured(seconds, seconds, int(size) / 2**18, 0.0)

    monkeypatch.setattr(program, "in_a_fresh_process", fresh)
    monkeypatch.setattr(sys, "argv", ["", "--chunks", "22", "23", "--width", "768"])
    if holds:
        program.main()
    else:
        with pytest.raises(SystemExit, match=re.escape("2^25 takes at most 1.05 of the fastest")):
            program.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[2] for row in rows] == ["2^22", "2^23", "2^25"]
