"""A step of a run without its memory or its machines: the real engine on tensors that have a shape and no data.

torch's FakeTensorMode computes shapes only, its "fake" process group sends nothing, and every storage that is made is
counted until it is freed. So DeepSpeed's buffers, the graphs of micro-batches, gradients and temporaries are those
of the program itself, for any rank of any layout, on a laptop. What is not seen is what torch's tensors do not hold:
fragments of the allocator, kernels' own scratch memory, the network library.

DeepSpeed keeps the groups of a process for good, so each step is simulated in a process of its own. No GPU is needed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_lcl import attention, objectives
from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch, integer_sizes, max_runs
from megatron_lcl.interrupts import end_with_command
from megatron_lcl.losses import contrastive
from megatron_lcl.machine import num_cores
from megatron_lcl.model.drop_path import DropPath
from megatron_lcl.model.flops import Numbers, Sizes
from megatron_lcl.model.layers import layer_specs
from megatron_lcl.objectives.base import COUNTS, GlobalCounts
from megatron_lcl.parallel.mesh import ALONE, Axis
from megatron_lcl.train.averages import Averages
from megatron_lcl.train.engine import (
    build_engine,
    build_module,
    build_stepper,
    keep_freed_memory,
    quiet_deepspeed,
)
from megatron_lcl.train.forks import forkserver
from megatron_lcl.train.layout import build_mesh, check_layout, num_micro_batches
from megatron_lcl.train.memory import estimate
from megatron_lcl.train.parts import frozen_parameters, of_layer
from megatron_lcl.train.pipeline.partition import partition_uniform
from megatron_lcl.train.precision import resolve_dtype
from megatron_lcl.train.settings import zero_options
from megatron_lcl.train.storages import Storages

_SIMULATED = 4
"""micro-batches of a simulated step, where a process keeps the graphs of all or of one: each one more takes as much as
the last. With three the second backward, which finds the gradients of the first, is not the last"""
REPLICAS = 64
"""at most, of a simulated step (`usage_of`); with `zero_hpz_partition_size` all"""


@dataclass(frozen=True)
class Peaks(Numbers):
    """The most bytes at one time in a part of a step."""

    tensors: float
    small: float
    """of tensors whose memory a process on a CPU keeps when they are freed (`keep_freed_memory`)"""
    large: float
    """of the others what is written, and what gloo copies"""
    network: float
    """of what is sent or received, but for what stays from step to step"""


@dataclass(frozen=True)
class Usage(Numbers):
    """Bytes of a process, as tensors.

    The peaks before the last backward and from it on are kept apart: each is linear in micro-batches and blocks, the
    larger of the two is not. With few micro-batches it may be the buffers for the sums of gradients, with many their
    graphs, of which the last backward has one.
    """

    parameters: float
    """weights, in the type that computes"""
    optimizer: float
    """what else stays from step to step: master weights, moments, buffers for gradients"""
    batches: float
    """images and integers of all micro-batches of a step, or of two (`usages_of`)"""
    graphs: float
    """what the forwards of all micro-batches keep for backward, where a step has all forwards first; else 0"""
    before: Peaks
    """until the last backward begins, all of the above included"""
    after: Peaks
    """from then on: gradients are summed, and the optimizer steps"""
    built: float
    """on a CPU, until the step: while the engine is built, and in the first step, which makes the moments"""
    kept_built: float
    """of these, the small tensors"""
    lost: float
    """what lies between them in the heap, less what it has of large ones, as a share of `kept`: no bytes"""
    losses: float
    """the most that a loss takes while it is computed, its gradients included"""

    @property
    def peak(self) -> float:
        """The most at one time in a step."""
        return max(self.before.tensors, self.after.tensors)

    @property
    def kept(self) -> float:
        """What a process on a CPU keeps of small tensors, however many of them are freed."""
        return max(self.kept_built, self.before.small, self.after.small)

    @property
    def touched(self) -> float:
        """The most at one time on a CPU."""
        return max(self.built, self.kept + max(self.before.large, self.after.large))

    @property
    def network(self) -> float:
        """The most at one time of what is sent or received in a step, but for what stays from step to step."""
        return max(self.before.network, self.after.network)

    @property
    def process(self) -> float:
        """What a process on a CPU has."""
        return self.touched + self.lost * self.kept

    @property
    def temporary(self) -> float:
        """The rest of the peak: gradients and what is computed with."""
        return self.peak - self.parameters - self.optimizer - self.batches - self.graphs

    def with_more(self, more: float, of_network: float = 0.0) -> Usage:
        """With so many bytes more at every time, and of what is sent or received."""
        peaks = Peaks(more, 0.0, more, of_network)
        return replace(self, before=self.before + peaks, after=self.after + peaks, built=self.built + more)


def extrapolated(usage: Usage, fewer: Usage, more: Usage, times: float) -> Usage:
    """`usage` and so many times what `more` has more than `fewer`; of the shares that are lost the larger: what a
    tensor loses depends on all before it, so a difference of two says nothing."""
    return replace(usage + (more - fewer) * times, lost=max(usage.lost, more.lost))


def simulate(config: Config, processes: int, images_per_pack: int, rank: int = 0) -> Usage:
    """What process `rank` of a run on so many holds, all of whose steps are as the config says (of a run with phases:
    one of their configs). UserError where the layout does not divide.

    images_per_pack: image slots of a pack; each pack is taken to be full of sequences as long as the context.
    """
    data = check_layout(config, processes)
    config = _without_kernels(config)
    wanted, enough = num_micro_batches(config, data), _SIMULATED
    if not objectives.create(config).keeps_graphs:
        # with one micro-batch more than a stage keeps at once it computes as in the midst of a long step
        enough = max(enough, 2 + num_in_flight(config, rank // (data * config.parallel.tensor), wanted))
    counts = [wanted] if wanted <= enough else [enough - 1, enough]
    with ProcessPoolExecutor(len(counts), forkserver(), end_with_command, max_tasks_per_child=1) as pool:
        tasks = [pool.submit(_simulate, _with(config, data, m), processes, images_per_pack, rank) for m in counts]
        found = [task.result() for task in tasks]
    if len(found) == 1:
        return found[0]
    fewer, more = found
    return extrapolated(more, fewer, more, wanted - enough)


Simulate = Callable[[Config, int, int, int], Usage]
"""`simulate`, or what stands for it"""


def usages_of(config: Config, processes: int, images: int, on_gpu: bool, simulated: Simulate) -> list[Usage]:
    """Bytes of the first process of each stage of the pipeline, of which those that are alike are simulated once.

    All have equally many layers (`partition_uniform`): which they will have is measured when the run starts.
    images: image slots of a pack. on_gpu: the process that reads the data, which is that of the first stage, has the
    next step's batches there as well (train/prefetch.py). UserError where the layout does not divide.
    """
    kinds = kinds_of_stages(config, processes)
    firsts = {kind: kinds.index(kind) for kind in kinds}

    def of_stage(stage: int) -> Usage:
        return usage_of(config, processes, images, stage, simulated)

    with ThreadPoolExecutor(max(1, num_cores() // 2)) as pool:  # each simulation takes two processes
        usages = dict(zip(firsts, pool.map(of_stage, firsts.values()), strict=True))
    first, *others = (usages[kind] for kind in kinds)
    if on_gpu:
        first = replace(first.with_more(first.batches), batches=2 * first.batches)
    return [first, *others]


def usage_of(config: Config, processes: int, images: int, stage: int, simulated: Simulate) -> Usage:
    """Bytes of the first process of a stage, from a step of no more than `REPLICAS` replicas (but of all with
    `zero_hpz_partition_size`): what replicas share between them is known (train/memory.py), and a step of more takes
    minutes.

    images: image slots of a pack.
    """
    data, split = check_layout(config, processes), config.parallel.tensor * config.parallel.pipeline
    few = data if "zero_hpz_partition_size" in zero_options(config) else min(data, REPLICAS)
    fewer = configs.replace(config, train__global_batch=config.train.global_batch // data * few)
    found = simulated(fewer, few * split, images, stage * few * config.parallel.tensor)
    if few == data:
        return found
    whole, part = (estimate(c, n, images, on_gpu=False) for c, n in ((config, processes), (fewer, few * split)))
    less = {name: getattr(whole, name) - getattr(part, name) for name in ("parameters", "optimizer", "gradients")}
    features = 0
    if objectives.create(config).all_features_first and stage == config.parallel.pipeline - 1:
        # of all pairs, and what the loss keeps of each, float32 (objectives/contrast.py)
        packs = config.train.global_batch - fewer.train.global_batch
        features = 4 * (2 * config.model.language.width + 2) * packs * images
    more = found.with_more(sum(less.values()) + features, features)
    return replace(
        more, parameters=found.parameters + less["parameters"], optimizer=found.optimizer + less["optimizer"]
    )


def kinds_of_stages(config: Config, processes: int) -> list[Hashable]:
    """What the memory of each stage depends on: its layers, with what is frozen of them, and how many micro-batches'
    graphs it keeps at once. The layers also say what it receives from the stage before and sends to the next."""
    train, frozen = config.train, frozen_parameters(config)
    recompute = (train.activation_checkpointing, train.activation_checkpointing_every)
    layers: list[Hashable] = []
    for index, make in enumerate(layer_specs(config.model, 0.0, nn.LayerNorm, ALONE, *recompute)):
        # how often a block is left out takes no memory, whether it ever is does
        arguments = tuple(isinstance(x, DropPath) or x for x in make.args)
        layers.append((make.func, arguments, of_layer(frozen, index)))
    micro_batches = num_micro_batches(config, check_layout(config, processes))
    bounds = [*partition_uniform(config), len(layers)]
    return [
        (tuple(layers[first:end]), num_in_flight(config, stage, micro_batches))
        for stage, (first, end) in enumerate(itertools.pairwise(bounds))
    ]


def num_in_flight(config: Config, stage: int, micro_batches: int) -> int:
    """Micro-batches whose graphs a stage keeps at once (train/pipeline/schedule.py)."""
    if objectives.create(config).keeps_graphs:
        return micro_batches
    return min(config.parallel.pipeline - stage, micro_batches)


def _without_kernels(config: Config) -> Config:
    """As it would be here, but for kernels that only a GPU has: those that stand in for them keep the same."""
    if config.optimizer.name == "apex_fused_adam":
        config = configs.replace(config, optimizer__name="adamw")
    plain = {"train__attention": "auto", "train__compile": False, "train__apex_layer_norm": False}
    return configs.replace(config, train__dtype=resolve_dtype(config), **plain)


def _with(config: Config, data: int, micro_batches: int) -> Config:
    return configs.replace(config, train__global_batch=data * config.train.micro_batch * micro_batches)


def _simulate(config: Config, processes: int, images: int, rank: int) -> Usage:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch._subclasses.fake_tensor import FakeTensorMode

    keep_freed_memory()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # DeepSpeed's alignment check
    with _processes(processes, rank), without_others(), _without_data(), FakeTensorMode(), Storages() as storages:
        mesh = build_mesh(config)
        batches = [full_batch(config, images) for _ in range(num_micro_batches(config, mesh.data.size))]
        of_batches = storages.now
        engine = build_engine(build_module(config, mesh), config, mesh)
        stepper = build_stepper(engine, config, mesh)
        stepper.run(batches, 1e-3)  # after it the optimizer's moments are there
        Averages(config, engine).update(config.train.steps, skipped=False)  # and after it all averages
        built, kept_built = storages.touched, storages.kept
        resident = storages.begin_step()
        after_forwards = resident
        forwards, backward, left = stepper._first_forwards, DeepSpeedEngine.backward, len(batches)
        parts: list[Peaks] = []

        def counted(given: Sequence[PackedBatch]) -> Any:
            nonlocal after_forwards
            outputs = forwards(given)
            after_forwards = storages.now
            return outputs

        def end_part() -> None:
            parts.append(Peaks(storages.peak, storages.small, storages.large, storages.network))
            storages.begin_part()

        def one_backward(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                end_part()
            return backward(*arguments, **options)

        with (
            mock.patch.object(stepper, "_first_forwards", counted),
            mock.patch.object(DeepSpeedEngine, "backward", one_backward),
            storages.watching_losses(),
        ):
            stepper.run(batches, 1e-3)
        end_part()
        before, after = parts
        parameters = sum(getattr(p, "ds_tensor", p).nbytes for p in engine.module.parameters())
        usage = Usage(
            parameters=parameters,
            optimizer=resident - parameters - of_batches,
            batches=of_batches,
            graphs=after_forwards - resident,
            before=before,
            after=after,
            built=built,
            kept_built=kept_built,
            lost=0.0,
            losses=storages.losses,
        )
        return replace(usage, lost=(storages.process - usage.touched) / max(usage.kept, 1))


@contextlib.contextmanager
def _processes(processes: int, rank: int) -> Iterator[None]:
    """A process group of so many, of which this process is one and the others do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    launched = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"} | {k: str(v) for k, v in launched.items()}):
        dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
        try:
            quiet_deepspeed()
            import deepspeed
            from deepspeed.accelerator import get_accelerator

            deepspeed.init_distributed("gloo", verbose=False)
            # asked of this CPU, which computes nothing; devices have it
            with mock.patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
                yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def without_others() -> Iterator[None]:
    """What the program learns from other processes, from what it knows of itself."""
    import deepspeed.runtime.zero.partition_parameters as partition
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    import deepspeed.runtime.zero.stage3 as stage3

    def counts(batches: Sequence[PackedBatch], mesh: Any, _device: torch.device) -> GlobalCounts:
        own = {name: sum(getattr(batch, name) for batch in batches) for name in COUNTS}
        everywhere = {name: value * mesh.data.size for name, value in own.items()}
        return GlobalCounts(everywhere, [own["num_pairs"]] * mesh.data.size)

    with contextlib.ExitStack() as stack:
        for module in (partition, coordinator, stage3):
            stack.enter_context(mock.patch.object(module, "assert_ints_same_as_other_ranks", mock.Mock()))
        stack.enter_context(mock.patch.object(GlobalCounts, "of", counts))
        stack.enter_context(mock.patch.object(Axis, "gather_objects", lambda axis, value: [value] * axis.size))
        same = lambda facts, _error, _device, axis: [facts] * axis.size  # noqa: E731
        stack.enter_context(mock.patch.object(contrastive, "exchange", same))
        yield


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    """What depends on data, of its shapes; parameters are changed in place."""

    def apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        for child in module.children():
            child._apply(function)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = function(parameter.data)
        return module

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
        # one sequence keeps what many keep; where they begin and end is data
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.cat([F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)])

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=False))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", torch.no_grad()(apply)))
        stack.enter_context(mock.patch.object(attention, "_function", return_value=attend))
        yield


def sizes_of(config: Config, images: int, packs: int) -> Sizes:
    """Of so many full packs: every image slot filled and a pair, sequences as long as the context.

    images: slots of a pack.
    """
    vision, slots = config.model.vision, config.data.tokens_per_pack
    longest = min(config.model.language.context_length, slots)
    whole, rest = divmod(slots, longest)
    sequences = objectives.create(config).sequences
    placeholders = min(images * placeholders_of_image(config), slots - 1)
    patches = packs * images * vision.num_kept
    return Sizes(
        images=packs * images,
        rows=packs * slots,
        squares=packs * (whole * longest**2 + rest**2),
        targets=packs * (slots - placeholders) if sequences.targets else 0,
        pairs=packs * images if sequences.contrast else 0,
        patches=patches,
        patch_squares=patches * vision.num_kept,
    )


def placeholders_of_image(config: Config) -> int:
    """Token slots of a pack that an image's patches take; none where images stand apart from the tokens."""
    sequences = objectives.create(config).sequences
    return config.model.vision.num_placeholders if sequences.interleaved or sequences.captions else 0


def full_batch(config: Config, images: int) -> PackedBatch:
    """A micro-batch of full packs, every image a pair (`sizes_of`). Only sizes matter. images: slots of a pack."""
    packs, slots, side = config.train.micro_batch, config.data.tokens_per_pack, config.model.vision.image_size
    longest = min(config.model.language.context_length, slots)
    vision, counts = config.model.vision, sizes_of(config, images, packs)
    sizes = integer_sizes(
        packs, slots, images, max_runs(slots, longest), vision.num_kept if vision.patch_dropout else 0
    )
    integers: dict[str, Any] = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
    return PackedBatch(
        images=torch.empty(packs * images, 3, side, side, dtype=torch.uint8),
        num_targets=counts.targets,
        num_pairs=counts.pairs,
        num_images=counts.images,
        num_tokens=counts.rows,
        max_seqlen=longest,
        num_patches=vision.num_kept,
        **integers,
    )
