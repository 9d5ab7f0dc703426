"""Process groups, the model's layers of this process, DeepSpeed's engine around them, and what runs steps on it.

`train.pipeline.engine` is imported where a run has a pipeline: its classes are subclasses of DeepSpeed's, whose import
is slow and must come after `init_processes` has set its variables.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import io
import itertools
import logging
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_lcl.attention import Attention, choose_attention
from megatron_lcl.config import Config
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.model.block import Block, Norm
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import Head, layer_specs
from megatron_lcl.model.lcl import LayerList
from megatron_lcl.parallel.mesh import Axis, Mesh, join_processes, local_device
from megatron_lcl.train.apex import fused_layer_norm
from megatron_lcl.train.checkpoint.initial_weights import InitialWeights, load_initial_weights
from megatron_lcl.train.launch_store import LOOPBACK, open_store
from megatron_lcl.train.layout import build_mesh, build_topology, check_layout
from megatron_lcl.train.master_weights import update_log_scale
from megatron_lcl.train.optimizer import build_optimizer, parameter_groups, rules_of
from megatron_lcl.train.optimizers.pieces import partitions_of, tensors_of
from megatron_lcl.train.optimizers.tensorwise import Tensorwise
from megatron_lcl.train.parts import freeze, frozen_parameters
from megatron_lcl.train.pipeline.partition import partition_uniform
from megatron_lcl.train.precision import DTYPES, resolve_dtype
from megatron_lcl.train.settings import deepspeed_config, offloaded
from megatron_lcl.train.skipping import forget_skipped_gradients, skip_on_device, skips_on_device
from megatron_lcl.train.step import Stepper
from megatron_lcl.train.uncompiled import import_deepspeed
from megatron_lcl.units import counted

KEPT = 32 << 20
"""bytes of the largest tensor whose memory a process on a CPU keeps when it is freed"""
_RUNS = itertools.count()
"""runs of this process, as torch counts its groups"""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def init_processes(config: Config) -> Mesh:
    """Join the process group that the launcher's variables describe (alone where there are none): NCCL or gloo.

    RunError where the config's layout does not fit the number of processes, or they cannot meet; UserError where there
    is no GPU for this one, or torch was not built for it.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": LOOPBACK}.items():
        os.environ.setdefault(name, value)
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    try:  # each for itself, before they meet: where the first one ends early, the others look for its store for minutes
        check_layout(config, size)
    except UserError as error:
        raise RunError(str(error)) from None
    if size == 1:
        os.environ.setdefault("MASTER_PORT", "0")
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    if torch.cuda.is_available():
        own, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= visible:
            raise UserError(
                f"LOCAL_RANK = {own} on a node where torch sees {counted(visible, 'GPU')}; start one process a GPU"
            )
        check_built_for(own)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # or DeepSpeed counts "devices" anew for each sum of ZeRO-3's gradients: it starts `numactl --hardware`
        if processes := os.environ.get("LOCAL_WORLD_SIZE"):
            os.environ["LOCAL_SIZE"] = processes
        keep_freed_memory()
    quiet_deepspeed()
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    if not dist.is_initialized():  # before DeepSpeed, whose store would listen at all addresses of the machine
        # a second run of the same processes would find the first one's keys, where that one's store goes on
        store = dist.PrefixStore(f"run {next(_RUNS)}", open_store(default_pg_timeout.total_seconds()))
        join_processes(store, int(os.environ["RANK"]), size, default_pg_timeout)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return build_mesh(config)


def check_built_for(device: int) -> None:
    """UserError where torch was built for newer GPUs than this one alone: CUDA's "no kernel image", before it comes."""
    built_for = [int(number) for number in re.findall(r"(?:sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list()))]
    major, minor = torch.cuda.get_device_capability(device)
    if built_for and 10 * major + minor < min(built_for):  # ROCm's are gfx…
        oldest = "{}.{}".format(*divmod(min(built_for), 10))
        raise UserError(
            f"torch {torch.__version__} is built for compute capability {oldest} and newer, and GPU {device} "
            f"({torch.cuda.get_device_name(device)}) has {major}.{minor}; use a newer one, "
            "or torch's build for CUDA 12.6 (up to torch 2.14), which begins with 5.0"
        )


def leave_processes(others_wait: bool) -> None:
    """Out of all process groups. others_wait: this process has failed, and others may still be in a collective.

    NCCL would wait for what they have not sent, here and then, and nobody would read why this process has failed.
    """
    if others_wait and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()  # and what DeepSpeed keeps of them, which the next run would be given


def keep_freed_memory() -> None:
    """On CPU keep what a step has freed for the next one, as torch does on devices; where glibc allocates.

    glibc gives free memory back to the system, which hands it out again page by page, as zeros: a step on tens of
    megabytes of activations spends as long on that as on its sums, and a layer takes longer among others than alone.
    Tensors over 32 MiB still come and go so; among the others they would leave gaps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_THRESHOLD, KEPT)


def quiet_deepspeed() -> None:
    """No information lines, which would tear the progress bar; and nothing compiled when processes meet.

    On CPU, which it may be asked to use beside a GPU too, DeepSpeed would build a shared-memory all-reduce with the
    machine's C++ compiler: a minute at first use, and an error where there is none. gloo does the same sums.
    """
    import_deepspeed()
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer

    # it would collect Python's garbage each time before it prints, a second of each start in bfloat16
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # its own, of one process on a GPU
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # ours are tested


def layer_norm(config: Config) -> Norm:
    """torch's LayerNorm, or apex's fused one where it is asked for. ValueError where NVIDIA's apex is absent."""
    return fused_layer_norm() if config.train.apex_layer_norm else nn.LayerNorm


def specs_of(config: Config, axis: Axis) -> list[functools.partial[Any]]:
    """What makes each layer of the run, in order; `axis`: the tensor ranks that share every layer."""
    initial_log_scale, train = config.initial_log_scale, config.train
    recompute = (train.activation_checkpointing, train.activation_checkpointing_every)
    attention = choose_run_attention(config).attend
    specs = layer_specs(config.model, initial_log_scale, layer_norm(config), axis, *recompute, attention, train.seed)
    if not train.compile:
        return specs
    return [functools.partial(_compiled, train.float8, make.func, *make.args) for make in specs]


def _compiled(float8: bool, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """A layer, its parts compiled if it is a block."""
    layer = make(*arguments)
    if isinstance(layer, Block):
        layer.compile_parts(float8, local_device())  # it is made on the CPU, and moved there
    return layer


def choose_run_attention(config: Config) -> Attention:
    """The language model's attention on this process's device. UserError where `train.attention` cannot be used."""
    language, train = config.model.language, config.train
    device = local_device()
    return choose_attention(
        device,
        DTYPES[resolve_dtype(config)],
        train.attention,
        head_width=language.width // language.heads,
        deterministic=train.deterministic,
    )


def build_module(
    config: Config, mesh: Mesh, partition: Sequence[int] | None = None, weights: InitialWeights | None = None
) -> Any:
    """This process's layers, parameters drawn from `train.seed`: a LayerList, in a pipeline a PipelineStage.

    partition: the first layer of each stage of a pipeline (see `partition_balanced`); None: as `partition_uniform`.
    weights: what parameters begin with in place of what was drawn.
    """
    specs = specs_of(config, mesh.tensor)
    bounds = [*(partition or partition_uniform(config)), len(specs)]
    own = range(bounds[mesh.pipeline.rank], bounds[mesh.pipeline.rank + 1])
    frozen = frozen_parameters(config)
    layers = {index: specs[index]() for index in own}
    initialize(layers, config.model, config.train.seed, mesh.tensor)
    if weights is not None:
        load_initial_weights(weights, layers, mesh.tensor)
    freeze({f"{index}.{name}": p for index, layer in layers.items() for name, p in layer.named_parameters()}, frozen)
    if mesh.pipeline.size == 1:
        return LayerList(*layers.values())
    from megatron_lcl.train.pipeline.engine import PipelineStage

    return PipelineStage(layers, bounds, build_topology(config, mesh.data.size))


def build_engine(module: Any, config: Config, mesh: Mesh, settings: dict[str, Any] | None = None) -> Any:
    """DeepSpeed's engine around the layers that `build_module` gives.

    settings: DeepSpeed's config where it is derived already, as `deepspeed_config` does.
    UserError where DeepSpeed refuses to build it and the section `deepspeed:`, which may be why, sets anything.
    """
    import deepspeed

    settings = settings or deepspeed_config(config, mesh.world.size)
    heads = [layer for layer in module.children() if isinstance(layer, Head)]  # in a pipeline only the last stage's
    numbers = [parameter for head in heads for parameter in head.numbers.values()]
    initial = [float(parameter.detach()) for parameter in numbers]
    groups = parameter_groups(module.named_parameters(), config.optimizer.weight_decay)
    rules = rules_of(tensors_of(dict(module.named_parameters())), config)
    optimizer = build_optimizer(groups, config.optimizer, rules)
    # DeepSpeed prints its topology
    with contextlib.redirect_stdout(io.StringIO()), _refusals_in_one_line(config):
        if mesh.pipeline.size == 1:
            mpu = _grid(config, mesh)
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
            )
        else:
            from megatron_lcl.train.pipeline.engine import build_pipeline_engine

            engine = build_pipeline_engine(module, optimizer, settings, config, mesh)
    if isinstance(optimizer, Tensorwise):
        optimizer.attach(partitions_of(engine.optimizer, mesh), mesh)
    if skips_on_device(config):
        skip_on_device(engine.optimizer)
    if "optimizer" in offloaded(config) and config.zero.stage < 3:
        forget_skipped_gradients(engine.optimizer)
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):  # at the smallest scale too an overflow is one more bad step
        scaler.raise_error_at_min_scale = False
    for parameter, value in zip(numbers, initial, strict=True):
        # the cast to half precision has rounded the start value, and with it the float32 master
        update_log_scale(parameter, functools.partial(torch.full_like, fill_value=value))
    gc.collect()  # ZeRO-3 leaves the partitions that it has copied into one in circles of references
    return engine


@contextlib.contextmanager
def _refusals_in_one_line(config: Config) -> Iterator[None]:
    """What DeepSpeed itself says inside becomes a UserError where `deepspeed:` sets anything: it compares some of its
    settings with each other, and with the machine, only when it builds its engine. All else keeps its traceback."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        theirs = str(frame.f_globals.get("__name__")).partition(".")[0] == "deepspeed"
        if not (config.deepspeed and theirs and str(error)):
            raise
        # no RunError: one process alone may find it
        raise UserError(f"deepspeed: {' '.join(str(error).split())}") from error


def set_batch(engine: Any, packs: int, micro_batch: int) -> None:
    """The engine's steps read so many packs from now on, in such micro-batches; to be called between two steps."""
    if (packs, micro_batch) == (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()):
        return
    engine.set_train_micro_batch_size(micro_batch)  # and the global batch that makes with the steps' number of them
    engine.set_train_batch_size(packs)
    engine.micro_steps = 0  # steps end where it is a multiple of the micro-batches of one
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):  # ZeRO's, with the optimizer on the CPU
        engine.optimizer.gradient_accumulation_steps = engine.gradient_accumulation_steps()


def build_stepper(engine: Any, config: Config, mesh: Mesh) -> Any:
    """What runs steps on the engine, `run(batches, lr) -> StepResult`: a Stepper, in a pipeline a PipelineStepper."""
    if mesh.pipeline.size > 1:
        from megatron_lcl.train.pipeline.engine import PipelineStepper

        return PipelineStepper(engine, config, mesh)
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
