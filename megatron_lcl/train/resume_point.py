"""Where a run begins or goes on: decided by the first process, after it has checked everything, for all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_lcl import objectives
from megatron_lcl.config import Config, run_yaml
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.loading.ledger import Ledger, begins_other_blend, open_run_ledger
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import RunError, UserError, complain, describe_os_error
from megatron_lcl.filesystem import exists
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.run_folder import CHECKPOINTS, CONFIG
from megatron_lcl.train.changes import CORPORA, BlendChange, Changes, changes_since
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.checkpoint.initial_weights import InitialWeights, find_initial_weights
from megatron_lcl.train.checkpoint.mirror import Mirror, resumed
from megatron_lcl.train.checks import (
    check,
    check_corpora,
    check_model,
    check_output,
    check_readable,
    check_space,
    without_pairs,
)
from megatron_lcl.train.fastest import kept_kernels
from megatron_lcl.train.finished import has_all_steps, has_last_evaluation
from megatron_lcl.train.fits import check_memory, check_step
from megatron_lcl.train.forks import stop_forkserver
from megatron_lcl.train.heldout import other_rules
from megatron_lcl.train.memory import Memory, available, slots_of
from megatron_lcl.train.resilience.faults import node
from megatron_lcl.train.resilience.lock import holder_of, lock_run_folder, sees_lock
from megatron_lcl.train.resilience.signals import Signals
from megatron_lcl.train.resilience.watchdog import Watchdog
from megatron_lcl.train.strategy import Choice, choose_strategy, with_choice
from megatron_lcl.train.telemetry.lines import set_metrics_aside

T = TypeVar("T")


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins or goes on, and with what."""

    folder: Path | None
    """checkpoint; None: a new run"""
    progress: Progress
    """with the ledger from here on"""
    rejected: dict[Path, list[str]]
    """newer checkpoints that are damaged, and how; with `folder` where that was repaired"""
    deepspeed: dict[str, Any]
    """DeepSpeed's config"""
    config: Config
    """the run's, with what `contrast.strategy: auto` came to, and the kernels of the checkpoint's run"""
    weights: InitialWeights | None = None
    """what a new run begins with; None: with what is drawn"""
    without_pairs: dict[str, str] = field(default_factory=dict)
    """corpora that give the contrast no pair, and when: see `checks.without_pairs`"""
    changes: Changes = field(default_factory=Changes)
    """since the checkpoint was written"""
    choice: Choice | None = None
    """that, with its numbers; None where the config names a strategy"""
    measure_kernels: bool = False
    """whether kernels are still to be measured"""
    is_evaluated: bool = False
    """whether the evaluation after the last step has been made"""


@dataclass(frozen=True)
class Origin:
    """What a run goes on from, which fits it; of a new run the begin."""

    folder: Path | None
    progress: Progress
    """as it was saved"""
    previous: Ledger | None
    """as it was saved"""
    ledger: Ledger
    """from here on"""
    finished: bool
    """all steps are made"""

    def changes(self, config: Config) -> Changes:
        """Since the checkpoint was written."""
        if self.folder is None or self.previous is None:
            return Changes()
        found, blend = changes_since(self.folder, config), BlendChange.between(self.previous, self.ledger)
        is_other = begins_other_blend(self.previous, self.ledger)
        # else corpora have been moved, or stand in another order, or all weights are larger
        without = found.without_effect if is_other else (*found.without_effect, CORPORA)
        found = replace(found, blend=blend, without_effect=without, new_loss=found.new_loss or is_other)
        is_own = self.folder.parent.resolve() == (Path(config.train.output) / CHECKPOINTS).resolve()
        if is_own and not (self.finished and has_last_evaluation(config)):
            found = replace(found, warnings=(*found.warnings, *other_rules(config, self.progress.step)))
        return found


def open_origin(folder: Path | None, config: Config, is_own: bool) -> Origin:
    """What a run with `config` goes on from; nothing of the checkpoint is read but its config and its progress.

    is_own: the checkpoint is of the run itself. UserError where the run cannot go on from it.
    """
    if folder is None:
        start = Progress(0, 0, {})
        return Origin(None, start, None, ledger_from(config, start, None), False)
    check_model(folder / CONFIG, config)
    progress = checkpoint.read_progress(folder)
    finished = has_all_steps(folder, config, is_own)
    previous = Ledger.from_json(progress.ledger)
    check_corpora(previous, config)
    ledger = ledger_from(config, progress, previous)
    if not finished:
        check_readable(ledger, config, progress.packs)
    return Origin(folder, progress, previous, ledger, finished)


def resolve_resume_point(
    config: Config, mesh: Mesh, until_end: contextlib.ExitStack, signals: Signals, watchdog: Watchdog
) -> ResumePoint:
    """Decided by the first process for all, which also finds what is wrong: RunError on all.

    until_end: takes the first process's lock on the run folder. signals: an OSError after one is no user's. watchdog:
    watches this process.
    """
    hosts = mesh.world.gather_objects(node())
    everywhere = mesh.world.gather_objects(available(_local_processes(hosts)))
    has = replace(
        min(everywhere, key=lambda memory: memory.size),
        shared=min(memory.shared for memory in everywhere),
        local=max(memory.local for memory in everywhere),
    )

    run = Path(config.train.output)

    def lock() -> tuple[dict[str, Any], str]:
        settings = check(config, mesh.world.size, everywhere[0].local)
        until_end.enter_context(lock_run_folder(run))
        checkpoint.clear_leftovers(run / CHECKPOINTS)  # as the first save does, for which there is to be room
        check_space(config, mesh.world.size)  # again: it is there now, and others write too
        return settings, holder_of(run)

    settings, holder = _on_first(lock, config, mesh, signals)
    # before anything is written there or claimed for the run
    _check_shared(config, mesh, hosts, holder, watchdog.left())
    return _on_first(lambda: _resolve(config, settings, mesh.world.size, has), config, mesh, signals)


def _on_first(action: Callable[[], T], config: Config, mesh: Mesh, signals: Signals) -> T:
    """What the first process finds, on all; RunError on all where a user has something to mend."""
    found: tuple[T | None, str | None] = None, None
    if mesh.is_first:
        try:
            found = action(), None
        except UserError as error:
            found = None, str(error)
        except OSError as error:
            if signals.received:  # it has ended the server of simulations, say
                raise
            found = None, describe_os_error(error, config.train.output)
    result, fault = mesh.world.broadcast_object(found)
    if fault is not None:
        raise RunError(fault)
    return result  # type: ignore[return-value]


def _local_processes(hosts: list[str]) -> int:
    """How many of the run's processes are on this machine. hosts: the machine of each process."""
    # DeepSpeed's launcher has a name of its own
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or hosts.count(node()))


def _check_shared(config: Config, mesh: Mesh, hosts: list[str], holder: str, at_most: float) -> None:
    """RunError on all processes where a machine does not see the run folder that the first process has locked.

    holder: what that process has written into the lock file. at_most: seconds for which to wait until that is seen.
    """
    if len(set(hosts)) == 1:
        return
    run, rank = Path(config.train.output), mesh.world.rank
    one_of_each = hosts.index(hosts[rank]) == rank
    sees = not one_of_each or sees_lock(run, holder, at_most)
    if blind := [host for host, does in zip(hosts, mesh.world.gather_objects(sees), strict=True) if not does]:
        raise RunError(
            f"train.output = {run} is another folder on {', '.join(blind)} than on {hosts[0]}, where the run's first "
            "process is, and every process writes its part of a checkpoint there; name a folder that all nodes share"
        )


def _resolve(config: Config, settings: dict[str, Any], processes: int, has: Memory) -> ResumePoint:
    run = Path(config.train.output)
    check_output(run, config)  # again: another run may have begun there before it was locked
    checkpoint.put_back(run / CHECKPOINTS)
    mirror = source = Mirror(config.checkpoint.mirror) if config.checkpoint.mirror is not None else None
    owner = mirror.check_owner(config.train.output) if mirror else None
    restored = mirror.restore(run) if mirror else None
    is_own = bool(checkpoint.list_checkpoints(run))  # what the run goes on from, if anything
    if not is_own and (source := resumed(config.checkpoint.resume)):
        _set_metrics_aside(run)  # before: should this start not come to its end, the next one finds the checkpoint here
        restored = source.restore(run)
    try:
        point = _from(run, config, settings, processes, has, is_own)
    except UserError as error:
        if not (source and restored):
            raise
        shutil.rmtree(restored)  # it does not fit this run, which is not to find it as its own
        raise UserError(str(error).replace(str(restored), f"{source.store.url}/{restored.name}")) from None
    if mirror:  # not before: a start that is refused leaves the place to others
        mirror.claim(config.train.output, owner)
    if not is_own:
        _set_metrics_aside(run)
    return point


def _set_metrics_aside(run: Path) -> None:
    """As `set_metrics_aside`, and say so, once for all: a later start finds nothing to say."""
    if aside := set_metrics_aside(run):
        complain(f"megatron-lcl: {aside}")


def _from(
    run: Path, config: Config, settings: dict[str, Any], processes: int, has: Memory, is_own: bool
) -> ResumePoint:
    resume = "auto" if url_of(config.checkpoint.resume) else config.checkpoint.resume  # which lies in the run by now
    repair = Mirror(config.checkpoint.mirror).repair if config.checkpoint.mirror is not None else None
    folder, rejected = checkpoint.choose(run, resume, config.checkpoint.mirror, repair=repair)
    kept = kept_kernels(config, folder)
    config = kept or config
    origin = open_origin(folder, config, is_own)
    saved, ledger, finished = origin.progress, origin.ledger, origin.finished
    slots = slots_of(ledger, config)
    check_memory(config, processes, has, slots)
    choice = choose_strategy(config, processes, has, slots, saved if folder else None)
    config, progress = with_choice(config, replace(saved, ledger=ledger.to_json()), choice)
    simulated = bool(choice and choice.needs)
    if not (folder or (choice and choice.is_simulated)):
        simulated |= check_step(config, processes, has, slots)
    if simulated:
        stop_forkserver()
    if not (finished and exists(run / CONFIG)):  # which says what was trained
        replace_text(run / CONFIG, run_yaml(config))
    return ResumePoint(
        folder,
        progress,
        rejected,
        settings,
        config,
        find_initial_weights(config) if folder is None else None,
        without_pairs(config),
        origin.changes(config),
        choice,
        measure_kernels=config.train.measure_kernels and kept is None and not finished,
        is_evaluated=finished and has_last_evaluation(config),
    )


def ledger_from(config: Config, saved: Progress, previous: Ledger | None) -> Ledger:
    """The ledger of a run that goes on from where `saved` is, with the steps to come as the config says. previous: with
    what is known of the packs by now. UserError as `open_run_ledger`."""
    return open_run_ledger(config, objectives.create(config).sequences, previous, saved.step, saved.packs)
