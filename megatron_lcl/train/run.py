"""A training run, from config to final checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lcl import objectives
from megatron_lcl.config import Config, load, to_dict, to_yaml
from megatron_lcl.convert.folder import IMPORT, read_record
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.contrast import corpora_without_pairs
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.pack_index import Ledger, open_ledger
from megatron_lcl.data.loading.summary import summarize
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.apex import check_apex
from megatron_lcl.train.broadcast_batches import broadcast_batches
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.checkpointer import Checkpointer
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.checkpoint.initial_weights import InitialWeights, find_initial_weights
from megatron_lcl.train.checkpoint.saver import Saver
from megatron_lcl.train.determinism import check_determinism, determinism
from megatron_lcl.train.engine import (
    DTYPES,
    build_engine,
    build_module,
    build_stepper,
    deepspeed_config,
    init_processes,
    resolve_dtype,
    specs_of,
)
from megatron_lcl.train.heldout import HeldOutMeter, check_heldout
from megatron_lcl.train.kernels import check_kernels, choose_kernels, describe
from megatron_lcl.train.layout import num_micro_batches
from megatron_lcl.train.memory import check_memory, local_processes
from megatron_lcl.train.optimizer import learning_rate
from megatron_lcl.train.pipeline.partition import choose_partition
from megatron_lcl.train.resilience.audit import Audit
from megatron_lcl.train.resilience.bad_steps import BadSteps
from megatron_lcl.train.resilience.faults import lost
from megatron_lcl.train.resilience.lock import alone_in
from megatron_lcl.train.resilience.replicas import find_difference
from megatron_lcl.train.resilience.signals import Signals, Stopped
from megatron_lcl.train.resilience.watchdog import Watchdog
from megatron_lcl.train.telemetry import Telemetry

CONFIG = "config.yaml"


def check(config: Config, processes: int, nodes: int = 1, elsewhere: bool = False) -> None:
    """Everything that can be known to be wrong before anything starts: UserError with one line.

    elsewhere: the run's devices are not this machine's, as where a dry run is made on a login node.
    """
    objectives.create(config)
    if not config.data.corpora:
        raise UserError("data.corpora is empty; name a corpus that `megatron-lcl preprocess` wrote: --data.corpora DIR")
    deepspeed_config(config, processes)
    check_apex(config)
    check_kernels(config, elsewhere)
    check_determinism(config)
    if not elsewhere:
        check_memory(config, processes, local_processes(processes, nodes))
    for corpus in config.data.corpora:
        opened = open_corpus(corpus.path)
        opened.check_sizes()
        tokenizer = opened.tokenizer
        if tokenizer.vocab_size != config.model.language.vocab_size:
            raise UserError(
                f"model.language.vocab_size is {config.model.language.vocab_size}, but the tokenizer of {corpus.path} "
                f"has {tokenizer.vocab_size} ids; set model.language.vocab_size to {tokenizer.vocab_size}"
            )
    check_heldout(config)
    without_pairs(config)
    check_output(Path(config.train.output), config)
    if not checkpoint.list_checkpoints(Path(config.train.output)):
        check_beginning(config)


def check_beginning(config: Config) -> None:
    """What a run that has no checkpoint of its own is to begin with can be had; UserError where it cannot."""
    if config.train.init_from is None:
        return
    if config.checkpoint.resume != "auto":
        raise UserError(
            f"checkpoint.resume = {config.checkpoint.resume} and train.init_from = {config.train.init_from}: a run "
            "goes on from the one or begins with the weights of the other; give one of the two"
        )
    find_initial_weights(config, verify=False)


def without_pairs(config: Config) -> tuple[str, ...]:
    """The corpora that give the objective's contrast nothing; UserError where all of them do."""
    model = config.model
    return corpora_without_pairs(
        config.data,
        model.vision.num_patches,
        model.language.context_length,
        objectives.create(config).sequences,
        config.objective.name,
    )


def check_output(run: Path, config: Config) -> None:
    """A run folder is new, empty, or holds the same run; UserError names what differs."""
    saved = run / CONFIG
    if run.exists() and not run.is_dir():
        raise UserError(f"train.output = {run} is a file; name a folder")
    if read_record(run, IMPORT):
        raise UserError(f"train.output = {run} is an import; name another folder, and this one as train.init_from")
    if not saved.exists():
        if run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
            raise UserError(f"train.output = {run} holds other files and no {CONFIG}; name a new or an empty folder")
        return
    check_model(saved, config)


def check_model(saved: Path, config: Config) -> None:
    """The model is that of a saved config; UserError names the fields that differ."""
    before, now = (_flat(to_dict(c)) for c in (load(saved), config))
    changed = sorted(k for k in before.keys() | now.keys() if k.startswith("model.") and before.get(k) != now.get(k))
    if changed:
        raise UserError(
            f"{saved.parent} holds a run of another model ("
            + ", ".join(f"{k} {before.get(k)} → {now.get(k)}" for k in changed)
            + "); name another folder"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@lost()
def train(config: Config, signals: Signals | None = None) -> Path:
    """Run (or go on with) the training that `config` describes; the final checkpoint's folder.

    Every process of the launch calls it. Goes on from the newest checkpoint in `train.output` that verifies. Raises
    `signals.Stopped` where a signal asked for the end and all is saved; RunError on every process where the run cannot
    go on, SystemExit where this machine or the network has failed (`faults`). A process that dies or hangs ends the
    others: see `watch`.

    signals: where they have been listened for since before the call.
    """
    if signals is None:
        with Signals() as signals:
            return train(config, signals)
    with determinism(config.train.deterministic):
        return _train(config, signals)


def _train(config: Config, signals: Signals) -> Path:
    mesh = init_processes(config)
    try:
        with Watchdog(mesh, config.guard.timeout, config.guard.long_timeout) as watch, contextlib.ExitStack() as held:
            start = agree(config, mesh, held)
            module = build_module(config, mesh, pipeline_partition(config, mesh, start), start.weights)
            engine = build_engine(module, config, mesh)
            run = Path(config.train.output)
            with (
                Telemetry(run, config, mesh.is_first, start.progress.step) as telemetry,
                Checkpointer(engine, config, mesh, run) as checkpoints,
            ):
                return Training(config, mesh, engine, start, telemetry, checkpoints, signals, watch).run()
    finally:
        dist.destroy_process_group()


class Training:
    """A run between two steps, and what happens beside the steps. Every process has one and all do the same."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        engine: Any,
        start: Start,
        telemetry: Telemetry,
        checkpoints: Checkpointer,
        signals: Signals,
        watch: Watchdog,
    ) -> None:
        self.config, self.mesh, self.engine, self.start = config, mesh, engine, start
        self.telemetry, self.signals, self.watch = telemetry, signals, watch
        self.checkpoints, self.stepper = checkpoints, build_stepper(engine, config, mesh)
        self.audit = Audit(Path(config.train.output), mesh.is_first)
        self.saver = Saver(checkpoints, config.checkpoint, telemetry, self.audit)
        self.bad = BadSteps(config.guard, start.progress.guard)
        self.heldout: HeldOutMeter | None = None
        if config.train.evaluate_every:
            self.heldout = HeldOutMeter(config, mesh, self.stepper, engine.device, telemetry, self._stop_requested)
        self.micro_batches = num_micro_batches(config, mesh.data.size)
        self.progress, self.ledger = start.progress, Ledger.from_json(start.progress.ledger)
        self.loader: PackedLoader | None = None
        self.batches: Iterator[PackedBatch] = iter(())
        self._passed_over(start.passed_over)
        for path in start.without_pairs:
            telemetry.say(f"{path} gives the contrast no pair")
        self._go_to(start.folder, start.progress)
        if start.folder:
            self.saver.step, self.saver.folder = start.progress.step, start.folder
            telemetry.say(f"going on from {start.folder}")
        elif start.weights:
            telemetry.say(start.weights.said(config))
            facts = {"missing": start.weights.missing, "unused": start.weights.unused}
            self.audit.write("initial weights", 0, path=str(start.weights.path), **facts)
        if self.loader and mesh.is_first:
            summary = summarize(self.loader, self.progress.packs, config.data.images_per_pack is None)
            telemetry.say(f"packs: {summary}")
            telemetry.write({"step": self.progress.step, **summary.numbers()})

    def run(self) -> Path:
        """All steps that are left; the final checkpoint's folder."""
        if self.progress.step < self.config.train.steps:
            self._say_kernels()
        while self.progress.step < self.config.train.steps:
            self._stop_if_asked()
            self._step()
            if self.bad.too_many:
                self._rewind()
            else:
                self._after_step()
        self.saver.finish_pending()
        if self.saver.step != self.progress.step:
            raise RunError(f"{self.saver.fault}; all steps are done, but {self.saver.last}")
        return self.saver.folder

    def _say_kernels(self) -> None:
        kernels = choose_kernels(self.config)
        for line in describe(kernels, self.mesh):
            self.telemetry.say(line)
        self.telemetry.write({"step": self.progress.step, **kernels.facts()})

    def _step(self) -> None:
        config, mesh, step = self.config, self.mesh, self.progress.step
        self.watch.heartbeat(step, "reading data")
        started = time.perf_counter()
        own = [next(self.batches) for _ in range(self.micro_batches)] if mesh.loads_data else None
        loaded = time.perf_counter()
        self.watch.heartbeat(step, "computing")
        lr = learning_rate(step, config.optimizer, config.train.steps)
        scale = float(self.engine.optimizer.loss_scale) if resolve_dtype(config) == "float16" else 1.0
        shared = broadcast_batches(own, self.micro_batches, config.train.micro_batch, mesh, self.engine.device)
        result = self.stepper.run(shared, lr, self.bad.limit())
        at, applied = (step, self.progress.packs), self.engine.was_step_applied()
        skipped = self.bad.record(at, result.loss, applied, scale)
        self.telemetry.step(step + 1, result, lr, time.perf_counter() - started, loaded - started, skipped)
        if skipped:
            packs = [self.ledger.locate(self.progress.packs + i) for i in range(config.train.global_batch)]
            self.audit.write("step left out", step + 1, reason=skipped, packs=packs)
        if result.num_bad_images:
            reasons = mesh.world.gather_objects([reason for b in own or () for _, reason in b.bad_images])
            self.telemetry.bad_images(step + 1, list(itertools.chain.from_iterable(reasons)))
        self.progress = replace(self.progress, step=step + 1, packs=self.progress.packs + config.train.global_batch)

    def _after_step(self) -> None:
        step, every, compare = self.progress.step, self.config.checkpoint.every, self.config.guard.every
        last = step == self.config.train.steps
        if last or (every and step % every == 0 and not self.bad.consecutive):  # amid bad steps nothing good is saved
            self._save()
        elif compare and step % compare == 0:
            self._compare_replicas()
        if self.heldout and (last or step % self.config.train.evaluate_every == 0):
            with self.watch.long_phase(step, "evaluating"):
                self.heldout.measure(step)

    def _save(self) -> None:
        self._compare_replicas()
        if not self.bad.consecutive:
            self.bad.rewinds = 0
        if self.loader:
            self.ledger = self.loader.ledger_after(self.progress.packs)
            self.progress = replace(self.progress, ledger=self.ledger.to_json())
        with self.watch.long_phase(self.progress.step, "saving"):
            self.saver.save(replace(self.progress, guard=self.bad.state()))

    def _compare_replicas(self) -> None:
        if not self.config.guard.every or self.mesh.data_tensor.size == 1:
            return
        found = find_difference(self.engine.module, self.mesh)
        if found is not None:
            self.audit.write("replicas differ", self.progress.step, reason=found)
            raise RunError(
                f"the replicas of the model differ after step {self.progress.step}: {found}. A machine computes or "
                "stores wrongly; leave it out, and the same command goes on from the last checkpoint"
            )

    def _stop_requested(self) -> int:
        """The signal that any process has received, 0 for none; the same on all, which ask together."""
        flags = torch.tensor([self.signals.received, self.checkpoints.writing], device=self.engine.device)
        signum, writing = self.mesh.world.all_reduce(flags, dist.ReduceOp.MAX).tolist()
        if not writing:
            self.saver.finish_pending()
        return signum

    def _stop_if_asked(self) -> None:
        step, signum = self.progress.step, self._stop_requested()
        if not signum:
            return
        with self.watch.long_phase(step, "saving before the end"):
            self.saver.finish_pending()
            if self.saver.step != step:
                self._save()
            self.saver.finish_pending()
        self.audit.write("stopped", step, signal=signum, saved=self.saver.step)
        raise Stopped(signum, step, self.saver.step)

    def _rewind(self) -> None:
        """Back to the last checkpoint before the bad steps; their packs are jumped over from then on."""
        at, (step, packs), run = self.progress.step, self.bad.began, Path(self.config.train.output)
        with self.watch.long_phase(at, "rewinding"):
            self.saver.finish_pending()

            def decide() -> tuple[Path | None, dict[Path, list[str]]]:
                own = checkpoint.list_checkpoints(run)
                for folder in own:
                    if checkpoint.step_of(folder) > step:  # saved amid bad steps, when a signal came
                        checkpoint.delete(folder)
                before = [f for f in own if checkpoint.step_of(f) <= step] or [f for f in [self.start.folder] if f]
                return checkpoint.newest(before)

            folder, faults = self.mesh.world.broadcast_object(decide() if self.mesh.is_first else (None, {}))
            self._passed_over(faults)
            if folder is None:
                raise RunError(
                    f"steps {step + 1} to {at} were bad, and there is no checkpoint before them to go back to; "
                    "audit.jsonl says why. Lower optimizer.lr, or look at the packs with `replay`"
                )
            ledger = self.ledger.skip(packs, self.progress.packs - packs)
            before = checkpoint.read_progress(folder)
            self.bad.rewind(before.guard, at)
            self.audit.write("rewind", at, to=before.step, folder=str(folder), skip=ledger.entries[-1])
            self.telemetry.say(f"steps {step + 1} to {at} were bad: back to {folder}, without their packs")
            self._go_to(folder, replace(before, ledger=ledger.to_json()))
            self.telemetry.rewind(before.step)
        self.saver.step, self.saver.folder = before.step, folder

    def _passed_over(self, faults: dict[Path, list[str]]) -> None:
        for folder, wrong in faults.items():
            self.audit.write("checkpoint passed over", self.progress.step, folder=str(folder), faults=wrong)
            self.telemetry.say(f"passed over {folder}: {'; '.join(wrong[:3])}")

    def _go_to(self, folder: Path | None, progress: Progress) -> None:
        """Parameters, optimizer and generators of a checkpoint (None: as they are), and its place in the data."""
        self.batches = iter(())  # the loader processes end
        self.progress, self.ledger = progress, Ledger.from_json(progress.ledger)
        for message in self.checkpoints.load(folder) if folder else ():
            self.telemetry.say(message)
        if self.mesh.loads_data:
            self.loader = build_loader(self.config, self.mesh, progress.step, progress.packs, self.ledger)
            self.batches = iter(self.loader)


# --- where to begin ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on."""

    folder: Path | None
    """checkpoint; None: a new run"""
    progress: Progress
    """with the ledger from here on"""
    passed_over: dict[Path, list[str]]
    """newer checkpoints that are damaged, and how"""
    weights: InitialWeights | None = None
    """what a new run begins with; None: with what is drawn"""
    without_pairs: tuple[str, ...] = ()
    """corpora that give the contrast nothing"""


def agree(config: Config, mesh: Mesh, held: contextlib.ExitStack) -> Start:
    """Decided by the first process for all, which also finds what is wrong: RunError on all.

    held: takes the first process's lock on the run folder.
    """

    def decide() -> Start | str:
        try:
            check(config, mesh.world.size)
            held.enter_context(alone_in(Path(config.train.output)))
            start = _decide(config)
            images = Ledger.from_json(start.progress.ledger).settings["images_per_pack"]
            check_memory(config, mesh.world.size, local_processes(mesh.world.size), images)
            return start
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{error.filename}: {error.strerror}"

    decision = mesh.world.broadcast_object(decide() if mesh.is_first else "")
    if isinstance(decision, str):
        raise RunError(decision)
    return decision


def _decide(config: Config) -> Start:
    run = Path(config.train.output)
    check_output(run, config)  # again: another run may have begun there before it was locked
    folder, passed_over = checkpoint.choose(run, config.checkpoint.resume)
    before, previous = Progress(0, 0, {}), None
    if folder:
        check_model(folder / checkpoint.CONFIG, config)
        before = checkpoint.read_progress(folder)
        previous = Ledger.from_json(before.ledger)
        check_corpora(previous, config)
    ledger = open_ledger(
        config.data,
        config.model.vision.num_patches,
        config.model.language.context_length,
        sequences=objectives.create(config).sequences,
        previous=previous,
        consumed=before.packs,
    )
    replace_text(run / CONFIG, to_yaml(config))
    weights = find_initial_weights(config) if folder is None else None
    start = replace(before, ledger=ledger.to_json())
    return Start(folder, start, passed_over, weights, without_pairs(config))


def check_corpora(ledger: Ledger, config: Config) -> None:
    """The corpora are those that the run last read, by fingerprint, or `data.allow_change` is set; else UserError."""
    before = {c["fingerprint"]: c["path"] for c in ledger.blends()[-1]["blend"]}
    now = {open_corpus(c.path).fingerprint: c.path for c in config.data.corpora}
    if config.data.allow_change or before.keys() == now.keys():
        return
    gone, new = (", ".join(a[f] for f in a.keys() - b.keys()) for a, b in ((before, now), (now, before)))
    raise UserError(
        f"the corpora are not those that this run has read ({gone or 'nothing'} is missing, {new or 'nothing'} is new "
        "or has changed); put them back, or go on with these from here: --data.allow-change"
    )


def pipeline_partition(config: Config, mesh: Mesh, start: Start) -> tuple[int, ...]:
    """Where the parts of the pipeline begin: as in the checkpoint, otherwise by measurement on the first packs."""
    progress, ledger = start.progress, Ledger.from_json(start.progress.ledger)
    if progress.layout.pipeline == mesh.pipeline.size:
        return progress.layout.cuts
    sample = None
    if mesh.is_first:
        packs = tuple(ledger.locate(progress.packs + i) for i in range(config.train.micro_batch))
        sample = build_loader(config, mesh, progress.step, progress.packs, ledger).reader[packs]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return choose_partition(specs_of(config, mesh.tensor), sample, config, mesh, device, DTYPES[resolve_dtype(config)])


def build_loader(config: Config, mesh: Mesh, first_step: int, first_pack: int, ledger: Ledger) -> PackedLoader:
    """This process's batches from a step on, after `first_pack` packs were consumed."""
    return PackedLoader(
        config.data,
        num_patches=config.model.vision.num_patches,
        image_size=config.model.vision.image_size,
        context_length=config.model.language.context_length,
        rank=mesh.data.rank,
        world_size=mesh.data.size,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        first_pack=first_pack,
        steps=config.train.steps - first_step,
        sequences=objectives.create(config).sequences,
        ledger=ledger,
        pin_memory=torch.cuda.is_available(),
    )
