"""DeepSpeed's own settings: passed on, and refused by name where DeepSpeed would ignore them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lcl import config as configs
from megatron_lcl.train.settings import deepspeed_config

ZERO_3 = {"zero": {"stage": 3}, "contrast": {"strategy": "recompute"}}
ON_CPU, NOWHERE = {"device": "cpu"}, {"device": "none"}


def settings_of(deepspeed: dict[str, Any], processes: int = 1, **sections: Any) -> dict[str, Any]:
    return deepspeed_config(configs.from_dict({"deepspeed": deepspeed, **sections}), processes)


def zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


@pytest.mark.parametrize(
    ("deepspeed", "sections"),
    [
        (zero(offload_optimizer=ON_CPU), {}),
        (zero(offload_optimizer=ON_CPU), {"zero": {"stage": 2}}),
        (zero(offload_optimizer=ON_CPU, offload_param=ON_CPU, stage3_param_persistence_threshold=0), ZERO_3),
        (zero(offload_optimizer=NOWHERE, offload_param=NOWHERE), {"zero": {"stage": 2}}),
        (zero(zero_hpz_partition_size=2), ZERO_3),
        (zero(overlap_comm=False), {}),
        ({"fp16": {"initial_scale_power": 8}}, {"train": {"dtype": "float16"}}),
        ({"communication_data_type": "bf16", "wall_clock_breakdown": True}, {}),
        ({"activation_checkpointing": {"profile": True}, "flops_profiler": {"enabled": True}}, {}),
    ],
)
def test_what_deepspeed_knows_is_passed_on(deepspeed: dict[str, Any], sections: dict[str, Any]) -> None:
    found = settings_of(deepspeed, 4, **sections)
    for section, value in deepspeed.items():
        assert value.items() <= found[section].items() if isinstance(value, dict) else value == found[section]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_are_summed_in_float32_in_every_precision(dtype: str) -> None:
    """Over micro-batches, and over replicas."""
    found = settings_of({}, 4, train={"dtype": dtype})
    assert (found["data_types"], found["communication_data_type"]) == ({"grad_accum_dtype": "fp32"}, "fp32")


@pytest.mark.parametrize(
    ("deepspeed", "sections", "message"),
    [
        (zero(stage=3), {}, r"deepspeed.zero_optimization.stage = 3 is decided by the rest of the config \(1\)"),
        ({"train_batch_size": 4}, {}, "train_batch_size = 4 is decided"),
        ({"bf16": True}, {}, "bf16 = True is decided"),
        ({"optimizer": {"type": "FusedAdam"}}, {}, "deepspeed.optimizer is decided by the `optimizer` section"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "deepspeed.scheduler is decided by the `optimizer` section"),
        ({"zero_optimisation": {}}, {}, "deepspeed.zero_optimisation is no .* mean zero_optimization"),
        (zero(ofload_optimizer=ON_CPU), {}, "zero_optimization.ofload_optimizer is no .* mean offload_optimizer"),
        (zero(offload_optimizer={"devise": "cpu"}), {}, "offload_optimizer.devise is no .* mean device"),
        (zero(offload_optimizer={"device": "gpu"}), {}, "offload_optimizer.device = 'gpu': .*'cpu'"),
        ({"fp16": {"initial_scale_pwer": 8}}, {}, "fp16.initial_scale_pwer is no .* mean initial_scale_power"),
        ({"checkpoint": {"parallel_writ": {}}}, {}, "checkpoint.parallel_writ is no .* mean parallel_write"),
        ({"communication_data_type": "fp99"}, {}, "communication_data_type"),
        (zero(offload_param=ON_CPU), {}, "offload_param needs zero.stage = 3, not 1"),
        (zero(zero_hpz_partition_size=2), {}, "zero_hpz_partition_size needs zero.stage = 3"),
        (zero(zero_hpz_partition_size=3), ZERO_3, "= 3 does not divide 4 data-parallel processes; .* is 2$"),
        ({"checkpoint": {"writer": {"decoupled": True}}}, {}, "checkpoint.writer is decided"),
        (zero(elastic_checkpoint=True), {}, "elastic_checkpoint is not needed"),
        (zero(offload_optimizer={"device": "nvme"}), {}, "set it to cpu"),
        (zero(compute_grad_norm=False), {"optimizer": {"clip_norm": 0}}, "compute_grad_norm = False: .*; remove it$"),
        (zero(compute_grad_norm=False), {}, "compute_grad_norm = False: .*; remove it$"),
    ],
)
def test_what_would_be_ignored_is_refused(deepspeed: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(deepspeed, 4, **sections)
