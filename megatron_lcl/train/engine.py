"""DeepSpeed's engine around the stages: its config from ours, process groups, precision."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_lcl.attention import Attention, choose_attention
from megatron_lcl.config import Config
from megatron_lcl.model.block import Norm
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import Head, layer_specs
from megatron_lcl.model.lcl import LayerList
from megatron_lcl.parallel.layers import full_tensor
from megatron_lcl.parallel.mesh import Axis, Mesh
from megatron_lcl.train import settings
from megatron_lcl.train.apex import fused_layer_norm
from megatron_lcl.train.checkpoint.initial_weights import InitialWeights, put
from megatron_lcl.train.layout import build_mesh, build_topology, check_layout, num_micro_batches
from megatron_lcl.train.optimizer import build_optimizer, parameter_groups
from megatron_lcl.train.pipeline.partition import partition_uniform

BUCKET = 50_000_000
"""numbers in a sum of gradients over replicas: DeepSpeed's own are so large that a model of 500 million has one sum"""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def init_processes(config: Config) -> Mesh:
    """Join the process group that the launcher's variables describe (alone where there are none): NCCL or gloo.

    RunError where the config's layout does not fit the number of processes.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    import deepspeed

    tame_deepspeed()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return build_mesh(config)


def keep_freed_memory() -> None:
    """On CPU keep what a step has freed for the next one, as torch does on devices; where glibc allocates.

    glibc gives free memory back to the system, which hands it out again page by page, as zeros: a step on tens of
    megabytes of activations spends as long on that as on its sums, and a stage takes longer among others than alone.
    Tensors over 32 MiB still come and go so; among the others they would leave gaps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)


def tame_deepspeed() -> None:
    """No information lines, which would tear the progress bar; and nothing compiled when processes meet.

    On CPU DeepSpeed would build a shared-memory all-reduce with the machine's C++ compiler: a minute at first use, and
    an error where there is none. gloo does the same sums.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def resolve_dtype(config: Config) -> str:
    """`train.dtype` with `auto` decided."""
    if config.train.dtype != "auto":
        return config.train.dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"


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
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
    }
    merged = settings.merge(ours, config.deepspeed)
    # gradients are summed over replicas in float32 in every precision, unless the user wants half the bytes
    merged.setdefault("communication_data_type", "fp32")
    if config.zero.stage < 3 and config.parallel.pipeline == 1:  # a sum travels while backward goes on; so not too late
        merged["zero_optimization"] = {"overlap_comm": True, "reduce_bucket_size": BUCKET} | merged["zero_optimization"]
    settings.check(config, merged, data_parallel)
    return merged


def layer_norm(config: Config) -> Norm:
    """torch's LayerNorm, or apex's fused one where it is asked for. ValueError where NVIDIA's apex is absent."""
    return fused_layer_norm() if config.train.apex_layer_norm else nn.LayerNorm


def specs_of(config: Config, axis: Axis) -> list[functools.partial[Any]]:
    """What makes each stage of the run, in order; `axis`: the tensor ranks that share every layer."""
    initial_log_scale, train = config.contrast.initial_log_scale, config.train
    recompute = (train.activation_checkpointing, train.activation_checkpointing_every)
    attention = choose_run_attention(config).attend
    return layer_specs(config.model, initial_log_scale, layer_norm(config), axis, *recompute, attention)


def choose_run_attention(config: Config) -> Attention:
    """The language model's attention on this process's device. UserError where `train.attention` cannot be used."""
    language, train = config.model.language, config.train
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return choose_attention(
        device,
        DTYPES[resolve_dtype(config)],
        train.attention,
        head_width=language.width // language.heads,
        deterministic=train.deterministic,
    )


def build_module(
    config: Config, mesh: Mesh, cuts: Sequence[int] | None = None, weights: InitialWeights | None = None
) -> Any:
    """This process's stages, parameters drawn from `train.seed`: a LayerList, in a pipeline a PipelineStage.

    cuts: the first stage of each part of a pipeline (see `cuts.partition_balanced`); None: equally many stages in each.
    weights: what parameters begin with in place of what was drawn.
    """
    specs = specs_of(config, mesh.tensor)
    bounds = [*(cuts or partition_uniform(len(specs), mesh.pipeline.size)), len(specs)]
    own = range(bounds[mesh.pipeline.rank], bounds[mesh.pipeline.rank + 1])
    stages = {index: specs[index]() for index in own}
    initialize(stages, config.model, config.train.seed, mesh.tensor)
    if weights is not None:
        put(weights, stages, mesh.tensor)
    if mesh.pipeline.size == 1:
        return LayerList(*stages.values())
    from megatron_lcl.train.pipeline.engine import PipelineStage

    return PipelineStage(stages, bounds, build_topology(config, mesh.data.size))


def build_engine(module: Any, config: Config, mesh: Mesh) -> Any:
    """DeepSpeed's engine around the stages that `build_module` gives."""
    import deepspeed

    settings_of_run = deepspeed_config(config, mesh.world.size)
    heads = [stage for stage in module.children() if isinstance(stage, Head)]  # in a pipeline only the last part's
    initial = [float(head.log_scale.detach()) for head in heads]
    groups = parameter_groups(module.named_parameters(), config.optimizer.weight_decay)
    optimizer = build_optimizer(groups, config.optimizer)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology and, for bfloat16, memory in use
        if mesh.pipeline.size == 1:
            mpu = _grid(config, mesh)
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings_of_run, mpu=mpu, dist_init_required=False
            )
        else:
            from megatron_lcl.train.pipeline.engine import build_pipeline_engine

            engine = build_pipeline_engine(module, optimizer, settings_of_run, config, mesh)
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):  # below its smallest a step is as bad as others: train.guard
        scaler.raise_error_at_min_scale = False
    for head, value in zip(heads, initial, strict=True):
        # the cast to half precision has rounded the start value, and with it the float32 master
        update_log_scale(head.log_scale, functools.partial(torch.full_like, fill_value=value))
    return engine


def build_stepper(engine: Any, config: Config, mesh: Mesh) -> Any:
    """What runs steps on the engine, `run(batches, lr) -> StepResult`: a Stepper, in a pipeline a PipelineStepper."""
    if mesh.pipeline.size > 1:
        from megatron_lcl.train.pipeline.engine import PipelineStepper

        return PipelineStepper(engine, config, mesh)
    from megatron_lcl.train.step import Stepper

    return Stepper(engine, config, mesh)


def _grid(config: Config, mesh: Mesh) -> Any:
    """What tells DeepSpeed which processes share parameters, which are replicas; None where all are replicas."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid
    from deepspeed.utils import groups

    grid = None
    if mesh.tensor.size > 1:
        grid = PipelineParallelGrid(build_topology(config, mesh.data.size))
    groups.mpu = grid  # DeepSpeed would go on with that of an engine built before in this process
    return grid


@torch.no_grad()
def update_log_scale(parameter: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply an elementwise function to the log scale: to the parameter, and to DeepSpeed's float32 master.

    Changing the parameter alone would be lost at the next step.
    """
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: each process its shard
        safe_set_local_fp32_param(parameter, function(safe_get_local_fp32_param(parameter)))
        parameter.ds_tensor.copy_(function(parameter.ds_tensor))
    elif (master := safe_get_full_fp32_param(parameter)) is not None:
        safe_set_full_fp32_param(parameter, function(master))
    parameter.copy_(function(parameter))


def read_log_scale(parameter: Any) -> torch.Tensor:
    """A copy of the log scale [1] in float32: DeepSpeed's master where the parameter itself is in half precision."""
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.dtype == torch.float32 and parameter.numel():
        return parameter.detach().clone()
    return safe_get_full_fp32_param(parameter).detach().clone()


def read_parameters(engine: Any, mesh: Mesh, state: str | None = None) -> dict[str, torch.Tensor]:
    """Whole parameters, or a state of the optimizer for each, float32, by name; on every process, and all call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # DeepSpeed links states once, when the first parameter group has some and the others none
        engine.optimizer._hp_optimizer_states_linked = False
        link()
    own = {}
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_optimizer_state(parameter, state) if state else safe_get_full_fp32_param(parameter)
        if value is None:  # float32: the parameter is its own master
            value = parameter.detach()
        own[name] = full_tensor(value, parameter, mesh.tensor).float().cpu()
    everyone = mesh.pipeline.gather_objects(own)
    return {name: value for part in everyone for name, value in part.items()}
