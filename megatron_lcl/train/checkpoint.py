"""Checkpoints: a folder that is complete or is not there.

    RUN/checkpoints/step-00001000/
        state/…              DeepSpeed's own files: parameters, optimizer, one set per rank
        model.safetensors    all parameters in float32, names `{index}.name`: what `load_model` and `export` read
        config.yaml          the run's config
        progress.json        step, packs consumed, the ledger that says which
        manifest.json        size and XXH3 of every file above; written last

Written under a temporary name by all ranks, hashed, fsynced and renamed by the first.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_lcl.config import Checkpoint, Config, to_yaml
from megatron_lcl.data.files import hash_file, sync
from megatron_lcl.parallel.mesh import Mesh, RunError

FOLDER, MANIFEST, PROGRESS, WEIGHTS, CONFIG, STATE = (
    "checkpoints",
    "manifest.json",
    "progress.json",
    "model.safetensors",
    "config.yaml",
    "state",
)


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    """optimizer steps done"""
    packs: int
    """packs consumed"""
    processes: int
    """data-parallel processes that wrote the checkpoint"""
    ledger: dict[str, Any]
    """what the packs depend on (data.index.Ledger.to_json)"""


def save(engine: Any, config: Config, mesh: Mesh, run: Path, progress: Progress) -> Path:
    """Write a checkpoint; every process calls it. Returns its folder.

    RunError where a process cannot write (no space, read-only); it leaves nothing behind.
    """
    final = run / FOLDER / f"step-{progress.step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        if mesh.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        mesh.world.barrier()
        fault = _attempt(lambda: engine.save_checkpoint(str(temporary), tag=STATE, save_latest=False))
        weights = gather_weights(engine)
        if mesh.is_first and fault is None:
            fault = _attempt(lambda: _finish(temporary, final, weights, config, progress))
        _raise_together(fault, mesh)
    except BaseException:
        if mesh.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if mesh.is_first:
        prune(run, config.checkpoint)
    return final


def _attempt(action: Any) -> OSError | None:
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        return error if isinstance(error, OSError) else OSError(str(error).splitlines()[0])
    return None


def _raise_together(fault: OSError | None, mesh: Mesh) -> None:
    for rank, found in enumerate(mesh.world.gather_objects(fault)):
        if found is not None:
            raise RunError(f"process {rank} could not write the checkpoint: {found}")


def _finish(temporary: Path, final: Path, weights: dict[str, torch.Tensor], config: Config, progress: Progress) -> None:
    save_file(weights, temporary / WEIGHTS)
    (temporary / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    (temporary / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {path.relative_to(temporary).as_posix(): _fingerprint(path) for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*files, temporary / MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        sync(path)
    if final.exists():  # the same step saved again after a resume
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync(final.parent)


def gather_weights(engine: Any) -> dict[str, torch.Tensor]:
    """All parameters in float32 on the CPU, on the first process; every process calls it, others get an empty dict."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    first = dist.get_rank() == 0
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter)
        if first:
            weights[name] = (parameter.detach() if value is None else value).float().cpu().contiguous()
    return weights


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, by file; empty if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    faults = []
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif _fingerprint(path) != expected:
            faults.append(f"{name}: changed since it was written")
    return faults


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run / FOLDER).glob(f"step-*/{MANIFEST}"))


def newest(run: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint that verifies (None if there is none), and the faults of those that were passed over."""
    skipped: dict[Path, list[str]] = {}
    for folder in reversed(list_checkpoints(run)):
        faults = verify(folder)
        if not faults:
            return folder, skipped
        skipped[folder] = faults
    return None, skipped


def read_progress(folder: Path) -> Progress:
    """Where the run stood that wrote a checkpoint."""
    return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


def load(engine: Any, folder: Path) -> None:
    """Parameters and optimizer of a checkpoint, at the layout that wrote it."""
    path, _ = engine.load_checkpoint(str(folder), tag=STATE)
    if path is None:
        raise ValueError(f"DeepSpeed could not read {folder / STATE}; it was written at another layout")


def prune(run: Path, config: Checkpoint) -> None:
    """Delete what `keep_last` and `keep_every` do not keep."""
    for folder in list_checkpoints(run)[: -config.keep_last]:
        step = int(folder.name.removeprefix("step-"))
        if not (config.keep_every and step % config.keep_every == 0):
            (folder / MANIFEST).unlink()  # first: what is half deleted must not look complete
            shutil.rmtree(folder)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
