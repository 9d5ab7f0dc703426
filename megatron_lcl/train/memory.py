"""What a training process must hold at once: a lower bound, compared with the memory there is before a run starts.

Counted is only what certainly lies there together, so a run that is refused would surely have failed; one that passes
may still need more (buffers of the network, a block's temporaries, fragments). benchmarks/memory_estimate.py shows it
beside what is measured. Layers and packs are taken to be spread evenly over tensor and pipeline ranks: the process that
has most has at least that.

Bytes that a block keeps of a row from forward to backward, in numbers of its width: the inputs of both norms and what
they give (4), q, k, v and what attention gives (4), and what goes into GELU and comes out (2 · mlp_width / width).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_lcl import objectives
from megatron_lcl.config import Config, Language, Vision
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.loading.ledger import Ledger, open_run_ledger
from megatron_lcl.data.loading.shared_memory import free_shared_memory
from megatron_lcl.machine import control_groups
from megatron_lcl.model.layers import layer_kinds, num_parameters
from megatron_lcl.train.averages import average_names
from megatron_lcl.train.checkpoint.folder import last_progress, ledger_of
from megatron_lcl.train.layout import check_layout, num_micro_batches
from megatron_lcl.train.parts import frozen_parameters
from megatron_lcl.train.precision import DTYPES, resolve_dtype
from megatron_lcl.train.settings import offloaded
from megatron_lcl.units import in_gb

Slots = Sequence[int] | None
"""image slots of a pack in each phase, where the run has chosen them; None: `data.images_per_pack`, or one"""


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process must hold at once, by what they are for."""

    parameters: float
    optimizer: float
    """Adam's moments, the float32 master weights, and their averages"""
    batches: float
    """images of all micro-batches of a step"""
    graph: float
    """what one micro-batch's forward keeps for its backward"""
    num_graphs: int
    """how many of them are kept at once"""
    gradients: float

    @property
    def total(self) -> float:
        """The most at one time: all graphs, or, when the first backward is through, one less and the gradients."""
        graphs = max(self.num_graphs * self.graph, (self.num_graphs - 1) * self.graph + self.gradients)
        return self.parameters + self.optimizer + self.batches + graphs

    def describe(self) -> str:
        """The sum and its parts, in GB (10⁹ bytes)."""
        kept = f"{self.num_graphs} micro-batches" if self.num_graphs > 1 else "a micro-batch"
        parts = {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            f"graphs of {kept}": self.num_graphs * self.graph,
            "batches": self.batches,
        }
        return f"{in_gb(self.total)} GB (" + ", ".join(f"{name} {in_gb(size)}" for name, size in parts.items()) + ")"


def estimate(
    config: Config, processes: int, images_per_pack: int | None = None, on_gpu: bool | None = None
) -> Estimate:
    """The lower bound for a process of a run on so many, all of whose steps are as the config says (`largest_estimate`
    has phases). UserError where the layout does not divide.

    images_per_pack: image slots, where the run has chosen them; None: `data.images_per_pack`, or one. on_gpu: whether
    the run's devices are GPUs, beside which what is offloaded lies in the host's memory and is not counted; None: as
    on this machine.
    """
    data, split = check_layout(config, processes), config.parallel.tensor * config.parallel.pipeline
    model, train, stage = config.model, config.train, config.zero.stage
    number = DTYPES[resolve_dtype(config)].itemsize
    frozen = frozen_parameters(config)
    own = num_parameters(model) / split
    trained = num_parameters(model, frozen) / split
    micro_batches = num_micro_batches(config, data)
    images = train.micro_batch * (images_per_pack or config.data.images_per_pack or 1)
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    moved = offloaded(config) if on_gpu else frozenset[str]()
    keeps_parameters, keeps_optimizer = "param" not in moved, "optimizer" not in moved
    return Estimate(
        parameters=number * own / (data if stage == 3 else 1) * keeps_parameters,
        optimizer=(12 + 4 * len(average_names(config))) * trained / data * keeps_optimizer,
        batches=micro_batches * images * 3 * model.vision.image_size**2 / config.parallel.pipeline,  # all patches
        graph=_graph(config, images, number, frozen) / split,
        num_graphs=micro_batches if objectives.create(config).keeps_graphs else 1,
        gradients=number * trained / (data if stage > 1 else 1) * keeps_optimizer,
    )


def largest_estimate(
    config: Config, processes: int, images_per_pack: Slots = None, on_gpu: bool | None = None
) -> Estimate:
    """That of the phase of the run that needs most. The parameters are the run's in all of them."""
    pairs = zip(phases_of(config), slots_of_phases(config, images_per_pack), strict=True)
    of_phases = [estimate(phase.config, processes, images, on_gpu) for phase, images in pairs]
    whole = estimate(config, processes, on_gpu=on_gpu)
    same = {name: getattr(whole, name) for name in ("parameters", "optimizer", "gradients")}
    return max((replace(one, **same) for one in of_phases), key=lambda one: one.total)


def slots_of_phases(config: Config, images_per_pack: Slots) -> Sequence[int | None]:
    """Image slots of a pack of each phase of the run."""
    return [None] * len(phases_of(config)) if images_per_pack is None else images_per_pack


def slots_of(ledger: Ledger, config: Config) -> list[int]:
    """Image slots of a pack in each phase of a run."""
    readings = [ledger.reading_at(phase.first, phase.config)[0] for phase in phases_of(config)]
    return [reading.images_per_pack or 1 for reading in readings]


def run_slots(config: Config) -> list[int]:
    """The same before the run starts, or goes on from its own checkpoint. UserError or OSError for its corpora's."""
    progress = last_progress(Path(config.train.output))
    step, consumed = (progress.step, progress.packs) if progress else (0, 0)
    ledger = open_run_ledger(config, objectives.create(config).sequences, ledger_of(progress), step, consumed)
    return slots_of(ledger, config)


def _graph(config: Config, images: int, number: int, frozen: Collection[str]) -> float:
    """Bytes that the forward of a micro-batch keeps; number: bytes of one in an activation.

    Only of layers all of whose parameters are trained: what others keep depends on which they are.
    """
    vision, language = config.model.vision, config.model.language
    without = {int(name.partition(".")[0]) for name in frozen}
    trained = {layer: index not in without for index, layer in enumerate(layer_kinds(config.model))}
    first, pool = trained["patches", 0], trained["pool", 0]
    rows = images * (vision.num_prefix + vision.num_kept)
    tokens = config.train.micro_batch * config.data.tokens_per_pack
    of_rows = _blocks(vision, config, [trained["vision", number] for number in range(vision.layers)])
    of_tokens = _blocks(language, config, [trained["language", number] for number in range(language.layers)])
    patches = images * vision.num_kept * 3 * vision.patch_size**2 + rows * vision.width
    pooled = rows * (4 * vision.width + 2 * language.width)
    kept = number * (first * patches + rows * of_rows + pool * pooled + tokens * of_tokens)
    if objectives.create(config).sequences.targets and f"{len(trained) - 1}.vocabulary" not in frozen:
        kept += 4 * language.vocab_size * language.width  # the gradient of the vocabulary: see losses/generation.py
    return kept


def _blocks(encoder: Vision | Language, config: Config, trained: Sequence[bool]) -> float:
    """Numbers that the trained blocks of an encoder keep of a row; trained: by block."""
    train, wide = config.train, 2 * encoder.mlp_width
    whole = 8 * encoder.width + wide
    lessened = {"none": whole, "attention": 3 * encoder.width + wide, "full": encoder.width}
    every, less = train.activation_checkpointing_every, lessened[train.activation_checkpointing]
    return sum(whole if index % every else less for index in range(encoder.layers) if trained[index])


# --- the memory there is -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What a process may use: of a GPU, or its share of this machine's."""

    size: float
    where: str
    on_gpu: bool = False
    shared: float = math.inf
    """bytes free in this machine's shared memory, for all processes"""
    local: int = 1
    """processes on this machine"""


def available(local: int) -> Memory:
    """A visible GPU's memory (the largest one's); without one, that of this machine for `local` processes. And the
    shared memory beside it.

    Swap counts, and a cgroup's limit.
    """
    shared = free_shared_memory()
    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return Memory(max(sizes), f"the GPU has {in_gb(max(sizes))} GB", True, shared, local)
    size = min([_physical(Path("/proc/meminfo")), *_limits()])
    where = f"this machine has {in_gb(size)} GB" + (f" for {local} processes" if local > 1 else "")
    return Memory(size / local, where, False, shared, local)


def _physical(meminfo: Path) -> float:
    """Bytes of memory and swap; infinite where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1024 * sum(float(lines[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    except (OSError, KeyError, ValueError):
        return math.inf


def _limits() -> Iterator[float]:
    """Limits of this process's control group and those around it."""
    for folder, version in control_groups("memory"):
        try:
            yield float((folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).read_text())
        except (OSError, ValueError):  # "max", or a container that shows no more than its own group
            continue
