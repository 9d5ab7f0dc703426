"""The held-out evaluation that a run makes every so many steps: all processes together, each some documents."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lcl.config import Config
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.evaluate.heldout import HeldOutEvaluation, check_tasks
from megatron_lcl.evaluate.heldout_results import write_heldout
from megatron_lcl.model.layers import Outputs
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.broadcast_batches import broadcast_batches
from megatron_lcl.train.layout import num_micro_batches
from megatron_lcl.train.telemetry import Telemetry


def check_heldout(config: Config) -> None:
    """UserError where `train.evaluate_every` is set and the section `evaluate` cannot be carried out."""
    if not config.train.evaluate_every:
        return
    if config.evaluate.corpus is None:
        raise UserError(
            f"train.evaluate_every = {config.train.evaluate_every} needs held-out documents: --evaluate.corpus DIR, "
            "such as `preprocess --held-out DIR` writes"
        )
    check_tasks(config, config.evaluate.tasks)
    corpus = open_corpus(config.evaluate.corpus)
    corpus.check_sizes()
    tokenizer = corpus.tokenizer
    if any(open_corpus(c.path).tokenizer.fingerprint != tokenizer.fingerprint for c in config.data.corpora):
        raise UserError(
            f"evaluate.corpus = {config.evaluate.corpus} has another tokenizer than data.corpora; preprocess the "
            "held-out documents with the same one"
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
        stop_requested: Callable[[], int],
    ) -> None:
        """stepper: gives the outputs of micro-batches on the last pipeline stage. stop_requested: whether a signal
        requests the end of the run, the same on every process."""
        self.config = config
        self.mesh = mesh
        self.telemetry = telemetry
        at_once = num_micro_batches(config, mesh.data.size) if mesh.pipeline.size > 1 else 1
        assert config.evaluate.corpus is not None

        def forward(read: Sequence[PackedBatch] | None, num: int) -> list[tuple[PackedBatch, Outputs | None]]:
            if stop_requested():
                raise _Interrupted
            batches = broadcast_batches(read, num, self.evaluation.micro_batch, mesh, device)
            return list(itertools.zip_longest(batches, stepper.forward(batches)))

        self.evaluation = HeldOutEvaluation(
            config,
            config.evaluate.corpus,
            mesh,
            forward,
            config.evaluate.tasks,
            config.train.micro_batch * config.data.tokens_per_pack,  # as many as in a step
            at_once,
        )

    def measure(self, step: int, average: str | None = None) -> None:
        """After step number `step`: to metrics.jsonl and TensorBoard, and for the report into the run folder.

        average: the one that the model has in place of its weights (`averages.Averages.evaluated`).
        A signal interrupts it: the time left of the job is for saving.
        """
        started = time.perf_counter()
        try:
            result, examples = self.evaluation.run(step)
        except _Interrupted:
            self.telemetry.say(f"the evaluation after step {step} is broken off")
            return
        except UserError as error:  # on every process
            raise RunError(str(error)) from None
        if not self.mesh.is_first:
            return
        if result.bad_images:
            self.telemetry.say(f"{len(result.bad_images)} held-out images do not decode, first {result.bad_images[0]}")
        measured = ", ".join(f"{name} {value:.4g}" for name, value in result.numbers().items())
        of = f" of {average}" if average else ""
        self.telemetry.say(f"held out{of}, after step {step}: {measured}")
        seconds = time.perf_counter() - started
        numbers = {**result.numbers(), "seconds": seconds}
        self.telemetry.write({"step": step, **{f"heldout/{name}": value for name, value in numbers.items()}})
        write_heldout(Path(self.config.train.output), replace(result, average=average), examples)
