"""The evaluations that a run makes every so many steps, on held-out documents and on labeled images: all processes
together, each a share."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lcl.config import Config, EvaluationTask
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.storage.store import to_show
from megatron_lcl.errors import RunError, UserError, describe_os_error
from megatron_lcl.evaluate.heldout import TASKS as CORPUS_TASKS
from megatron_lcl.evaluate.heldout import HeldOutEvaluation, check_tasks
from megatron_lcl.evaluate.heldout_results import write_heldout
from megatron_lcl.evaluate.labeled import TASKS as LABELED_TASKS
from megatron_lcl.evaluate.labeled import LabeledEvaluation, named_tasks, open_labeled, write_labeled
from megatron_lcl.evaluate.rules import NOT_COMPARABLE, VERSION, called, version_of_line
from megatron_lcl.model.activations import Outputs
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.broadcast_batches import broadcast_batches
from megatron_lcl.train.layout import num_micro_batches
from megatron_lcl.train.precision import resolve_dtype
from megatron_lcl.train.resilience.audit import Audit
from megatron_lcl.train.telemetry import Telemetry
from megatron_lcl.train.telemetry.lines import last_line_with


def check_heldout(config: Config) -> None:
    """UserError where `train.evaluate_every` is set and the section `evaluate` cannot be carried out."""
    own = config.evaluate
    if not config.train.evaluate_every:
        return
    if own.corpus is None and own.labeled is None:
        raise UserError(
            f"train.evaluate_every = {config.train.evaluate_every} needs held-out documents: --evaluate.corpus DIR, "
            "such as `preprocess --held-out DIR` writes; or labeled images: --evaluate.labeled DIR"
        )
    for tasks, name, data in (
        (corpus_tasks(config), "corpus", own.corpus),
        (named_tasks(config), "labeled", own.labeled),
    ):
        if tasks and data is None:
            raise UserError(f"evaluate.tasks has {tasks[0]}, which needs evaluate.{name}: --evaluate.{name} DIR")
        if own.tasks and not tasks and data is not None:
            raise UserError(
                f"evaluate.{name} = {to_show(data)}, but evaluate.tasks = {list(own.tasks)} has no task on it; add one "
                f"of {', '.join(CORPUS_TASKS if name == 'corpus' else LABELED_TASKS)}, or remove evaluate.{name}"
            )
    if own.labeled is not None:
        sets = open_labeled(config)
        if "zero-shot" in sets.tasks:
            sets.test.warn_of_ids()  # here alone: the run opens them again
    if own.corpus is None:
        return
    check_tasks(config, corpus_tasks(config))
    corpus = open_corpus(own.corpus, config.data.cache)
    corpus.check_sizes()
    tokenizer = corpus.tokenizer
    if any(
        open_corpus(c.path, config.data.cache).tokenizer.fingerprint != tokenizer.fingerprint
        for c in config.data.corpora
    ):
        raise UserError(
            f"evaluate.corpus = {own.corpus} has another tokenizer than data.corpora; preprocess the held-out "
            "documents with the same one"
        )


def corpus_tasks(config: Config) -> tuple[EvaluationTask, ...]:
    """Those of `evaluate.tasks` that a held-out corpus is for."""
    return tuple(task for task in CORPUS_TASKS if task in config.evaluate.tasks)


def other_rules(config: Config, step: int) -> Iterator[str]:
    """A warning where the run, which goes on after `step`, has held-out numbers by another version of their rules."""
    if config.train.evaluate_every and config.evaluate.corpus is not None:
        last = last_line_with("heldout/", Path(config.train.output), step)
        if last and (version := version_of_line(last)) != VERSION:
            yield (
                f"held-out numbers from here on are by version {VERSION} of the rules of held-out evaluation, those of "
                f"step {last['step']} by {called([version])}: {NOT_COMPARABLE}"
            )


class _Interrupted(Exception):
    """A signal requests the end of the run; every process raises it at the same batch."""


class HeldOutMeter:
    """Measures between two steps. Every process has one."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        stepper: Any,
        device: Any,
        telemetry: Telemetry,
        audit: Audit,
        stop_requested: Callable[[], int],
    ) -> None:
        """stepper: gives the outputs of micro-batches on the last pipeline stage. stop_requested: whether a signal
        requests the end of the run, the same on every process."""
        self.config = config
        self.mesh = mesh
        self.telemetry = telemetry
        self.audit = audit
        at_once = num_micro_batches(config, mesh.data.size) if mesh.pipeline.size > 1 else 1
        rows = config.train.micro_batch * config.data.tokens_per_pack  # as many as in a step
        packs = 0

        def forward(read: Sequence[PackedBatch] | None, num: int) -> list[tuple[PackedBatch, Outputs | None]]:
            if stop_requested():
                raise _Interrupted
            batches = broadcast_batches(read, num, packs, mesh, device)
            return list(itertools.zip_longest(batches, stepper.forward(batches)))

        self.evaluation: HeldOutEvaluation | None = None
        if config.evaluate.corpus is not None:
            tasks = corpus_tasks(config)
            self.evaluation = HeldOutEvaluation(config, config.evaluate.corpus, mesh, forward, tasks, rows, at_once)
            packs = self.evaluation.micro_batch
        self.labeled: LabeledEvaluation | None = None
        if config.evaluate.labeled is not None:
            self.labeled = LabeledEvaluation(config, mesh, forward, rows, at_once)
            if mesh.is_first and (said := self.labeled.sets.left_out):
                self.telemetry.say(said)

    def measure(self, step: int, average: str | None = None) -> bool:
        """After step number `step`: to metrics.jsonl and TensorBoard, and for the report into the run folder.

        average: the one that the model has in place of its weights (`averages.Averages.evaluated`).
        What cannot be measured is said, audited and left out.
        False: a signal has interrupted it, for the time left of the job is for saving.
        """
        try:
            if self.evaluation is not None:
                with self._going_on(step):
                    self._measure_heldout(self.evaluation, step, average)
            if self.labeled is not None:
                with self._going_on(step):
                    self._measure_labeled(self.labeled, step, average)
        except _Interrupted:
            self.telemetry.say(f"the evaluation after step {step} is broken off")
            return False
        return True

    @contextlib.contextmanager
    def _going_on(self, step: int) -> Iterator[None]:
        """What all processes find in the data of an evaluation, such as images that no longer decode, costs its numbers
        and not the run. Other errors are those of one process, which the others would wait for."""
        try:
            yield
        except RunError as error:
            self.audit.write("not evaluated", step, reason=str(error))
            self.telemetry.say(f"not evaluated after step {step}: {error}")

    def _measure_heldout(self, evaluation: HeldOutEvaluation, step: int, average: str | None) -> None:
        started = time.perf_counter()
        result, examples = evaluation.run(step)
        if not self.mesh.is_first:
            return
        if result.bad_images:
            self.telemetry.say(f"{len(result.bad_images)} held-out images do not decode, first {result.bad_images[0]}")
        measured = ", ".join(f"{name} {value:.4g}" for name, value in result.numbers().items())
        of = f" of {average}" if average else ""
        self.telemetry.say(f"held out{of}, after step {step}: {measured}")
        seconds = time.perf_counter() - started
        numbers = {**result.numbers(), "rules": result.rules["version"], "seconds": seconds}
        result = replace(result, average=average, dtype=resolve_dtype(self.config))
        self._write(step, lambda run: write_heldout(run, result, examples), "heldout", numbers)

    def _write(
        self, step: int, write: Callable[[Path], None], kind: str, numbers: Mapping[str, float | int | None]
    ) -> None:
        """The numbers for the log, and what the report shows beside them.

        Where the disk has no room for that, training goes on; but numbers of the last step, by which the run is known
        to be evaluated, are then not written either, so that the same command makes the evaluation again.
        """
        run, written = Path(self.config.train.output), True
        try:
            write(run)
        except OSError as error:
            written = False
            reason = describe_os_error(error, run)
            self.audit.write("evaluation not written", step, reason=reason)
            self.telemetry.say(f"the report will not have the evaluation after step {step}: {reason}")
        if written or step < self.config.train.steps:
            self.telemetry.write({"step": step, **{f"{kind}/{name}": value for name, value in numbers.items()}})

    def _measure_labeled(self, evaluation: LabeledEvaluation, step: int, average: str | None) -> None:
        started = time.perf_counter()
        result = evaluation.run(step)
        if not self.mesh.is_first:
            return
        if result.bad_images:
            self.telemetry.say(f"{len(result.bad_images)} labeled images do not decode, first {result.bad_images[0]}")
        measured = ", ".join(f"{name} {value:.4g}" for name, value in result.values.items())
        of = f" of {average}" if average else ""
        self.telemetry.say(f"labeled images{of}, after step {step}: {measured}")
        numbers = {**result.values, "seconds": time.perf_counter() - started}
        self._write(step, lambda run: write_labeled(run, replace(result, average=average)), "labeled", numbers)
