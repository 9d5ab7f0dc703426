"""Steps to the same loss: of every loss that both runs have."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_loss_that_a_run_lacks_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An objective without a generation loss writes null for it."""
    for run, generation, speed in (("lcl", 1.0, 1), ("clip", None, 2)):
        (tmp_path / run).mkdir()
        lines = [
            {"step": n, "num_images": 4, "loss": 9 - n * speed, "generation": generation, "contrastive": 9 - n * speed}
            for n in range(1, 5)
        ]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "lcl"), str(tmp_path / "clip")])
    importlib.import_module("steps_to_loss").main()
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["RUN", "OTHER", "ratio"]
    assert rows == [["loss", "4", "2", "0.50"], ["contrastive", "4", "2", "0.50"]]
