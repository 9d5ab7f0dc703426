"""One optimizer step on one global batch, for whatever objective: its loss is a mean over the whole of it.

An objective that needs every micro-batch's features before the first backward has two ways. `retain` keeps the graphs
of all forwards, `recompute` runs the forwards twice and keeps none; both give the same gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.errors import UserError
from megatron_lcl.model import attention_logits
from megatron_lcl.model.activations import Outputs
from megatron_lcl.model.layers import MAX_LOG_SCALE, PARTS
from megatron_lcl.objectives.base import (
    GlobalCounts,
    Objective,
    StepInputs,
    Term,
    is_of_the_run,
    refusal,
    refuse_without_features,
    without_targets,
)
from megatron_lcl.objectives.contrast import without_features
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.master_weights import read_log_scale, read_numbers, update_log_scale
from megatron_lcl.train.result import PendingResult, StepResult
from megatron_lcl.train.telemetry.clock import Clock
from megatron_lcl.train.telemetry.features import FeatureSample
from megatron_lcl.train.telemetry.norms import PartNorms


def nan_if_rejected(surrogate_loss: torch.Tensor, loss: torch.Tensor, limit: torch.Tensor | float) -> torch.Tensor:
    """The surrogate as it is where the step's loss is finite and not above `limit`, else NaN, with NaN as gradients.

    Before every optimizer step DeepSpeed takes the norm of the gradient over all processes, and a step for which it is
    not finite leaves parameters and optimizer as they are (train/skipping.py). So one number serves losses and
    gradients, every precision, ZeRO stage and pipeline stage, and no process can decide alone. Only the last
    micro-batch need be refused; the processes of a pipeline's last stage refuse, and the rest get NaN from them.
    """
    good = torch.isfinite(loss) & (loss <= limit)
    return surrogate_loss * torch.where(good, 1.0, torch.nan)


def without_drop_path(batch: PackedBatch) -> PackedBatch:
    """The batch for an evaluation: by the numbers of its packs drop path would draw."""
    return replace(batch, packs=())


class StepLoss:
    """What a step minimizes, micro-batch by micro-batch, where the head's outputs are."""

    def __init__(
        self,
        objective: Objective,
        step: StepInputs,
        limit: torch.Tensor | float,
        sample: FeatureSample | None = None,
    ) -> None:
        """sample: takes features of some pairs as they come by."""
        self.objective = objective
        self.step = step
        self.limit = limit
        self.sample = sample
        self.terms = objective.terms(step)
        for term in self.terms:
            if getattr(term, "all_features_first", False) and not objective.all_features_first:
                raise refuse_without_features(term, step.mesh.pipeline, type(objective).__name__)

    def of(self, m: int, out: Outputs) -> torch.Tensor:
        """A scalar whose gradient, summed over micro-batches and replicas, is that of the step's loss.

        Of micro-batch m, from its outputs with their graph; asked for in order.
        """
        batches = self.step.batches
        if self.sample is not None:
            self.sample.take(out, batches[m])
        given = [self._one_number(term, "surrogate", term.surrogate(m, out), ((), (1,))) for term in self.terms]
        parts = [part for part in given if part is not None]
        if not self.objective.all_features_first:
            parts.insert(0, without_features(out, batches[m]))
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + part
        return loss if m < len(batches) - 1 else nan_if_rejected(loss, self.mean(), self.limit)

    def mean(self) -> torch.Tensor:
        """The step's loss, a scalar, once all micro-batches were there."""
        loss, *others = (self._one_number(term, "loss", term.loss()) for term in self.terms)
        for other in others:
            loss = loss + other
        return loss

    def numbers(self) -> dict[str, torch.Tensor]:
        """The loss and what its terms measure, scalars on the device. UserError where a term gives something else, or a
        name that another one or the run itself has."""
        values, owners = {"loss": self.mean()}, dict[str, str]()
        for term in self.terms:
            own, given = type(term).__name__, term.metrics()
            if not isinstance(given, Mapping):
                raise self._refusal(f"{own}.metrics gives {given!r}; it has to give a dict, maybe an empty one")
            for name, value in given.items():
                if owner := "the run itself" if is_of_the_run(name) else owners.get(name):
                    raise self._refusal(
                        f"{own}.metrics gives `{name}`, a name that {owner} gives already; give it another one (a "
                        "class made of `Contrast` by its `names`)"
                    )
                if not isinstance(value, torch.Tensor):
                    raise self._refusal(f"{own}.metrics gives {value!r} as `{name}`; it has to be a tensor of shape ()")
                values[name], owners[name] = self._one_number(term, f"metrics[{name!r}]", value), own
        return values

    def _one_number(self, term: Term, what: str, given: Any, shapes: Sequence[tuple[int, ...]] = ((),)) -> Any:
        """What a term gives, if it is no tensor of another shape."""
        if (shape := getattr(given, "shape", ())) not in shapes:
            raise self._refusal(
                f"{type(term).__name__}.{what} is of shape {[*shape]}; it has to be one number, of shape ()"
            )
        return given

    def _refusal(self, message: str) -> UserError:
        return refusal(self.step.mesh.pipeline, message)


class Stepper:
    """Runs steps on a DeepSpeed engine without a pipeline."""

    def __init__(self, engine: Any, config: Config, mesh: Mesh) -> None:
        self.engine, self.mesh, self.config = engine, mesh, config
        self.objective = objectives.create(config)
        self.clock = Clock(engine.device)
        """what a step spends its time on"""
        self._norms: PartNorms | None = None

    @torch.no_grad()
    def forward(self, batches: Sequence[PackedBatch]) -> list[Outputs]:
        """What the model makes of this replica's micro-batches; no step."""
        numbers = read_numbers(self._head())
        return [self.engine(without_drop_path(batch))._replace(**numbers) for batch in batches]

    def run(self, batches: Sequence[PackedBatch], lr: float, limit: float = math.inf) -> StepResult:
        """One step, and what it gave: `start`, and `read` of its result."""
        return self.start(batches, lr, limit).read()

    def start(
        self, batches: Sequence[PackedBatch], lr: float, limit: torch.Tensor | float = math.inf, measure: bool = False
    ) -> PendingResult:
        """One step on this replica's micro-batches, which lie on the engine's device; nothing of it is read here.

        In a pipeline every process of the replica has their integers. A step whose loss is not finite or above `limit`,
        or whose gradient is not finite, changes nothing: see `nan_if_rejected`, and `applied` of the result.

        measure: also norms and the largest attention logits by part, and features for a look at their health
        (`Measured`). All processes agree on it.
        """
        engine, mesh, objective, clock = self.engine, self.mesh, self.objective, self.clock
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        counts = GlobalCounts.of(batches, mesh, torch.device("cpu"))
        with contextlib.ExitStack() as measuring:
            norms = measuring.enter_context(self._part_norms().measured()) if measure else None
            logits = measuring.enter_context(attention_logits.watched(engine.module)) if measure else None
            sample = FeatureSample(counts, mesh.data) if measure else None
            outputs: list[Outputs] = []
            if objective.all_features_first:
                clock.enter("forward")
                retain = objective.keeps_graphs
                with torch.set_grad_enabled(retain):
                    outputs = self._first_forwards(batches if retain else [without_targets(batch) for batch in batches])
                if not retain:  # a term that reads it is not to train with 0 here, and otherwise where memory suffices
                    outputs = [o._replace(generation=torch.full_like(o.generation, math.nan)) for o in outputs]
            clock.enter("loss")
            head, loss = self._head(), None
            if head is not None:
                inputs = StepInputs(batches, outputs, counts=counts, mesh=mesh, **read_numbers(head))
                loss = StepLoss(objective, inputs, limit, sample)
            self._backwards(batches, outputs, loss)
        clock.enter("optimizer")
        if head is not None:
            update_log_scale(head.log_scale, lambda value: value.clamp(0, MAX_LOG_SCALE))
        skipped = getattr(engine.optimizer.optimizer, "found_inf", None)
        if skipped is None:  # see train/skipping.py
            skipped = not engine.was_step_applied()
        grad_norm = engine.get_global_grad_norm()
        if not isinstance(grad_norm, torch.Tensor):
            grad_norm = torch.full((), grad_norm or 0.0, device=engine.device)
        elif isinstance(skipped, torch.Tensor):
            grad_norm = torch.where(skipped > 0, math.inf, grad_norm)
        numbers = None
        if head is not None and loss is not None:
            numbers = loss.numbers() | {"log_scale": read_log_scale(head.log_scale)[0], "grad_norm": grad_norm}
        by_part = features = None
        if norms is not None and logits is not None and sample is not None:
            largest = logits.over_all_processes(mesh.world, PARTS, engine.device)
            by_part = torch.cat([norms.over_all_processes(grad_norm), largest[None]])
            width = self.config.model.language.width
            if head is not None:
                features = sample.gather(width, engine.device)
            else:
                features = torch.zeros(sum(sample.sizes), 2 * width, device=engine.device)
        clock.enter("other")
        pipeline, wanted = mesh.pipeline, mesh.is_first
        return PendingResult(numbers, objective, counts, pipeline, engine.device, by_part, features, wanted, skipped)

    def _part_norms(self) -> PartNorms:
        if self._norms is None:  # DeepSpeed's partitions stay where they are
            self._norms = PartNorms(self.engine, self.config, self.mesh)
        return self._norms

    def _first_forwards(self, batches: Sequence[PackedBatch]) -> list[Outputs]:
        """What the head gives for each micro-batch, where it is; with graphs if gradients are enabled."""
        return [self.engine(batch) for batch in batches]

    def _backwards(self, batches: Sequence[PackedBatch], outputs: list[Outputs], loss: StepLoss | None) -> None:
        """All backwards, after the forwards that are left, and the optimizer's step.

        outputs: of the first forwards; loss: where the head is.
        """
        assert loss is not None
        undo_means = self.mesh.data.size * len(batches)  # DeepSpeed averages over both; ours is one global mean
        for m, batch in enumerate(batches):
            if self.objective.keeps_graphs:
                out = outputs[m]
            else:
                self.clock.enter("forward")
                out = self.engine(batch)
            self.clock.enter("loss")
            surrogate = loss.of(m, out) * undo_means
            self.clock.enter_backward(surrogate)
            self.engine.backward(surrogate)
            del surrogate  # and with it what of its graph is left
            self.clock.enter("optimizer")
            self.engine.step()

    def _head(self) -> Any:
        """The model's head; None where it is on another process."""
        return self.engine.module[-1]
