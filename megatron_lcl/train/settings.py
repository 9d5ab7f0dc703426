"""DeepSpeed's config, derived from ours: what the other sections decide, and what `deepspeed:` adds.

That section is checked by DeepSpeed's own classes, before anything is built. What DeepSpeed would ignore (a misspelled
section, an option that its ZeRO stage does not know) is an error here.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic
import torch

from megatron_lcl.config import Config
from megatron_lcl.errors import UserError
from megatron_lcl.fields import flat
from megatron_lcl.model.layers import num_parameters
from megatron_lcl.train.layout import check_layout, num_micro_batches
from megatron_lcl.train.precision import resolve_dtype

BUCKET = 50_000_000
"""most numbers in a sum of gradients over replicas. DeepSpeed's own are 500 million: a model of that size has one sum,
and every process holds a buffer, or two, of 2 GB each"""
_ON_CHECKPOINTING = "train.activation_checkpointing decides what is kept of a forward; DeepSpeed's own is not used"
_OTHER_OPTIMIZER = "it needs an optimizer of DeepSpeed's own, which is given that of the `optimizer` section"
_UNUSABLE: dict[str, tuple[Any, str]] = {
    "zero_optimization.round_robin_gradients": (
        False,
        "DeepSpeed would look for parameters where they do not lie in its partitions; the steps and the checkpoints "
        "would be wrong",
    ),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed has this ZeRO-1 no more"),
    "zero_optimization.zenflow": (None, _OTHER_OPTIMIZER),
    "zero_optimization.offload_optimizer.ratio": (1, _OTHER_OPTIMIZER),
    "zero_optimization.offload_optimizer.super_offload": (False, _OTHER_OPTIMIZER),
    "bf16.bf16_master_weights_and_grads": (False, _OTHER_OPTIMIZER),
    "fp16.fp16_master_weights_and_grads": (False, _OTHER_OPTIMIZER),
    "tensor_parallel.autotp_size": (0, "parallel.tensor decides it"),
    "sequence_parallel_size": (1, "no layout here divides sequences among processes"),
    "gradient_allreduce_op": ("mean", "the loss is scaled for gradients that are averaged over replicas"),
    "torch_autocast.enabled": (False, "train.dtype decides the type of weights and activations"),
    "pipeline.stages": ("auto", "parallel.pipeline decides it"),
    "pipeline.partition": ("best", "the times of the layers, measured at the start, decide it"),
    "pipeline.seed_layers": (False, "train.seed decides what the layers begin with"),
    "pipeline.activation_checkpoint_interval": (0, _ON_CHECKPOINTING),
    "activation_checkpointing.partition_activations": (False, _ON_CHECKPOINTING),
    "activation_checkpointing.contiguous_memory_optimization": (False, _ON_CHECKPOINTING),
    "activation_checkpointing.cpu_checkpointing": (False, _ON_CHECKPOINTING),
    "activation_checkpointing.number_checkpoints": (None, _ON_CHECKPOINTING),
    "activation_checkpointing.synchronize_checkpoint_boundary": (False, _ON_CHECKPOINTING),
    "activation_checkpointing.profile": (False, _ON_CHECKPOINTING),
    "data_efficiency": ({}, "the section `data` decides what is read, and in which order"),
}
"""settings of DeepSpeed that go with nothing here: the value with which each does nothing, and why not another"""
_OF_ZERO_3 = frozenset(
    (
        *("sub_group_size", "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
        *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save", "allgather_sequential"),
        *("module_granularity_threshold", "use_all_reduce_for_fetch_params", "memory_efficient_linear"),
        *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "leaf_module"),
        *("pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
        "save_muon_momentum_buffer_in_memory",
    )
)
"""what of `zero_optimization` DeepSpeed takes with ZeRO-3 only, beside the names that begin with stage3_ and those that
may be given without effect"""
_NOT_SCATTERED: dict[str, Any] = {"prescale_gradients": False, "gradient_predivide_factor": 1}
"""what DeepSpeed takes from ZeRO-2 on without `reduce_scatter` only, and the value with which it does nothing"""


def deepspeed_config(config: Config, processes: int) -> dict[str, Any]:
    """DeepSpeed's config for a run on so many processes.

    ValueError where the layout does not divide, or `deepspeed:` sets something that DeepSpeed does not take or the rest
    of our config decides.
    """
    data_parallel = check_layout(config, processes)
    dtype = resolve_dtype(config)
    ours: dict[str, Any] = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": num_micro_batches(config, data_parallel),
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": {"stage": config.zero.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, which needs no compiler, also where it is offloaded
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},  # see step.nan_if_rejected
        "fp16": {"enabled": dtype == "float16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every step; nobody reads it
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
    }
    merged = _merge(ours, config.deepspeed)
    # gradients are summed over replicas in float32 in every precision, unless the user wants half the bytes
    merged.setdefault("communication_data_type", "fp32")
    zero: dict[str, Any] = {"reduce_bucket_size": min(BUCKET, num_parameters(config.model) // config.parallel.tensor)}
    if config.zero.stage < 3 and config.parallel.pipeline == 1:  # a sum travels while backward goes on; so not too late
        zero["overlap_comm"] = True
    merged["zero_optimization"] = zero | merged["zero_optimization"]
    _check(config, merged, data_parallel)
    return merged


def zero_options(config: Config) -> Mapping[str, Any]:
    """What `deepspeed:` sets of ZeRO. UserError where that is no mapping."""
    options = config.deepspeed.get("zero_optimization", {})
    if isinstance(options, Mapping):
        return options
    if options is None:
        raise UserError(_empty("deepspeed.zero_optimization"))
    raise UserError(f"deepspeed.zero_optimization = {options!r}: give settings below it; zero.stage is the stage")


def _empty(keys: str) -> str:
    return f"{keys} is empty: give the settings of the section, indented below it, or remove the key"


def sums_apart(config: Config, dtype: str) -> bool:
    """Whether gradients go to DeepSpeed's BF16_Optimizer: it adds them to float32 sums of all that is trained, and
    reduces these after the last backward. dtype: that of the run (`precision.resolve_dtype`)."""
    return (config.zero.stage, dtype) == (1, "bfloat16") and "optimizer" not in offloaded(config)


def offloaded(config: Config) -> frozenset[str]:
    """What a run keeps outside its devices, in DeepSpeed's words: `optimizer`, with the gradients, and `param`.

    A section `offload_…` without a device, or with the device `none`, moves nothing.
    """
    zero = zero_options(config)
    earlier = {"optimizer": "cpu_offload", "param": "cpu_offload_param"}  # names, which DeepSpeed still takes
    sections = {what: zero.get(f"offload_{what}") for what in earlier}
    return frozenset(
        what
        for what, section in sections.items()
        if zero.get(earlier[what]) or (isinstance(section, Mapping) and section.get("device", "none") != "none")
    )


def _merge(ours: dict[str, Any], theirs: dict[str, Any], path: str = "deepspeed") -> dict[str, Any]:
    """Both together. UserError where `theirs` sets something that stands in `ours`."""
    merged = dict(ours)
    for key, value in theirs.items():
        if key not in ours:
            merged[key] = value
        elif isinstance(ours[key], dict) and isinstance(value, dict):
            merged[key] = _merge(ours[key], value, f"{path}.{key}")
        elif isinstance(ours[key], dict) and value is None:
            raise UserError(_empty(f"{path}.{key}"))
        else:
            raise UserError(f"{path}.{key} = {value!r} is decided by the rest of the config ({ours[key]!r}); remove it")
    return merged


def _check(config: Config, settings: dict[str, Any], data_parallel: int) -> None:
    """UserError for what DeepSpeed does not take or would ignore. settings: the whole of DeepSpeed's config."""
    theirs = config.deepspeed
    if not theirs:
        return
    for name in ("optimizer", "scheduler"):  # DeepSpeed would build none: it is given ours
        if name in theirs:
            raise UserError(f"deepspeed.{name} is decided by the `optimizer` section; remove it")
    _check_names(theirs, settings)
    zero = zero_options(config)
    _check_checkpoints(theirs.get("checkpoint", {}), zero)
    if zero.get("compute_grad_norm", True) is not True:
        raise UserError(
            f"deepspeed.zero_optimization.compute_grad_norm = {zero['compute_grad_norm']!r}: by it bad steps are "
            "found, and skipped; remove it"
        )
    check_zero(config, data_parallel)


def check_zero(config: Config, data_parallel: int) -> None:
    """UserError where `deepspeed:` sets what goes with nothing here, is of another ZeRO stage, or does not divide so
    many replicas."""
    for path, (without_effect, reason) in _UNUSABLE.items():
        if (value := _value(config.deepspeed, path.split("."))) not in (None, without_effect):
            raise UserError(f"deepspeed.{path} = {value!r}: {reason}; remove it")
    zero = zero_options(config)
    for name, without_effect in _NOT_SCATTERED.items():
        value = config.deepspeed.get(name)
        if value not in (None, without_effect) and config.zero.stage > 1 and zero.get("reduce_scatter", True):
            raise UserError(
                f"deepspeed.{name} = {value!r} goes with zero.stage = {config.zero.stage} only where "
                "deepspeed.zero_optimization.reduce_scatter is false; set that, or remove it"
            )
    parts = zero.get("zero_hpz_partition_size", 1)
    of_zero_3 = [name for name in zero if name in _OF_ZERO_3 or name.startswith("stage3_")]
    of_zero_3 += ["offload_param"] * ("param" in offloaded(config)) + ["zero_hpz_partition_size"] * (parts > 1)
    if of_zero_3 and config.zero.stage < 3:
        raise UserError(f"deepspeed.zero_optimization.{of_zero_3[0]} needs zero.stage = 3, not {config.zero.stage}")
    if parts > 1 and data_parallel % parts:
        nearest = min((d for d in range(1, data_parallel + 1) if data_parallel % d == 0), key=lambda d: abs(d - parts))
        raise UserError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size = {parts} does not divide {data_parallel} "
            f"data-parallel processes; the nearest that does is {nearest}"
        )


def _value(settings: Any, path: Sequence[Any]) -> Any:
    """What settings within settings are, None where nothing is set."""
    for key in path:
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def check_quantized(config: Config) -> None:
    """UserError where this machine cannot quantize what ZeRO-3 sends."""
    for name, value in zero_options(config).items():
        if name.startswith("zero_quantized_") and value and not torch.cuda.is_available():
            raise UserError(
                f"deepspeed.zero_optimization.{name} needs a GPU, for which alone it has kernels; remove it"
            )


def _check_checkpoints(checkpoint: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    """UserError where checkpoints would be written other than those that are read here."""
    for name in sorted({"load_universal", "use_node_local_storage", "writer"} & checkpoint.keys()):
        raise UserError(f"deepspeed.checkpoint.{name} is decided by the `checkpoint` section; remove it")
    if zero.get("elastic_checkpoint"):
        raise UserError("deepspeed.zero_optimization.elastic_checkpoint is not needed, any layout loads; remove it")
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise UserError(
            "deepspeed.zero_optimization.offload_optimizer.device = nvme keeps the optimizer outside DeepSpeed's "
            "checkpoint files; set it to cpu"
        )


class _Recording(dict[str, Any]):
    """A dict that records which of its keys were looked up."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: _Recording(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.looked_up: set[Any] = set()

    def __getitem__(self, key: str) -> Any:
        self.looked_up.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.looked_up.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # one of its own, so that `**settings` looks up every key

    def keys(self) -> Any:
        return self  # so that `key in settings.keys()` is seen

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def __copy__(self) -> _Recording:
        return self


def _check_names(theirs: dict[str, Any], settings: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    # the global batch follows from these two, whatever DeepSpeed takes for the number of processes here
    recording = _Recording({key: value for key, value in settings.items() if key != "train_batch_size"})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            DeepSpeedConfig(recording)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]  # empty where a rule is one of the whole section
        sections = [name for name, value in theirs.items() if isinstance(value, dict)]
        named = [x for x in sections if not where or where[0] in theirs[x]]
        section = max(named, key=lambda x: _value(settings[x], first["loc"]) == first["input"], default=None)
        path = ".".join(["deepspeed", *([section] if section else []), *where])
        if first["type"] == "extra_forbidden":
            raise UserError(_unknown(path, _fields(DeepSpeedConfigModel))) from None
        value = f" = {first['input']!r}" if where else ""
        raise UserError(f"{path}{value}: {first['msg']}") from None
    except Exception as error:  # noqa: BLE001 - whatever DeepSpeed objects to in its config
        empty = [f"deepspeed.{path}" for path, value in flat(theirs).items() if value is None]
        if empty and "NoneType" in str(error):  # of several, some may be settings that may be null
            raise UserError(_empty(" or ".join(empty))) from None
        raise UserError(f"deepspeed: {' '.join(str(error).split())}") from None
    for path, known in _ignored(theirs, recording, "deepspeed"):
        raise UserError(_unknown(path, known))
    for name in theirs.get("pipeline", {}):  # all are looked up there, known or not
        if f"pipeline.{name}" not in _UNUSABLE:
            known = {path.removeprefix("pipeline.") for path in _UNUSABLE if path.startswith("pipeline.")}
            raise UserError(_unknown(f"deepspeed.pipeline.{name}", known))


def _ignored(theirs: Mapping[str, Any], recording: _Recording, path: str) -> Iterator[tuple[str, set[str]]]:
    """Paths of the keys that DeepSpeed did not look up, and what it looked up in their places."""
    for key, value in theirs.items():
        if key not in recording.looked_up:
            yield f"{path}.{key}", recording.looked_up
        elif isinstance(value, dict) and recording[key].looked_up:  # else DeepSpeed reads it later
            yield from _ignored(value, recording[key], f"{path}.{key}")


def _fields(model: Any) -> set[str]:
    """Names of all fields of a class's subclasses."""
    names = {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}
    return names.union(*(_fields(sub) for sub in model.__subclasses__()))


def _unknown(path: str, known: set[str]) -> str:
    near = difflib.get_close_matches(path.rsplit(".", 1)[1], known, 1)
    return f"{path} is no setting of DeepSpeed" + (f"; did you mean {near[0]}?" if near else "; remove it")
