"""What benchmarks/store_load.py takes for the load of the store: as much for all as for one, times the processes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import Ends

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("store_load")


def test_what_is_measured(program: Any) -> None:
    assert (program.period_of(4), program.period_of(512)) == (1, 8)
    load = program.measured(4, 20)
    assert load.period == 1
    assert min(load) > 0


@pytest.mark.timeout(60)
def test_a_store_that_ends_is_not_waited_for(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_serve", Ends())
    with pytest.raises(EOFError), program.served():
        pass


@pytest.mark.parametrize(("reading", "holds"), [(0.007, True), (0.009, False)])
def test_half_of_the_period_may_be_taken(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reading: float, holds: bool
) -> None:
    monkeypatch.setattr(program, "measured", lambda processes, turns: program.Load(reading, 0.001, 0.01, 8.0))
    monkeypatch.setattr(sys, "argv", ["", "--processes", "64,512"])
    if holds:
        program.main()
    else:
        with pytest.raises(SystemExit, match="busy for half of a period at most, with 512 processes"):
            program.main()
    rows = [[float(value) for value in line.split()] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[1] == [512, 1e3 * reading, pytest.approx(512 * reading, abs=0.01), 8, 1, 0.51, 10, 5.12]
