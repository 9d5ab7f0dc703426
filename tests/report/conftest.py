"""A run folder with everything that a report shows, and one browser for all tests of pages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report.browser import Browser

from megatron_lcl import config as configs

STEPS = 200
LONG = "a_folder_with_a_very_long_name_that_nothing_breaks_" * 3


def line(step: int) -> dict[str, Any]:
    """A step's line of metrics."""
    return {
        "step": step, "loss": 9.0 - step / 40, "num_targets": 700, "num_pairs": 40, "num_images": 41, "num_tokens": 900,
        "num_bad_images": 0, "generation": 6.0 - step / 60, "contrastive": 3.6 - step / 90,
        "image_accuracy": step / 400, "text_accuracy": step / 500, "chance_accuracy": 0.025, "lr": 1e-3 / step,
        "grad_norm": 1.0 + step % 7, "grad_norm/vision": 0.5 + step % 7, "grad_norm/language": 0.4 + step % 5,
        "images_per_second": 1234.5, "tokens_per_second": 98765.4, "step_seconds": 0.1, "data_wait": 0.01 * (step % 3),
        "mfu": 0.4, "memory_peak_bytes": 3 * 2**30 + step, "latent_effective_rank": 30.0 + step % 4,
        "slowest_rank": step % 2, "slowest_lag_seconds": 0.002, "rank_step_seconds": [0.1, 0.11, 0.1, 0.12],
        "rank_work_seconds": [0.08, 0.08 + step / 5000, 0.09, 0.11], "time": 1.7e9 + step,
    }  # fmt: skip


def make_run(run: Path, **settings: str) -> Path:
    """A run of STEPS steps with evaluations, a phase, a resume, skipped steps, a rewind, and files of a profiler."""
    (run / "profile").mkdir(parents=True)
    tree = {"train.output": str(run), "train.steps": str(STEPS), "data.corpora": f"/nowhere/{LONG}", **settings}
    (run / "config.yaml").write_text(configs.to_yaml(configs.load(None, tree)))
    lines = [{"step": 0, "loss_kernels": "torch", "time": 1.7e9}, *map(line, range(1, STEPS + 1))]
    lines[100:100] = [{"step": 100, "phase": 2, "image_size": 64, "time": 1.7e9 + 100}]
    lines[140:140] = [{"step": 139, "loss_kernels": "torch", "time": 1.7e9 + 139}]
    row = {"lag_seconds": 0.002, "phase": "data", "of": 100}
    reports = [
        [{"node": "node-a", "rank": 1, "last": 70, **row}, {"node": "node-b", "rank": 3, "last": 30, **row}],
        [{"node": "node-b", "rank": 2, "last": 90, **row, "lag_seconds": 0.006, "phase": "forward"}],
    ]
    lines += [
        {"step": step, "stragglers": report, "time": 1.7e9 + STEPS}
        for step, report in zip((139, STEPS), reports, strict=True)
    ]
    for step in range(20, STEPS + 1, 20):
        heldout = {"bits_per_token": 9.0 - step / 50, "image_to_context_recall_at_10": step / 300, "chance_at_10": 0.1}
        labeled = {"knn_accuracy": step / 250, "zero_shot_accuracy": step / 400, "chance": 0.1}
        lines.append({"step": step, **{f"heldout/{name}": value for name, value in heldout.items()}})
        lines.append({"step": step, **{f"labeled/{name}": value for name, value in labeled.items()}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    audit = [
        {"time": 1.7e9, "event": "step skipped", "step": 60, "reason": "the loss is nan"},
        {"time": 1.7e9, "event": "rewind", "step": 66, "to": 50},
    ]
    (run / "audit.jsonl").write_text("".join(json.dumps(one) + "\n" for one in audit))
    labeled = {
        "data": "pictures/test",
        "classes": 10,
        "images": 500,
        "train_images": 900,
        "neighbors": 20,
        "step": STEPS,
    }
    labeled |= {"values": {"knn_accuracy": 0.8, "chance": 0.1}}
    (run / "labeled.json").write_text(json.dumps(labeled))
    (run / "profile" / "trace rank 0.json").write_text("{}")
    return run


def write_lines(run: Path, lines: Iterable[dict[str, Any]], n: int = 0, **settings: str) -> Path:
    """A run with these lines of metrics, which the learning rate n + 1 tells from others, or other settings."""
    run.mkdir(parents=True)
    tree = {"train.output": str(run), "data.corpora": "/nowhere", "optimizer.lr": str(n + 1), **settings}
    (run / "config.yaml").write_text(configs.to_yaml(configs.load(None, tree)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="session")
def whole_run(once: Callable[[str, Callable[[Path], Any]], Any]) -> Path:
    """Of a run folder with everything; not to be changed."""
    return once("report-run", lambda folder: make_run(folder / "run"))


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser
