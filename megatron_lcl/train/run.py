"""A training run, from config to final checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lcl.config import Config, from_dict, to_dict, to_yaml
from megatron_lcl.data.batch import PackedBatch
from megatron_lcl.data.loader import PackedLoader
from megatron_lcl.data.store import open_corpus
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train import checkpoint
from megatron_lcl.train.checkpoint import Progress
from megatron_lcl.train.engine import build_engine, build_module, deepspeed_config, init_processes, num_micro_batches
from megatron_lcl.train.optimizer import learning_rate
from megatron_lcl.train.step import Stepper
from megatron_lcl.train.telemetry import Telemetry

CONFIG = "config.yaml"


def check(config: Config, processes: int) -> None:
    """Everything that can be known to be wrong before anything starts: ValueError with one line."""
    if not config.data.corpora:
        raise ValueError(
            "data.corpora is empty; name a corpus that `megatron-lcl preprocess` wrote: --data.corpora DIR"
        )
    deepspeed_config(config, processes)
    for corpus in config.data.corpora:
        tokenizer = open_corpus(corpus.path).tokenizer
        if tokenizer.vocab_size != config.model.language.vocab_size:
            raise ValueError(
                f"model.language.vocab_size is {config.model.language.vocab_size}, but the tokenizer of {corpus.path} "
                f"has {tokenizer.vocab_size} ids; set model.language.vocab_size to {tokenizer.vocab_size}"
            )
    check_output(Path(config.train.output), config)


def check_output(run: Path, config: Config) -> None:
    """A run folder is new, empty, or holds the same run; ValueError names what differs."""
    saved = run / CONFIG
    if run.exists() and not run.is_dir():
        raise ValueError(f"train.output = {run} is a file; name a folder")
    if not saved.exists():
        if run.exists() and any(run.iterdir()):
            raise ValueError(f"train.output = {run} holds other files and no {CONFIG}; name a new or an empty folder")
        return
    before, now = (_flat(tree) for tree in (_read(saved), to_dict(config)))
    changed = sorted(k for k in before.keys() | now.keys() if k.startswith("model.") and before.get(k) != now.get(k))
    if changed:
        raise ValueError(
            f"train.output = {run} holds a run of another model ("
            + ", ".join(f"{k} {before.get(k)} → {now.get(k)}" for k in changed[:3])
            + "); name another folder"
        )


def _read(path: Path) -> dict:
    import yaml

    return to_dict(from_dict(yaml.safe_load(path.read_text(encoding="utf-8"))))


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def train(config: Config) -> Path:
    """Run (or go on with) the training that `config` describes; the final checkpoint's folder.

    Every process of the launch calls it. Resumes from the newest checkpoint in `train.output` that verifies.
    """
    torch.set_num_threads(max(1, torch.get_num_threads()))
    mesh = init_processes()
    try:
        return _train(config, mesh)
    finally:
        dist.destroy_process_group()


def _train(config: Config, mesh: Mesh) -> Path:
    run, train = Path(config.train.output), config.train
    if mesh.is_first:
        run.mkdir(parents=True, exist_ok=True)
        (run / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    engine = build_engine(build_module(config), config, mesh)
    folder, skipped = _agree(run, mesh)
    progress = checkpoint.read_progress(folder) if folder else Progress(0, 0, mesh.data.size)
    with Telemetry(run, config, mesh.is_first, progress.step) as telemetry:
        for bad, faults in skipped.items():
            telemetry.say(f"passed over {bad}: {'; '.join(faults[:3])}")
        if folder:
            if progress.processes != mesh.data.size:
                raise ValueError(
                    f"{folder} was written by {progress.processes} processes and this run has {mesh.data.size}; "
                    f"start it with --processes {progress.processes}"
                )
            checkpoint.load(engine, folder)
            telemetry.say(f"going on from {folder}")
        last = folder
        micro_batches = num_micro_batches(config, mesh.data.size)
        stepper, batches = Stepper(engine, config, mesh), _batches(config, mesh, progress)
        for step in range(progress.step, train.steps):
            started = time.perf_counter()
            own = [next(batches).to(engine.device) for _ in range(micro_batches)]
            loaded = time.perf_counter()
            lr = learning_rate(step, config.optimizer, train.steps)
            result = stepper.run(own, lr)
            ended = time.perf_counter()
            telemetry.step(step + 1, result, lr, ended - started, loaded - started)
            progress = Progress(step + 1, progress.packs + train.global_batch, mesh.data.size)
            every = config.checkpoint.every
            if step + 1 == train.steps or (every and (step + 1) % every == 0):
                last = checkpoint.save(engine, config, mesh, run, progress)
    assert last is not None
    return last


def _agree(run: Path, mesh: Mesh) -> tuple[Path | None, dict[Path, list[str]]]:
    """The checkpoint to resume from, decided by the first process for all."""
    decision = [checkpoint.newest(run) if mesh.is_first else None]
    dist.broadcast_object_list(decision, src=0, group=mesh.data.group)
    assert decision[0] is not None
    return decision[0]


def _batches(config: Config, mesh: Mesh, progress: Progress) -> Iterator[PackedBatch]:
    vision, language = config.model.vision, config.model.language
    loader = PackedLoader(
        config.data,
        num_patches=vision.num_patches,
        image_size=vision.image_size,
        context_length=language.context_length,
        rank=mesh.data.rank,
        world_size=mesh.data.size,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        first_pack=progress.packs,
        steps=config.train.steps - progress.step,
    )
    return iter(loader)
