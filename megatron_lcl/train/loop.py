"""The steps of a training run, and what happens beside them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.config.phases import Phase, phase_at, phases_of
from megatron_lcl.config.results import START
from megatron_lcl.data.loading.ledger import Ledger, begins_other_blend
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.summary import summarize
from megatron_lcl.errors import RunError
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.averages import Averages
from megatron_lcl.train.broadcast_batches import broadcast_batches
from megatron_lcl.train.changes import PHASES, Changes, changes_since
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.checkpointer import Checkpointer
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.checkpoint.mirror import Mirror
from megatron_lcl.train.checkpoint.saver import Saver
from megatron_lcl.train.engine import build_stepper, set_batch
from megatron_lcl.train.first_batch import build_loader
from megatron_lcl.train.heldout import HeldOutMeter
from megatron_lcl.train.kernels import choose_kernels, describe
from megatron_lcl.train.layout import num_micro_batches
from megatron_lcl.train.optimizer import learning_rate, unfinished_warmup
from megatron_lcl.train.precision import loss_scale, lowerable_scale
from megatron_lcl.train.prefetch import Prefetcher
from megatron_lcl.train.resilience.audit import Audit
from megatron_lcl.train.resilience.bad_steps import BadSteps, SpikeLimit
from megatron_lcl.train.resilience.replicas import find_difference
from megatron_lcl.train.resilience.signals import Signals, Stopped
from megatron_lcl.train.resilience.watchdog import Watchdog
from megatron_lcl.train.result import PendingResult, StepResult, read_results
from megatron_lcl.train.resume_point import ResumePoint, ledger_from
from megatron_lcl.train.telemetry import Telemetry
from megatron_lcl.train.telemetry.bad_image_log import BadImageLog
from megatron_lcl.train.telemetry.meter import StepMeter
from megatron_lcl.train.telemetry.profile import Profile
from megatron_lcl.train.unused import unused_settings


@dataclass(frozen=True)
class Unread:
    """A step that was made, and of which nobody knows yet whether it was applied."""

    number: int
    """steps done before it"""
    packs: int
    """consumed before it"""
    global_batch: int
    lr: float
    scale: float | None
    """of float16's loss before the step, if it can be lower"""
    loss_scale: float | None
    """of float16's loss in the step; for the log"""
    contrastive_weight: float | None
    """of the step, where phases give it; for the log"""
    pending: PendingResult


class Training:
    """A run between two steps, and what happens beside the steps. Every process has one and all do the same."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        engine: Any,
        point: ResumePoint,
        telemetry: Telemetry,
        checkpoints: Checkpointer,
        signals: Signals,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.engine = engine
        self.point = point
        self.telemetry = telemetry
        self.checkpoints = checkpoints
        self.signals = signals
        self.watchdog = watchdog
        self.stepper = build_stepper(engine, config, mesh)
        self.meter = StepMeter(config, mesh, self.stepper.clock, telemetry)
        self.bad_images = BadImageLog(mesh.world, telemetry)
        run, clock = Path(config.train.output), self.stepper.clock
        self.profile = Profile(config, mesh, engine.module, clock, run, telemetry.say)
        self.audit = Audit(run, mesh.is_first)
        self.saver = Saver(checkpoints, config.checkpoint, telemetry, self.audit)
        self.bad = BadSteps(config.guard, point.progress.guard)
        self.spikes = SpikeLimit(config.guard, engine.device)
        self.averages = Averages(config, engine)
        self.heldout: HeldOutMeter | None = None
        if config.train.evaluate_every:
            stop, device = self._stop_requested, engine.device
            self.heldout = HeldOutMeter(config, mesh, self.stepper, device, telemetry, self.audit, stop)
        self.progress = point.progress
        self.applied = point.progress.step
        """the last step that was not skipped, as far as they are read"""
        self.phase = phase_at(config, point.progress.step)
        self.logs_weight = any(phase.contrastive_weight is not None for phase in config.schedule.phases)
        self.ledger = Ledger.from_json(point.progress.ledger)
        # or had them, by the ledger, which does not know of weights and micro-batches, or by the checkpoint's config
        phases = max(len(phases_of(config)), len(self.ledger.phases))
        self.several_phases = phases > 1 or any(name.startswith(PHASES) for name in point.changes.settings)
        self.loader: PackedLoader | None = None
        self.batches: Prefetcher | None = None
        """of the phase, where this process reads"""
        self.unread: list[Unread] = []
        """the steps since those that were recorded last"""
        self.save_due = False
        """a checkpoint is to be saved after the next step that is not bad"""
        self._begin()

    def _begin(self) -> None:
        """Load what the run resumes from, and log it."""
        point, telemetry = self.point, self.telemetry
        self._log_rejected(point.rejected)
        if point.choice:
            telemetry.say(f"contrast: {point.choice}")
            needs = point.choice.needs or point.choice.bound
            telemetry.write({"step": point.progress.step, "strategy": point.choice.strategy, "retain_bytes": needs})
        for path, when in point.without_pairs.items():
            telemetry.say(f"{path} gives the contrast no pair{when}")
        for line in unused_settings(self.config):
            telemetry.say(line)
        if point.progress.step < self.config.train.steps and (warmup := unfinished_warmup(self.config)):
            telemetry.say(f"warning: {warmup}")
        self._go_to(point.folder, point.progress, point.changes)
        if point.folder:
            with self.watchdog.long_phase(point.progress.step, "copying the last checkpoint"):
                self.saver.go_on_from(point.folder, point.progress)
            step, steps = point.progress.step, self.config.train.steps
            finished = f"finished: {step} of {steps} steps; more with --train.steps"
            telemetry.say(finished if step >= steps else f"going on from {point.folder}")
            tails = self.averages.short_tails(self.progress.averaged, self.progress.step)
            for line in (*point.changes.lines(), *tails):
                telemetry.say(line)
            settings = {name: both for name, both in point.changes.settings.items() if name not in START}
            if settings or point.changes.warnings:
                facts = {"settings": settings, "warnings": point.changes.warnings}
                self.audit.write("changed", point.progress.step, folder=str(point.folder), **facts)
            if point.changes.blend:
                self.audit.write("blend changed", point.progress.step, **asdict(point.changes.blend))
        elif point.weights:
            telemetry.say(point.weights.describe(self.config))
            facts = {"missing": point.weights.missing, "unused": point.weights.unused}
            self.audit.write("initial weights", 0, path=str(point.weights.path), **facts)
        self._say_phase()

    def _say_phase(self) -> None:
        """What the phase that begins, or goes on, reads."""
        telemetry, config, step = self.telemetry, self.phase.config, self.progress.step
        if self.several_phases:
            telemetry.say(f"phase {self.phase.number + 1}, {self.phase.describe(step)}")
            vision, train = config.model.vision, config.train
            facts = {"image_size": vision.image_size, "num_patches": vision.num_kept}
            facts |= {"global_batch": train.global_batch, "micro_batch": train.micro_batch}
            telemetry.write({"step": step, "phase": self.phase.number + 1, **facts})
        if self.loader and self.mesh.is_first:
            chosen = config.data.images_per_pack is None
            summary = summarize(self.loader, self.progress.packs, chosen, self.phase.names)
            telemetry.say(f"packs: {summary}")
            telemetry.write({"step": step, **summary.numbers()})

    def run(self) -> Path:
        """All steps that are left; the final checkpoint's folder."""
        if self.progress.step < self.config.train.steps:
            self._log_kernels()
        while self.progress.step < self.config.train.steps:
            self._stop_if_requested()
            if self.progress.step == self.phase.stop:
                self._next_phase()
            self._step()
            if self.bad.too_many:
                self._rewind()
            else:
                self._after_step()
        if self.heldout and not self.point.is_evaluated and not self._evaluate(self.heldout):
            self._stop_if_requested()  # the evaluation is still to be made
        with self.watchdog.long_phase(self.progress.step, "saving before the end"):
            self._finish_saving()
            self.checkpoints.wait_for_all()  # else a launcher may end the first one while it copies
        if self.saver.step != self.progress.step:
            raise RunError(f"{self.saver.fault}; all steps are done, but {self.saver.last}")
        if skipped := self.progress.step - self.applied:
            last = f"last {skipped:,} steps were" if skipped > 1 else "last step was"
            self.telemetry.say(
                f"warning: the {last} skipped (audit.jsonl says why): {self.saver.folder} has the weights of step "
                f"{self.applied}"
            )
        return self.saver.folder

    def close(self) -> None:
        """Write what is not written yet of what was measured; read nothing further ahead."""
        self.profile.close()
        self.meter.finish()
        if not self.config.data.workers:  # it may read ahead, from object storage; loader processes end with this
            self.batches = None

    def _log_kernels(self) -> None:
        kernels = choose_kernels(self.config)
        for line in describe(kernels, self.mesh):
            self.telemetry.say(line)
        self.telemetry.write({"step": self.progress.step, **kernels.facts(), "hardware": self.meter.hardware()})

    def _step(self) -> None:
        config, mesh, step = self.config, self.mesh, self.progress.step
        global_batch, micro_batch = self.phase.config.train.global_batch, self.phase.config.train.micro_batch
        self.watchdog.heartbeat(step, "reading data")
        self.profile.before(step + 1)
        self.stepper.clock.enter("data")
        started = time.perf_counter()
        micro_batches = num_micro_batches(self.phase.config, mesh.data.size)
        own = self.batches.take() if self.batches else None
        if self.phase.change is not None:
            self.stepper.objective = objectives.create(self.phase.config_at(step))
        self.meter.read(own and own.read, self.phase.config, self.stepper.objective)
        self.watchdog.heartbeat(step, "computing")
        lr = learning_rate(step, config)
        scale, scaled_by = lowerable_scale(self.engine.optimizer), loss_scale(self.engine)
        shared = broadcast_batches(own and own.copies, micro_batches, micro_batch, mesh, self.engine.device)
        pending = self.stepper.start(shared, lr, self.spikes.limit(), self.telemetry.is_logged(step + 1))
        self.averages.update(step + 1, pending.skipped)
        self.spikes.add(pending.loss, pending.skipped)
        weight = self.stepper.objective.weights["contrastive_weight"] if self.logs_weight else None
        self.unread.append(Unread(step, self.progress.packs, global_batch, lr, scale, scaled_by, weight, pending))
        self.progress = replace(self.progress, step=step + 1, packs=self.progress.packs + global_batch)
        if self.batches and self.batches.reads_ahead:
            self.watchdog.heartbeat(step, "reading data")
            self.stepper.clock.enter("data")
            self.batches.begin()
            self.watchdog.heartbeat(step, "computing")
            self.stepper.clock.enter("other")
        results = self._read()
        seconds, counts = time.perf_counter() - started, pending.counts.counts
        self.meter.step(shared, pending.counts, seconds)
        self.telemetry.count(step + 1, counts)
        self._record(results)
        if self.profile.ends_after(step + 1, step + 1 == config.train.steps):
            with self.watchdog.long_phase(step + 1, "writing a profile"):
                self.profile.finish()
        self.bad_images.add(counts["num_bad_images"], own.read if own else ())
        if self.telemetry.is_logged(step + 1):
            self.bad_images.write(step + 1)

    def _read(self, always: bool = False) -> list[tuple[Unread, StepResult | None]]:
        """The steps since the last ones read, where it is time to know what they gave: one wait for the device.

        Nothing else of a step is read from the device. None: of a step that is known to have been applied nobody needs
        more. always: read them now.
        """
        unread = self.unread
        if not (always or self._must_know()) and any(step.pending.applied is None for step in unread):
            return []
        self.unread = []
        wanted = [
            step
            for step in unread
            if self.bad.watches_losses or not step.pending.applied or self.telemetry.is_logged(step.number + 1)
        ]
        results = dict(zip(wanted, read_results([step.pending for step in wanted]), strict=True))
        return [(step, results.get(step)) for step in unread]

    def _must_know(self) -> bool:
        """Whether what comes now depends on whether the last steps were applied. Else they are read with the next
        logged step; those after too many bad ones are then made in vain, and nothing of them stays."""
        config, step = self.config, self.progress.step
        every = (config.checkpoint.every, config.guard.every, config.train.evaluate_every if self.heldout else 0)
        due = self.save_due or any(n and step % n == 0 for n in every)
        return due or self.telemetry.is_logged(step) or step == self.phase.stop

    def _record(self, results: Sequence[tuple[Unread, StepResult | None]]) -> None:
        """Count the steps, and log them; up to the one after which the run must go back, if there is one."""
        for step, result in results:
            number, lr = step.number + 1, step.lr
            applied = result.applied if result else True
            skipped = self.bad.record((step.number, step.packs), result.loss if result else None, applied, step.scale)
            if skipped:
                self.telemetry.skipped(number, skipped, lr)
                packs = self.ledger.ranges(step.packs, step.global_batch)
                self.audit.write("step skipped", number, reason=skipped, packs=packs)
            else:
                self.applied = number
                averaged = self.averages.count(number, self.progress.averaged)
                self.progress = replace(self.progress, averaged=averaged)
                if result and self.telemetry.is_logged(number):
                    more = self.meter.line(number, result, lr)
                    if step.contrastive_weight is not None:
                        more["contrastive_weight"] = step.contrastive_weight
                    if step.loss_scale is not None:
                        more["loss_scale"] = step.loss_scale
                    self.telemetry.step(number, result, lr, more)
            if self.bad.too_many:
                self.progress = replace(self.progress, step=number, packs=step.packs + step.global_batch)
                return

    def _after_step(self) -> None:
        step, every, compare = self.progress.step, self.config.checkpoint.every, self.config.guard.every
        last = step == self.config.train.steps
        self.save_due |= bool(every and step % every == 0)
        if last or (self.save_due and not self.bad.consecutive):  # between bad steps the state may not be good
            self._save()
        elif compare and step % compare == 0:
            self._compare_replicas()
        if self.heldout and not last and step % self.config.train.evaluate_every == 0:
            self._evaluate(self.heldout)

    def _evaluate(self, heldout: HeldOutMeter) -> bool:
        """Whether all was measured: a signal interrupts it."""
        step, averaged = self.progress.step, self.progress.averaged
        with self.watchdog.long_phase(step, "evaluating"), self.averages.evaluated(averaged) as average:
            return heldout.measure(step, average)

    def _finish_saving(self) -> None:
        with self.meter.waiting():
            self.saver.finish_pending()

    def _save(self) -> None:
        self.save_due = False
        self.bad_images.write(self.progress.step)
        with self.meter.waiting():
            self._compare_replicas()
        if not self.bad.consecutive and self.progress.step != self.saver.step:
            self.bad.rewinds = 0
        if self.loader:
            self.ledger = self.loader.ledger_after(self.progress.packs)
            self.progress = replace(self.progress, ledger=self.ledger.to_json())
        with self.watchdog.long_phase(self.progress.step, "saving"), self.meter.waiting():
            self.saver.save(replace(self.progress, guard=self.bad.state()))

    def _compare_replicas(self) -> None:
        if not self.config.guard.every or self.mesh.data_tensor.size == 1:
            return
        found = find_difference(self.engine.module, self.mesh)
        if found is not None:
            self.audit.write("replicas differ", self.progress.step, reason=found)
            raise RunError(
                f"the replicas of the model differ after step {self.progress.step}: {found}. A machine computes or "
                "stores wrongly; exclude it, and the same command goes on from the last checkpoint"
            )

    def _stop_requested(self) -> int:
        """The signal that any process has received, 0 for none; the same on all, which call it together."""
        flags = torch.tensor([self.signals.received, self.checkpoints.writing])  # on the host: no device is waited for
        signum, writing = self.mesh.world.all_reduce(flags, dist.ReduceOp.MAX).tolist()
        if not writing:
            self._finish_saving()
        return signum

    def _stop_if_requested(self) -> None:
        signum = self._stop_requested()
        if not signum:
            return
        self.signals.answered = True
        self._record(self._read(always=True))
        if self.bad.too_many:
            self._rewind()
        step = self.progress.step
        with self.watchdog.long_phase(step, "saving before the end"):
            self._finish_saving()
            if self.saver.step != step or self.saver.failures:  # that of a rewind has failed, say
                self._save()
            self._finish_saving()
            self.checkpoints.wait_for_all()
        self.audit.write("stopped", step, signal=signum, saved=self.saver.step)
        raise Stopped(signum, step, self.saver.step)

    def _rewind(self) -> None:
        """Back to the last checkpoint before the bad steps; their packs are skipped from then on."""
        at, (step, packs), run = self.progress.step, self.bad.began, Path(self.config.train.output)
        self.bad_images.write(at)  # else they would be counted with the steps that are made again
        with self.watchdog.long_phase(at, "rewinding"):
            self.profile.finish()  # its last step may be far from where the run goes back to
            self.saver.finish_pending()
            found: tuple[Path | None, dict[Path, list[str]], Changes] = (None, {}, Changes())
            if self.mesh.is_first:
                own = self.config.checkpoint
                repair = Mirror(own.mirror).repair if own.mirror is not None else None
                folder, faults = checkpoint.go_back(run, step, self.point.folder, own.resume, repair)
                found = folder, faults, changes_since(folder, self.config) if folder else Changes()
            folder, faults, changes = self.mesh.world.broadcast_object(found)
            self._log_rejected(faults)
            if folder is None:
                rejected = "; ".join(f"{path.name}: {'; '.join(wrong[:3])}" for path, wrong in faults.items())
                there = "no checkpoint before them to go back to" + f" ({rejected})" * bool(rejected)
                raise RunError(
                    f"steps {step + 1} to {at} were bad, and there is {there}; audit.jsonl says why. Lower "
                    "optimizer.lr, or look at the packs with `replay`"
                )
            before = checkpoint.read_progress(folder)
            packs = max(packs, before.packs)  # saved between bad steps, it is behind the packs of some
            ledger = self.ledger.skip(packs, self.progress.packs - packs)
            self.bad.rewind(before.guard, at)
            skipped = list(ledger.entries[len(self.ledger.entries) :])
            # steps that were made with other settings are made with the config's now
            if self.mesh.is_first:
                ledger = ledger_from(self.config, before, ledger)
            ledger = self.mesh.world.broadcast_object(ledger)
            is_other = begins_other_blend(Ledger.from_json(before.ledger), ledger)
            changes = replace(changes, new_loss=changes.new_loss or is_other)
            self.audit.write("rewind", at, to=before.step, folder=str(folder), skip=skipped)
            self.telemetry.say(f"steps {step + 1} to {at} were bad: back to {folder}, without their packs")
            self._go_to(folder, replace(before, ledger=ledger.to_json()), changes)
            for line in self.averages.short_tails(self.progress.averaged, before.step):
                self.telemetry.say(line)
            self.telemetry.rewind(before.step)
            self.meter.reset()
            self.saver.go_back_to(folder, before.step)
            # whatever ends the run before its next checkpoint, it knows which packs it skips, and of the rewind
            self.saver.save(replace(self.progress, guard=self.bad.state()))

    def _log_rejected(self, faults: dict[Path, list[str]]) -> None:
        for folder, wrong in faults.items():
            self.audit.write("checkpoint rejected", self.progress.step, folder=str(folder), faults=wrong)
            self.telemetry.say(f"rejected {folder}: {'; '.join(wrong[:3])}")

    def _go_to(self, folder: Path | None, progress: Progress, changes: Changes) -> None:
        """Parameters, optimizer and generators of a checkpoint (None: as they are), and its position in the data.

        changes: since it was written.
        """
        self.batches = None  # the loader processes end
        self.save_due = False
        self.progress = progress
        self.applied = self.bad.began[0] if self.bad.consecutive else progress.step
        self.ledger = Ledger.from_json(progress.ledger)
        for message in self.checkpoints.load(folder) if folder else ():
            self.telemetry.say(message)
        steps = changes.before("train.steps", self.config.train.steps)
        self.progress = replace(progress, averaged=self.averages.begin(progress.averaged, steps))
        if changes.new_loss:
            self.bad.new_window()
        self._enter(phase_at(self.config, progress.step))

    def _next_phase(self) -> None:
        """The step to come is another phase's first."""
        self.batches = None  # the loader processes end
        with self.watchdog.long_phase(self.progress.step, "planning packs"):
            if self.loader:
                self.ledger = self.loader.ledger_after(self.progress.packs)
            self._enter(phase_at(self.config, self.progress.step))
            self._say_phase()

    def _enter(self, phase: Phase) -> None:
        """The steps to come are as `phase` says."""
        self.phase = phase
        if self.progress.step == phase.first:
            self.bad.new_window()
        self.spikes.begin(self.bad.losses)
        self.stepper.objective = objectives.create(phase.config)
        set_batch(self.engine, phase.config.train.global_batch, phase.config.train.micro_batch)
        if self.mesh.loads_data:
            self.loader = build_loader(self.config, self.mesh, phase, self.progress, self.ledger)
            number = num_micro_batches(phase.config, self.mesh.data.size)
            self.batches = Prefetcher(iter(self.loader), number, self.engine.device)
