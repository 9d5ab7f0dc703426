"""Which runs are one curve of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lcl import config as configs
from megatron_lcl import fields
from megatron_lcl.report.runs import Run, group
from megatron_lcl.report.series import Metrics


def run_of(tree: dict[str, Any]) -> Run:
    settings = fields.flat(configs.to_dict(configs.from_dict(tree)))
    return Run(Path("run"), settings, Metrics(run=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"seed": 1}},
        {"train": {"output": "elsewhere", "log_every": 3}},
        {"data": {"seed": 1, "workers": 3, "look_ahead": 5, "cache": "c", "storage_cache_gb": 2.0}},
        {"checkpoint": {"every": 7}},
        {"guard": {"every": 7, "timeout": 99.0}},
    ],
)
def test_what_changes_no_result_makes_no_other_curve(tree: dict[str, Any]) -> None:
    (one,) = group([run_of({}), run_of(tree)])
    assert len(one.runs) == 2


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr"),
        ({"guard": {"spike_sigmas": 6.0}}, "guard.spike_sigmas"),
        ({"guard": {"spike_window": 64}}, "guard.spike_window"),
        ({"train": {"global_batch": 1024}}, "train.global_batch"),
        ({"deepspeed": {"fp16": {"hysteresis": 1}}}, "deepspeed.fp16.hysteresis"),
    ],
)
def test_what_changes_the_result_does(tree: dict[str, Any], name: str) -> None:
    one, other = group([run_of({}), run_of(tree)])
    assert list(one.shown) == list(other.shown) == [name]
