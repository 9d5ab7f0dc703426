"""Protects the formulas of what is sent from settings of DeepSpeed that have two names. What processes really send is
compared with them in tests/plan/test_network.py and by the selftest."""

from __future__ import annotations

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megatron_lcl import config as configs
from megatron_lcl.plan.network import mesh_of
from megatron_lcl.train.traffic import zero3


@pytest.mark.parametrize("prefix", ["stage3_", ""])
def test_options_of_zero_3_have_two_names(prefix: str) -> None:
    """A parameter of 1,000 numbers in float32 on two processes, each of which sends half: gathered for forward and
    backward where it does not stay, and its gradient summed."""
    options = {f"{prefix}param_persistence_threshold": 0, f"{prefix}max_reuse_distance": 0}
    taken = DeepSpeedZeroConfig(stage=3, **options)
    assert (taken.param_persistence_threshold, taken.max_reuse_distance) == (0, 0)
    given = {"zero": {"stage": 3}, "contrast": {"strategy": "recompute"}, "train": {"dtype": "float32"}}
    for own, expected in ((options, 4 * 1000 * 3 / 2), ({}, 4 * 1000 * 2 / 2)):
        config = configs.from_dict({**given, "deepspeed": {"zero_optimization": own}})
        mesh = mesh_of(config, 2, 0)
        assert zero3({"weight": 1000}, (), (), 1, 1, config, mesh) == {mesh.data.ranks: expected}
