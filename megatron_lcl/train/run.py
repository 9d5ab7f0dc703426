"""A training run, from config to final checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lcl.config import Config, load, to_dict, to_yaml
from megatron_lcl.data.index import Ledger, open_ledger
from megatron_lcl.data.loader import PackedLoader
from megatron_lcl.data.store import open_corpus
from megatron_lcl.parallel.mesh import Mesh, RunError
from megatron_lcl.train import checkpoint
from megatron_lcl.train.checkpoint import Progress
from megatron_lcl.train.checkpointer import Checkpointer, Saved
from megatron_lcl.train.engine import build_engine, build_module, deepspeed_config, init_processes
from megatron_lcl.train.layout import num_micro_batches
from megatron_lcl.train.optimizer import learning_rate
from megatron_lcl.train.share import share
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
    before, now = (_flat(to_dict(c)) for c in (load(saved), config))
    changed = sorted(k for k in before.keys() | now.keys() if k.startswith("model.") and before.get(k) != now.get(k))
    if changed:
        raise ValueError(
            f"train.output = {run} holds a run of another model ("
            + ", ".join(f"{k} {before.get(k)} → {now.get(k)}" for k in changed[:3])
            + "); name another folder"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def train(config: Config) -> Path:
    """Run (or go on with) the training that `config` describes; the final checkpoint's folder.

    Every process of the launch calls it. Resumes from the newest checkpoint in `train.output` that verifies.
    """
    mesh = init_processes(config)
    try:
        return _train(config, mesh)
    finally:
        dist.destroy_process_group()


def _train(config: Config, mesh: Mesh) -> Path:
    run, train, every = Path(config.train.output), config.train, config.checkpoint.every
    folder, skipped = _agree(config, run, mesh)
    before = checkpoint.read_progress(folder) if folder else None
    first_step, first_pack = (before.step, before.packs) if before else (0, 0)
    if mesh.is_first:
        run.mkdir(parents=True, exist_ok=True)
        (run / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    ledger = before.ledger if before else None
    loader = build_loader(config, mesh, first_step, first_pack, ledger) if mesh.reads else None
    micro_batches = num_micro_batches(config, mesh.data.size)
    engine = build_engine(build_module(config), config, mesh)
    checkpoints = Checkpointer(engine, config, mesh, run)
    with checkpoints, Telemetry(run, config, mesh.is_first, first_step) as telemetry:
        for bad, faults in skipped.items():
            telemetry.say(f"passed over {bad}: {'; '.join(faults[:3])}")
        if folder:
            for message in checkpoints.load(folder):
                telemetry.say(message)
            telemetry.say(f"going on from {folder}")
        last = folder
        stepper, batches = Stepper(engine, config, mesh), iter(loader or ())
        for step in range(first_step, train.steps):
            started = time.perf_counter()
            own = [next(batches) for _ in range(micro_batches)] if mesh.reads else None
            loaded = time.perf_counter()
            lr = learning_rate(step, config.optimizer, train.steps)
            shared = share(own, micro_batches, train.micro_batch, mesh, engine.device)
            result = stepper.run(shared, lr)
            telemetry.step(step + 1, result, lr, time.perf_counter() - started, loaded - started)
            if result.num_bad_images:
                names = [
                    n
                    for names in mesh.world.gather_objects([r for b in own or () for _, r in b.bad_images])
                    for n in names
                ]
                telemetry.write({"step": step + 1, "bad_images": names})
            if step + 1 == train.steps or (every and (step + 1) % every == 0):
                packs = first_pack + (step + 1 - first_step) * train.global_batch
                known = loader.ledger.to_json() if loader and loader.ledger else {}
                last = checkpoints.save(Progress(step + 1, packs, known))
            for saved in checkpoints.finished():
                log_save(telemetry, saved)
        checkpoints.wait()
        for saved in checkpoints.finished():
            log_save(telemetry, saved)
    assert last is not None
    return last


def log_save(telemetry: Telemetry, saved: Saved) -> None:
    """A line of metrics about a checkpoint: its size, and for how long training stood still."""
    numbers = {"checkpoint_bytes": saved.num_bytes, "checkpoint_stall_seconds": saved.stall_seconds}
    telemetry.write({"step": saved.step, **numbers, "checkpoint_write_seconds": saved.write_seconds})


def _agree(config: Config, run: Path, mesh: Mesh) -> tuple[Path | None, dict[Path, list[str]]]:
    """The checkpoint to resume from, decided by the first process for all, which also finds what is wrong."""

    def decide() -> tuple[Path | None, dict[Path, list[str]]] | str:
        try:
            check(config, mesh.world.size)
            return checkpoint.choose(run, config.checkpoint.resume)
        except ValueError as error:
            return str(error)

    decision = mesh.world.broadcast_object(decide() if mesh.is_first else "")
    if isinstance(decision, str):
        raise RunError(decision)
    return decision


def build_loader(
    config: Config, mesh: Mesh, first_step: int, first_pack: int, ledger: dict[str, Any] | None
) -> PackedLoader:
    """This process's batches from a step on; `ledger`: that of the checkpoint which the run resumes from."""
    vision, language, clip = config.model.vision, config.model.language, config.objective.name == "clip"
    previous = Ledger.from_json(ledger) if ledger is not None else None
    sizes = (config.data, vision.num_patches, language.context_length)
    return PackedLoader(
        config.data,
        num_patches=vision.num_patches,
        image_size=vision.image_size,
        context_length=language.context_length,
        rank=mesh.data.rank,
        world_size=mesh.data.size,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        first_pack=first_pack,
        steps=config.train.steps - first_step,
        objective=config.objective.name,
        ledger=open_ledger(*sizes, contrast_only=clip, previous=previous, consumed=first_pack),
        pin_memory=torch.cuda.is_available(),
    )
