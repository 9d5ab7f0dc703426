"""Checkpoints on disk: a folder that is complete or is not there.

    RUN/checkpoints/step-00001000/
        state/…              DeepSpeed's own files: parameters, optimizer, one set per process
        rng/rank-00000.pt …  random-number generators of each process
        model.safetensors    all parameters in float32, whole, unpadded, named `{index}.name`: what `load_model` reads
        averages/ema_0.999/  an average of the weights, where the run has any: model.safetensors and config.yaml
        config.yaml          the run's config
        progress.json        step, packs consumed, the ledger that says which, layout, code
        manifest.json        size and XXH3 of every file above; written last
        universal/…          only where the run went on at another layout: the same state, for any (see `reshard`)

    RUN/checkpoints/.step-00001000.….universal/   that of another run's checkpoint, until the first save

`checkpointer` writes them, `state` reads what DeepSpeed wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lcl.config import Checkpoint, Config, load
from megatron_lcl.convert.find import checkpoints_in, export_kind, run_of
from megatron_lcl.convert.folder import IMPORT, read_record
from megatron_lcl.convert.manifest import MANIFEST, Unread, verify
from megatron_lcl.errors import UserError, describe_os_error
from megatron_lcl.filesystem import below, exists, is_dir, is_file, matching
from megatron_lcl.run_folder import CHECKPOINTS, CONFIG, PROGRESS

if TYPE_CHECKING:
    from megatron_lcl.data.loading.ledger import Ledger

STATE = "state"
RNG = "rng"
SMALL = (PROGRESS, CONFIG)
"""the files of a checkpoint that say where its run stood"""
_DELETED = ".old"
"""how the name ends of what is being deleted"""
REPLACED = ".replaced"
"""how the name ends of a checkpoint that is about to be replaced by another of the same step"""


@dataclass(frozen=True)
class Layout:
    """What decides how DeepSpeed's files divide the model among processes."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero_stage: int = 1
    dtype: str = "float32"
    partition: tuple[int, ...] = (0,)
    """first layer of each pipeline stage"""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """the config's `deepspeed` section"""
    frozen: tuple[str, ...] = ()
    """`parts.frozen_patterns`: these parameters have no part in the optimizer's files"""

    def __str__(self) -> str:
        axes = [(self.tensor, "tensor"), (self.pipeline, "pipeline"), (self.data, "data")]
        sizes = " x ".join(f"{size} {name}" for size, name in axes if size > 1) or "1 process"
        frozen = f", without {', '.join(self.frozen)}" if self.frozen else ""
        return f"{sizes}, ZeRO-{self.zero_stage}, {self.dtype}{frozen}"

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        """From what `progress.json` holds; older checkpoints call the partition "cuts"."""
        others = {key: item for key, item in value.items() if key not in ("partition", "cuts", "frozen")}
        partition = value["partition" if "partition" in value else "cuts"]
        return cls(**others, partition=tuple(partition), frozen=tuple(value.get("frozen", ())))


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    """optimizer steps done"""
    packs: int
    """packs consumed"""
    ledger: dict[str, Any]
    """what the packs depend on, the corpora's fingerprints among it, and where chunks of packs begin
    (data.loading.ledger.Ledger.to_json)"""
    guard: dict[str, Any] = field(default_factory=dict)
    """what was counted of bad steps (train.resilience.bad_steps.BadSteps.state)"""
    averaged: dict[str, int] = field(default_factory=dict)
    """over how many steps each average of the weights is (train.averages)"""
    contrast: dict[str, Any] = field(default_factory=dict)
    """what `contrast.strategy: auto` came to (train.strategy.Choice); empty where the config names a strategy"""
    parts: dict[str, float] = field(default_factory=dict)
    """weights of the terms of an objective of another package (`objectives.parts_of`); filled in by
    `Checkpointer.save`"""
    layout: Layout = Layout()
    """layout that wrote the checkpoint; filled in by `Checkpointer.save`"""
    code: dict[str, str] = field(default_factory=dict)
    """versions that wrote the checkpoint; filled in by `Checkpointer.save`"""


def progress_text(progress: Progress) -> str:
    """What `progress.json` holds; what was not chosen, and parts of one of our objectives, have no entry."""
    return json.dumps({key: item for key, item in asdict(progress).items() if key not in ("contrast", "parts") or item})


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, once it is complete."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step whose checkpoint a folder is; -1 where it is none."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def read_progress(folder: Path) -> Progress:
    """Where the run stood that wrote a checkpoint. UserError where another version of this format is there."""
    value = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    known = {f.name for f in fields(Progress)}
    if not isinstance(value, dict) or not value.keys() <= known or "layout" not in value:
        raise UserError(f"{folder / PROGRESS} is of another version of megatron_lcl; it should hold {sorted(known)}")
    return Progress(**{**value, "layout": Layout.from_json(value["layout"])})


# --- which one --------------------------------------------------------------------------------------------------


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first. Under their final names they are complete, unless damage came later."""
    return checkpoints_in(run) if is_dir(run / CHECKPOINTS) else []


def last_checkpoint(run: Path) -> Path | None:
    """A run's newest checkpoint whose `progress.json` and `config.yaml` are whole; None where there is none."""
    return newest(list_checkpoints(run), SMALL)[0]


def last_progress(run: Path) -> Progress | None:
    """Where a run stands by its newest checkpoint whose `progress.json` is whole; None where there is none."""
    folder = last_checkpoint(run)
    return None if folder is None else read_progress(folder)


def ledger_of(progress: Progress | None) -> Ledger | None:
    """What the packs of a run that stands there depend on; None where nothing says where it stands."""
    # its compiler takes a while to import, and `checkpoint list` has no use for it
    from megatron_lcl.data.loading.ledger import Ledger

    return Ledger.from_json(progress.ledger) if progress else None


def config_and_progress(path: Path) -> tuple[Config, Progress | None]:
    """The config of a run and where it stands (None: no checkpoint says it): of a run folder, one of its checkpoints,
    or a config file."""
    if not is_dir(path):
        config = load(path)
        return config, last_progress(Path(config.train.output))
    if is_file(path / PROGRESS):
        return load(path / CONFIG), read_progress(path)
    run = run_of(path)
    return load(run / CONFIG), last_progress(run)


def newest(
    folders: list[Path], only: Container[str] | None = None, repair: Callable[[Path], str] | None = None
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The last of these that verifies (None: none does), and the faults of newer ones.

    only: as in `verify`. repair: makes a damaged one whole where it can, and says how, before its faults; else "".
    """
    rejected: dict[Path, list[str]] = {}
    for folder in reversed(folders):
        faults = verify(folder, only=only)
        if not faults:
            return folder, rejected
        repaired = repair(folder) if repair else ""
        rejected[folder] = [repaired, *faults] if repaired else faults
        if repaired:
            return folder, rejected
    return None, rejected


def choose(
    run: Path,
    resume: str,
    mirror: str | None = None,
    only: Container[str] | None = None,
    repair: Callable[[Path], str] | None = None,
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The checkpoint to go on from by `checkpoint.resume` (None: none) and those rejected, with their faults.

    mirror: where copies are (`checkpoint.mirror`), which a run without checkpoints of its own goes on from. only: the
    files by which it is decided whether one is whole; None: all. repair: as in `newest`, for the run's own.

    A run that has checkpoints of its own goes on from them whatever `resume` is, so that a job that is started again
    by the same command goes on where it stopped. UserError where all of them are damaged (weeks of work are not begun
    anew silently), or the one that `resume` names is; and where that is one of its own before the newest.
    """
    folder, rejected = newest(list_checkpoints(run), only, repair)
    _check_named_is_newest(run, resume, folder)
    if folder is None and rejected:
        latest, faults = next(iter(rejected.items()))
        unread = any(isinstance(fault, Unread) for faults in rejected.values() for fault in faults)
        then = "begin anew" if mirror is None else f"go on from the newest whole copy in {mirror}, if there is one"
        remedy = "look at the storage: some cannot be read" if unread else f"restore one, or remove them to {then}"
        raise UserError(
            f"no checkpoint in {run / CHECKPOINTS} is whole ({latest.name}: {'; '.join(faults[:3])}); {remedy}"
        )
    if folder is not None or resume == "auto":
        return folder, rejected
    folder, rejected = newest(named := resumable(resume), only)
    if folder is None:
        faults = rejected[named[-1]]
        raise UserError(f"checkpoint.resume = {resume} is not a whole checkpoint: {'; '.join(faults[:3])}")
    return folder, rejected


def _check_named_is_newest(run: Path, resume: str, folder: Path | None) -> None:
    """UserError where `resume` names a checkpoint of the run itself, and the run has a later one, `folder`; unless it
    is this very command that has gone on from the named one and made the later one, and is now started again."""
    named = Path(resume)
    if folder is None or named.resolve().parent != (run / CHECKPOINTS).resolve():
        return
    if 0 <= step_of(named) < step_of(folder) and load(folder / CONFIG).checkpoint.resume != resume:
        raise UserError(
            f"checkpoint.resume = {resume} is of this run, which has {folder.name} and goes on from that; to go back, "
            "remove the later ones, or name another train.output"
        )


def go_back(run: Path, step: int, begun_with: Path | None) -> tuple[Path | None, dict[Path, list[str]]]:
    """The checkpoint to which a run goes back whose steps after `step` were bad, as `newest`; later ones are deleted.

    Where none from before them is whole, one that was saved between them will do: they have changed nothing. Where
    there is none at all, nothing is deleted. begun_with: the checkpoint with which this process began, which may be
    another run's.
    """
    with contextlib.suppress(OSError):
        put_back(run / CHECKPOINTS)  # after a save that failed
    own = list_checkpoints(run)
    before, between = ([f for f in own if (step_of(f) <= step) is wanted] for wanted in (True, False))
    others = [f for f in [begun_with] if f is not None and f not in own and is_dir(f)]
    folder, faults = newest([*between, *others, *before])
    for later in between if folder is not None else ():
        if folder not in between or step_of(later) > step_of(folder):
            delete(later)
    return folder, faults


def resumable(resume: str) -> list[Path]:
    """The checkpoints that `checkpoint.resume` names, oldest first: a run's, or one. UserError where it names none."""
    named = Path(resume)
    kind = "import" if read_record(named, IMPORT) else export_kind(named)
    if kind or is_file(named):
        what = "a file" if kind is None else "an import" if kind == IMPORT else f"an export to {kind}"
        raise UserError(
            f"checkpoint.resume = {resume} is {what}: weights alone, without an optimizer and a place in the data; "
            f"begin with them by --train.init_from {resume}"
        )
    found = checkpoints_in(named) or [named] * is_file(named / MANIFEST)  # one that was renamed
    if not found:
        raise UserError(f"checkpoint.resume = {resume} holds no checkpoint; name a run's folder, or a checkpoint")
    return found


# --- what is kept ------------------------------------------------------------------------------------------------


def superseded(folders: list[Path], keep: Checkpoint) -> list[Path]:
    """Those of a run's checkpoints (oldest first) that `keep_last` and `keep_every` do not keep."""
    older = folders[: -keep.keep_last]
    return [f for f in older if not (keep.keep_every and step_of(f) % keep.keep_every == 0)]


def tidy(run: Path, keep: Checkpoint | None, step: int) -> list[str]:
    """Delete what is not kept of a run's checkpoints, as far as that can be; what could not be deleted, and why.

    keep: None: all are kept, and only what was interrupted is removed. step: of the checkpoint that was just saved;
    later ones are damaged, or of steps from which the run has gone back: they stay, and do not count.
    """
    faults: list[str] = []
    up_to_step = [folder for folder in list_checkpoints(run) if step_of(folder) <= step]
    for folder in superseded(up_to_step, keep) if keep else ():
        try:
            set_aside(folder)
        except OSError as error:
            faults.append(f"{folder}: {error.strerror}")
    return faults + clear_leftovers(run / CHECKPOINTS)


def give_name(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its final name. One of the same step that is there goes, and not before."""
    replaced = final.with_name(f".{final.name}{REPLACED}")
    if exists(final):
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        put_back(final.parent)
        raise
    if exists(replaced):
        set_aside(replaced)


def put_back(folder: Path) -> None:
    """Give a checkpoint its name again that was to be replaced by another of its step, where that was interrupted."""
    for replaced, final in _without_successor(folder).items():
        replaced.rename(final)


def _without_successor(folder: Path) -> dict[Path, Path]:
    """Checkpoints that were to be replaced by others of their steps, which are not there, and their names before."""
    names = {
        replaced: replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
        for replaced in matching(folder, f".step-*{REPLACED}")
    }
    return {replaced: final for replaced, final in names.items() if not exists(final)}


def set_aside(folder: Path) -> Path:
    """Rename a folder so that it is no checkpoint, but what `clear_leftovers` removes; the name, which no other has."""
    return folder.rename(folder.with_name(f".{folder.name.lstrip('.')}.{time.time_ns()}{_DELETED}"))


def delete(folder: Path) -> list[str]:
    """Delete a checkpoint; where that is interrupted, what is left does not look like one. As `clear_leftovers`."""
    return remove(set_aside(folder))


def half_deleted(folder: Path) -> list[Path]:
    """What deletions that were interrupted, or are at work, have left in a run's folder of checkpoints; nothing that a
    save writes or puts back."""
    return matching(folder, f".step-*{_DELETED}")


def clear_leftovers(folder: Path) -> list[str]:
    """Remove what was left in a run's folder of checkpoints by a save or a deletion that was interrupted. A checkpoint
    that was to be replaced gets its name back (`put_back`), or stays where even that fails.

    What cannot be removed, and why: on NFS a file that anybody has open stays until it is closed. A later call may.
    """
    with contextlib.suppress(OSError):
        put_back(folder)
    return [fault for leftover in _leftovers(folder) for fault in remove(leftover)]


def leftover_bytes(folder: Path) -> int:
    """The size of what `clear_leftovers` would remove, as far as it can be looked at and stays meanwhile."""
    total = 0
    for leftover in _leftovers(folder):
        with contextlib.suppress(OSError):
            total += sum(file.lstat().st_size for file in below(leftover))
    return total


def _leftovers(folder: Path) -> list[Path]:
    """What is to be removed: not a checkpoint without a successor, which is perhaps the last good one."""
    kept = _without_successor(folder)
    return [path for path in matching(folder, ".step-*") if path not in kept]


def remove(folder: Path) -> list[str]:
    """Remove a folder, or what another process that is at it leaves of it; what cannot be removed, and why."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # whatever else of it can go
        return [describe_os_error(error, folder)] if os.path.lexists(folder) else []
    return []
