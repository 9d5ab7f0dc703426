"""DeepSpeed's own settings: passed on, and refused by name where DeepSpeed would ignore them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from megatron_lcl import config as configs
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.model.layers import num_parameters
from megatron_lcl.train.optimizer import check_optimizer
from megatron_lcl.train.settings import BUCKET, check_quantized, check_zero, deepspeed_config, offloaded

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
        (zero(round_robin_gradients=False, offload_optimizer={"ratio": 1.0}), {}),
        ({"prescale_gradients": True, "gradient_predivide_factor": 2.0}, {}),
        ({"prescale_gradients": True, **zero(reduce_scatter=False)}, {"zero": {"stage": 2}}),
        ({"fp16": {"initial_scale_power": 8}}, {"train": {"dtype": "float16"}}),
        ({"communication_data_type": "bf16", "wall_clock_breakdown": True}, {}),
        ({"torch_autocast": {"enabled": False}, "flops_profiler": {"enabled": True}}, {}),
        ({"pipeline": {"stages": "auto", "partition": "best"}}, {"parallel": {"pipeline": 2}}),
        ({"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}}, {}),
        (zero(sub_group_size=2000, param_persistence_threshold=0, memory_efficient_linear=False), ZERO_3),
    ],
)
def test_what_deepspeed_knows_is_passed_on(deepspeed: dict[str, Any], sections: dict[str, Any]) -> None:
    found = settings_of(deepspeed, 4, **sections)
    for section, value in deepspeed.items():
        assert value.items() <= found[section].items() if isinstance(value, dict) else value == found[section]


def test_a_sum_over_replicas_is_no_longer_than_what_a_tensor_rank_has() -> None:
    """A process holds a buffer of its length, or two."""
    model = {"vision": {"layers": 1, "width": 96}, "language": {"layers": 1, "width": 64, "vocab_size": 1000}}
    found = settings_of({}, 4, model=model, parallel={"tensor": 2})["zero_optimization"]
    assert found["reduce_bucket_size"] == num_parameters(configs.from_dict({"model": model}).model) // 2 < BUCKET


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
        (
            {"zero_optimization": None},
            {},
            "^deepspeed.zero_optimization is empty: give the settings of the section, indented below it, or remove",
        ),
        ({"zero_optimization": None}, {"optimizer": {"name": "muon"}}, "^deepspeed.zero_optimization is empty"),
        ({"zero_optimization": 3}, {}, "^deepspeed.zero_optimization = 3"),
        ({"bf16": None}, {}, "^deepspeed.bf16 is empty"),
        ({"checkpoint": None}, {}, "^deepspeed.checkpoint is empty"),
        ({"comms_logger": None, "wall_clock_breakdown": True}, {}, "^deepspeed.comms_logger is empty"),
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
        ({"pipeline": {"partitions": "best"}}, {}, "pipeline.partitions is no .* mean partition"),
        (zero(zero_hpz_partition_size=3), ZERO_3, "= 3 does not divide 4 data-parallel processes; .* is 2$"),
        ({"checkpoint": {"writer": {"decoupled": True}}}, {}, "checkpoint.writer is decided"),
        (zero(elastic_checkpoint=True), {}, "elastic_checkpoint is not needed"),
        (zero(offload_optimizer={"device": "nvme"}), {}, "set it to cpu"),
        (zero(compute_grad_norm=False), {"optimizer": {"clip_norm": 0}}, "compute_grad_norm = False: .*; remove it$"),
        (zero(compute_grad_norm=False), {}, "compute_grad_norm = False: .*; remove it$"),
        (
            zero(offload_optimizer={"device": "cpu", "ratio": 0.5}),
            {"zero": {"stage": 2}},
            "^deepspeed.zero_optimization: .*Partial offloading only supported for ZeRO Stage 3",
        ),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), ZERO_3, "ratio = 0.5: .*; remove it$"),
        (
            {"flops_profiler": {"enabled": True}, "comms_logger": {"enabled": "maybe"}},
            {},
            "^deepspeed.comms_logger.enabled = 'maybe'",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(deepspeed: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(deepspeed, 4, **sections)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "deepspeed",
    [
        zero(round_robin_gradients=True),
        zero(legacy_stage1=True),
        zero(offload_optimizer=ON_CPU, zenflow={"topk_ratio": 0.1}),
        zero(offload_optimizer={"device": "cpu", "super_offload": True}),
        {"bf16": {"bf16_master_weights_and_grads": True}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"sequence_parallel_size": 2},
        {"gradient_allreduce_op": "sum"},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"pipeline": {"stages": 2}},
        {"pipeline": {"partition": "uniform"}},
        {"pipeline": {"seed_layers": True}},
        {"pipeline": {"activation_checkpoint_interval": 1}},
        {"data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}}},
    ],
)
def test_what_goes_with_nothing_here_is_refused(deepspeed: dict[str, Any], stage: int) -> None:
    """By a plan too, which asks for no more than `check_zero`."""
    config = configs.from_dict({"deepspeed": deepspeed, "zero": {"stage": stage}})
    with pytest.raises(UserError, match=r"^deepspeed\..* = .*: .*; remove it$"):
        check_zero(config, 2)


def test_an_activation_checkpointing_of_deepspeed_s_own_is_refused() -> None:
    """Whatever its section has: DeepSpeed reads it where its own function is called, and no layer here calls that."""
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT

    for name, value in ACT_CHKPT_DEFAULT.items():
        config = configs.from_dict({"deepspeed": {"activation_checkpointing": {name: not value}}})
        with pytest.raises(UserError, match=rf"{name} = True: train\.activation_checkpointing decides .*; remove it$"):
            check_zero(config, 1)
        check_zero(configs.replace(config, deepspeed={"activation_checkpointing": {name: value}}), 1)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_deepspeed_takes_with_zero_3_only_is_refused_below_it(stage: int) -> None:
    """All names under which DeepSpeed knows it: those of its ZeRO-3 in its own words, and those that no file of the
    optimizers of ZeRO-1 and 2 has."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    aliased = {name: info.alias for name, info in fields.items() if info.alias}
    taken_by_3 = inspect.signature(stage3.DeepSpeedZeroOptimizer_Stage3.__init__).parameters.keys() & fields.keys()
    others = "".join(map(inspect.getsource, (bf16_optimizer, stage_1_and_2)))
    only_3 = {name for name in taken_by_3 if name not in others}
    assert {"sub_group_size", "enable_sanity_checks", "zero_quantized_weights"} <= only_3
    for name in {*aliased, *aliased.values(), *only_3, "memory_efficient_linear"} - {"zero_hpz_partition_size"}:
        config = configs.from_dict({"deepspeed": zero(**{name: 1}), "zero": {"stage": stage}})
        with pytest.raises(UserError, match=rf"\.{name} needs zero\.stage = 3, not {stage}$"):
            check_zero(config, 2)
        check_zero(configs.replace(config, zero__stage=3), 2)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("deepspeed", [{"prescale_gradients": True}, {"gradient_predivide_factor": 2.0}])
def test_gradients_that_are_scattered_are_divided_after_they_are_summed(deepspeed: dict[str, Any], stage: int) -> None:
    config = configs.from_dict({"deepspeed": deepspeed, "zero": {"stage": stage}})
    with pytest.raises(UserError, match=r"reduce_scatter is false; set that, or remove it$"):
        check_zero(config, 2)


def test_quantizing_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.from_dict({"deepspeed": zero(zero_quantized_gradients=True)})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_quantized(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="zero_quantized_gradients needs a GPU"):
        check_quantized(config)


def test_what_the_engine_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DeepSpeed raises; errors of others, and those that say nothing, keep their traceback."""
    import deepspeed
    from deepspeed.runtime.config import get_gradient_allreduce_op

    from megatron_lcl.parallel.mesh import ALONE, Mesh
    from megatron_lcl.selftest.cases import Case
    from megatron_lcl.train.engine import build_engine, build_module

    def theirs(**_: Any) -> None:
        get_gradient_allreduce_op({"gradient_allreduce_op": "none"})

    theirs_too: dict[str, Any] = {"__name__": "deepspeed.runtime.engine"}
    exec("def says_nothing(**_): assert False", theirs_too)

    def ours(**_: Any) -> None:
        raise ValueError("ours")

    config, mesh = Case(data=1).config(), Mesh(ALONE, ALONE)
    module, given = build_module(config, mesh), configs.replace(config, deepspeed={"wall_clock_breakdown": True})
    monkeypatch.setattr(deepspeed, "initialize", theirs)
    with pytest.raises(UserError, match=r"^deepspeed: Invalid gradient_allreduce_op\..*'none'$") as caught:
        build_engine(module, given, mesh, {"settings": 1})
    assert isinstance(caught.value.__cause__, ValueError)
    assert not isinstance(caught.value, RunError)  # which only process 0 would print, and this may be another's alone
    with pytest.raises(ValueError, match=r"^Invalid") as raised:  # nothing was set that could be why
        build_engine(module, configs.replace(config, deepspeed={}), mesh, {"settings": 1})
    assert not isinstance(raised.value, UserError)
    monkeypatch.setattr(deepspeed, "initialize", theirs_too["says_nothing"])
    with pytest.raises(AssertionError):
        build_engine(module, given, mesh, {"settings": 1})
    monkeypatch.setattr(deepspeed, "initialize", ours)
    with pytest.raises(ValueError, match=r"^ours"):
        build_engine(module, given, mesh, {"settings": 1})


def test_a_zero_section_is_looked_at_before_deepspeed_sees_it() -> None:
    for options, said in ((None, "is empty"), (3, "= 3: give settings below it")):
        config = configs.from_dict({"deepspeed": {"zero_optimization": options}})
        for look in (offloaded, check_optimizer, check_quantized, lambda config: check_zero(config, 1)):
            with pytest.raises(UserError, match=f"^deepspeed.zero_optimization {said}"):
                look(config)
