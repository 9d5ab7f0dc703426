"""The processes of a benchmark's setting: what they print, one that fails, and settings that GPUs are lacking for."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("setting_processes")


def test_what_each_process_prints_in_its_last_line(program: Any, tmp_path: Path) -> None:
    """However much it prints before that."""
    measure = tmp_path / "measure.py"
    measure.write_text(
        "import json, os, sys\n"
        "print('x' * 200_000)\n"
        "print(json.dumps([sys.argv[1:], os.environ['RANK'], os.environ['WORLD_SIZE']]))\n"
    )
    found = program.measured_by_all(str(measure), "a setting", 2)
    assert found == [[["--measure", "a setting"], str(rank), "2"] for rank in range(2)]


def test_where_one_fails_the_others_are_ended(program: Any, tmp_path: Path) -> None:
    measure = tmp_path / "measure.py"
    measure.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "here = Path(__file__).parent\n"
        "if os.environ['RANK'] == '0':\n"
        "    (here / 'half').write_text(str(os.getpid()))\n"
        "    (here / 'half').rename(here / 'pid')\n"
        "    time.sleep(60)\n"
        "while not (here / 'pid').exists():\n    time.sleep(0.01)\n"
        "sys.exit(1)\n"
    )
    started = time.monotonic()
    with pytest.raises(SystemExit, match=r"^a setting: process 1 has failed$"):
        program.measured_by_all(str(measure), "a setting", 2)
    assert time.monotonic() - started < 40
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(("gpus", "fit"), [(0, ["one", "two", "four"]), (1, ["one"]), (2, ["one", "two"])])
def test_each_process_has_a_gpu_of_its_own(
    gpus: int, fit: list[str], program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    settings: dict[str, dict[str, Any]] = {"one": {}, "two": {"processes": 2}, "four": {"processes": 4}}
    assert list(program.those_that_fit(settings, settings)) == fit
    said = capsys.readouterr().out
    assert said.count("left out") == len(settings) - len(fit)
    assert not gpus or f"four: left out (4 processes need 4 GPUs, not {gpus})\n" in said
