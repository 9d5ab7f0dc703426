"""A model of a few thousand parameters trained in real processes, saved, and resumed at any layout."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.special import SpecialTokens

GLOBAL_BATCH = 6  # divides among one, two and three processes
LR = (1e-2, 8e-3, 6e-3, 4e-3)
PARTITION = (0, 4)  # of a pipeline of two stages
FIRST, LAST = 2, 4  # steps before the checkpoint, and of a job in all: the last one has what the first updated


@dataclass(frozen=True)
class Job:
    """A run: from a checkpoint (or from nothing) on, at a layout."""

    name: str
    zero: int = 1
    tensor: int = 1
    pipeline: int = 1
    source: str | None = None
    """the run whose checkpoint this one goes on from"""
    dtype: str = "float32"
    packs: int = GLOBAL_BATCH
    """of a step's global batch"""
    micro_batch: int = 1
    """packs of a micro-batch"""
    zero_options: dict[str, Any] = field(default_factory=dict)
    """of DeepSpeed's `zero_optimization`"""
    optimizer: str = "adamw"
    """or apex_fused_adam: the stand-in"""
    betas: tuple[float, float] = (0.9, 0.98)
    before: bool = False
    """apex's count of steps stays where apex keeps it, as it did before it was kept beside the moments"""
    again: bool = False
    """load the checkpoint once more, into the engine that has gone on, and go on again"""
    objective: str = "lcl"
    """or siglip: with all options of the model, too"""


JOBS = [Job("whole", 1), Job("sharded", 3)]
"""what the fixture `runs` holds"""


def build_config(folder: Path, job: Job) -> Config:
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 4, "mlp_width": 64}
    # 99 token ids: padded by one row where two processes share them
    language = {"context_length": 32, "vocab_size": 99, "width": 32, "layers": 2, "heads": 4, "mlp_width": 64}
    if job.objective == "siglip":
        options = {"layer_scale": 0.5, "qk_norm": True, "drop_path": 0.5}
        vision, language = {**vision, **options, "registers": 2}, {**language, **options}
    tree: dict[str, Any] = {
        "objective": {"name": job.objective},
        "model": {"vision": vision, "language": language, "pool_heads": 4},
        "optimizer": {"name": job.optimizer, "weight_decay": 0.3, "clip_norm": 0.5, "betas": job.betas},
        "zero": {"stage": job.zero},
        "deepspeed": {"zero_optimization": job.zero_options},
        "parallel": {"tensor": job.tensor, "pipeline": job.pipeline},
        "contrast": {"strategy": "recompute" if job.zero == 3 else "retain"},
        "train": {"output": str(folder / job.name), "dtype": job.dtype},
    }
    tree["train"] |= {"global_batch": job.packs, "micro_batch": job.micro_batch}
    return configs.from_dict(tree)


def pack(step: int, number: int, config: Config) -> PackedBatch:
    """Pack `number` of a step's global batch: two sequences, the first with an image behind its first words."""
    return micro_batch(step, [number], config)


def micro_batch(step: int, numbers: Sequence[int], config: Config) -> PackedBatch:
    """Some packs of a step's global batch, as one."""
    special, patches = SpecialTokens.of(config.model.language.vocab_size), config.model.vision.num_patches
    image = [special.soi, *[special.placeholder] * patches, special.eoi]
    sequences, images = [], []
    for number in numbers:
        draw = torch.Generator().manual_seed(100 * step + number)
        words = torch.randint(1, config.model.language.vocab_size - 10, (20,), generator=draw)
        sequences += [torch.tensor([*words[:5].tolist(), *image, *words[5:9].tolist()]), words[9:]]
        images.append(torch.randint(0, 256, (3, 16, 16), generator=draw, dtype=torch.uint8))
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    batch = pack_padded(tokens, lengths, torch.stack(images), config.model)
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    integers = {k: v.int() for k, v in fields.items() if isinstance(v, torch.Tensor) and v.dtype == torch.int64}
    packs = tuple(step * GLOBAL_BATCH + number for number in numbers)
    return dataclasses.replace(batch, **integers, packs=packs)  # as the loader gives them


def run_jobs(rank: int, folder: str, jobs: list[Job]) -> dict[str, Any]:
    """Each job's losses and gradient norms after the checkpoint, and what resuming had to say."""
    return run_each(run_job, Path(folder), jobs)


def run_each(run: Callable[[Path, Any], Any], folder: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """What `run(folder, job)` gives for one job after the other, by name."""
    import torch.distributed as dist

    results = {}
    for job in jobs:
        results[job.name] = run(folder, job)
        gc.freeze()  # each engine is built with a full collection, which need not look at all those before it
    dist.destroy_process_group()
    return results


def run_job(folder: Path, job: Job) -> dict[str, Any]:
    from megatron_lcl.train.broadcast_batches import broadcast_batches
    from megatron_lcl.train.checkpoint import checkpointer
    from megatron_lcl.train.checkpoint.folder import Progress, step_folder
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    config = build_config(folder, job)
    mesh = init_processes(config)
    with apex(job.before):
        engine = build_engine(build_module(config, mesh, PARTITION if job.pipeline > 1 else None), config, mesh)
    stepper = build_stepper(engine, config, mesh)
    run, said = Path(config.train.output), []
    size = job.micro_batch
    each = job.packs // mesh.data.size // size

    def steps(first: int, last: int) -> list[tuple[float, float, float]]:
        rows = []
        for step in range(first, last):
            firsts = range(mesh.data.rank * each * size, (mesh.data.rank + 1) * each * size, size)
            own = [micro_batch(step, range(first, first + size), config) for first in firsts]
            batches = own if mesh.loads_data else None
            result = stepper.run(broadcast_batches(batches, each, size, mesh, engine.device), LR[step])
            rows.append((result.loss, result.metrics["contrastive"], result.grad_norm))
        return rows

    with checkpointer.Checkpointer(engine, config, mesh, run) as checkpoints, written_late() as write:
        if job.source is None:
            steps(0, FIRST - 1)
            write.set()
            checkpoints.save(Progress(FIRST - 1, (FIRST - 1) * job.packs, {}))
            checkpoints.wait()
            write.clear()
            steps(FIRST - 1, FIRST)
            checkpoints.save(Progress(FIRST, FIRST * job.packs, {}))
        else:
            said = checkpoints.load(step_folder(folder / job.source, FIRST))
        rows = steps(FIRST, LAST)
        settings = ("weight_decay", "lr", "betas", "eps")
        groups = [tuple(group[name] for name in settings) for group in engine.optimizer.optimizer.param_groups]
        write.set()
        checkpoints.wait()
        again = []
        if job.again:
            checkpoints.load(step_folder(run if job.source is None else folder / job.source, FIRST))
            again = steps(FIRST, LAST)
    return {"rows": rows, "again": again, "said": said, "groups": groups, "saved": checkpoints.finished()}


@contextlib.contextmanager
def apex(before: bool) -> Iterator[None]:
    """The stand-in can be imported as apex.optimizers; before: its count of steps is not moved."""
    import apex_stand_in

    from megatron_lcl.train import optimizer

    modules = {"apex": ModuleType("apex"), "apex.optimizers": apex_stand_in}
    as_it_is = patch.object(optimizer, "steps_beside_moments", lambda made: made)
    with patch.dict(sys.modules, modules), as_it_is if before else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def written_late() -> Iterator[threading.Event]:
    """What is saved in the background is not written before the event is set, when training has long gone on."""
    from megatron_lcl.train.checkpoint import checkpointer

    event, write_files = threading.Event(), checkpointer.write_files

    def late(files: Any, root: Path) -> Any:
        assert event.wait(60)
        return write_files(files, root)

    checkpointer.write_files = late
    try:
        yield event
    finally:
        event.set()
        checkpointer.write_files = write_files
