"""Where a run begins or goes on: decided by the first process, after it has checked everything, for all of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_lcl import objectives
from megatron_lcl.config import Config, to_yaml
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.loading.ledger import Ledger, open_run_ledger
from megatron_lcl.errors import RunError, UserError, describe_os_error
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.changes import Changes, changes_since
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.checkpoint.initial_weights import InitialWeights, find_initial_weights
from megatron_lcl.train.checks import check, check_corpora, check_model, check_output, check_space, without_pairs
from megatron_lcl.train.memory import check_memory, local_processes
from megatron_lcl.train.resilience.lock import lock_run_folder


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins or goes on, and with what."""

    folder: Path | None
    """checkpoint; None: a new run"""
    progress: Progress
    """with the ledger from here on"""
    rejected: dict[Path, list[str]]
    """newer checkpoints that are damaged, and how"""
    deepspeed: dict[str, Any]
    """DeepSpeed's config"""
    weights: InitialWeights | None = None
    """what a new run begins with; None: with what is drawn"""
    without_pairs: tuple[str, ...] = ()
    """corpora that give the contrast no pair"""
    changes: Changes = field(default_factory=Changes)
    """since the checkpoint was written"""


def resolve_resume_point(config: Config, mesh: Mesh, until_end: contextlib.ExitStack) -> ResumePoint:
    """Decided by the first process for all, which also finds what is wrong: RunError on all.

    until_end: takes the first process's lock on the run folder.
    """

    def decide() -> ResumePoint | str:
        try:
            settings = check(config, mesh.world.size)
            until_end.enter_context(lock_run_folder(Path(config.train.output)))
            check_space(config)  # again: it is there now, and others write too
            point = _resolve(config, settings)
            ledger = Ledger.from_json(point.progress.ledger)
            readings = [ledger.reading_at(phase.first, phase.config)[0] for phase in phases_of(config)]
            slots = [reading.images_per_pack or 1 for reading in readings]
            check_memory(config, mesh.world.size, local_processes(mesh.world.size), slots)
            return point
        except UserError as error:
            return str(error)
        except OSError as error:
            return describe_os_error(error, config.train.output)

    decision = mesh.world.broadcast_object(decide() if mesh.is_first else "")
    if isinstance(decision, str):
        raise RunError(decision)
    return decision


def _resolve(config: Config, settings: dict[str, Any]) -> ResumePoint:
    run = Path(config.train.output)
    check_output(run, config)  # again: another run may have begun there before it was locked
    folder, rejected = checkpoint.choose(run, config.checkpoint.resume)
    saved, previous = Progress(0, 0, {}), None
    if folder:
        check_model(folder / CONFIG, config)
        saved = checkpoint.read_progress(folder)
        previous = Ledger.from_json(saved.ledger)
        check_corpora(previous, config)
    ledger = open_run_ledger(config, objectives.create(config).sequences, previous, saved.step, saved.packs)
    replace_text(run / CONFIG, to_yaml(config))
    return ResumePoint(
        folder,
        replace(saved, ledger=ledger.to_json()),
        rejected,
        settings,
        find_initial_weights(config) if folder is None else None,
        without_pairs(config),
        changes_since(folder, config) if folder else Changes(),
    )
