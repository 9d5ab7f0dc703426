"""One optimizer step on one global batch, for whatever objective: its loss is a mean over the whole of it.

An objective that needs every micro-batch's features before the first backward has two ways. `retain` keeps the graphs
of all forwards, `recompute` runs the forwards twice and keeps none; both give the same gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.layers import MAX_LOG_SCALE, Outputs
from megatron_lcl.objectives.base import GlobalCounts, Objective, StepInputs, without_targets
from megatron_lcl.objectives.contrast import without_features
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.master_weights import read_log_scale, read_numbers, update_log_scale


@dataclass(frozen=True)
class StepResult:
    """What a step gave; the same on every process."""

    loss: float
    """what the step minimizes: the weighted sum of the objective's terms"""
    log_scale: float
    """after the step"""
    grad_norm: float
    num_targets: int
    num_pairs: int
    num_images: int
    num_tokens: int
    num_bad_images: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`Objective.metrics` by name. Losses are unweighted global means, in nats; what is said of a contrast is over all
    pairs of the global batch (`losses.contrastive.ContrastiveOutput`)"""

    @property
    def generation(self) -> float:
        """The generation loss; 0 where the objective does not measure it."""
        return self.metrics.get("generation", 0.0)

    @property
    def contrastive(self) -> float:
        """The contrastive loss; 0 where the objective does not measure it."""
        return self.metrics.get("contrastive", 0.0)

    def numbers(self) -> dict[str, float]:
        """All of it by name, for a line of metrics."""
        values = asdict(self)
        metrics = values.pop("metrics")
        return values | metrics


def nan_if_rejected(surrogate_loss: torch.Tensor, loss: torch.Tensor, limit: float) -> torch.Tensor:
    """The surrogate as it is where the step's loss is finite and not above `limit`, else NaN, with NaN as gradients.

    Before every optimizer step DeepSpeed asks all processes together whether a gradient is not finite, as it must for
    float16, and if so leaves parameters and optimizer as they are. So one question serves losses and gradients, every
    precision, ZeRO stage and pipeline stage, no process can decide alone, and the device is not waited for. Only the
    last micro-batch need be refused; the processes of a pipeline's last stage refuse, and the rest get NaN from them.
    """
    good = torch.isfinite(loss) & (loss <= limit)
    return surrogate_loss * torch.where(good, 1.0, torch.nan)


def without_drop_path(batch: PackedBatch) -> PackedBatch:
    """The batch for an evaluation: by the numbers of its packs drop path would draw."""
    return replace(batch, packs=())


class StepLoss:
    """What a step minimizes, micro-batch by micro-batch, where the head's outputs are."""

    def __init__(self, objective: Objective, step: StepInputs, limit: float) -> None:
        self.objective = objective
        self.step = step
        self.limit = limit
        self.terms = objective.terms(step)

    def of(self, m: int, out: Outputs) -> torch.Tensor:
        """A scalar whose gradient, summed over micro-batches and replicas, is that of the step's loss.

        Of micro-batch m, from its outputs with their graph; asked for in order.
        """
        batches = self.step.batches
        parts = [part for term in self.terms if (part := term.surrogate(m, out)) is not None]
        if not self.objective.all_features_first:
            parts.insert(0, without_features(out, batches[m]))
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + part
        return loss if m < len(batches) - 1 else nan_if_rejected(loss, self.mean(), self.limit)

    def mean(self) -> torch.Tensor:
        """The step's loss, a scalar, once all micro-batches were there."""
        loss, *others = (term.loss() for term in self.terms)
        for other in others:
            loss = loss + other
        return loss

    def result(self, log_scale: torch.Tensor, grad_norm: float) -> StepResult:
        """After the optimizer's step; log_scale: [1], as it is now."""
        loss = self.mean()
        values = dict.fromkeys(self.objective.metrics, torch.zeros_like(loss))
        values |= {"loss": loss, "log_scale": log_scale[0]}
        for term in self.terms:
            values |= term.metrics()
        numbers = torch.stack([v.detach().float() for v in values.values()]).tolist()  # one wait for the device
        found = dict(zip(values, numbers, strict=True))
        return make_result(found | {"grad_norm": grad_norm}, self.objective, self.step.counts)


def result_names(objective: Objective) -> tuple[str, ...]:
    """The floating-point numbers of a step's result."""
    return ("loss", "log_scale", "grad_norm", *objective.metrics)


def make_result(numbers: Mapping[str, float], objective: Objective, counts: GlobalCounts) -> StepResult:
    """From the numbers that `result_names` names. AssertionError where a term measures what is not declared."""
    undeclared = numbers.keys() - {*result_names(objective)}
    assert not undeclared, f"{type(objective).__name__}.metrics does not name {', '.join(sorted(undeclared))}"
    return StepResult(
        numbers["loss"],
        numbers["log_scale"],
        numbers["grad_norm"],
        **counts.counts,
        metrics={name: numbers[name] for name in objective.metrics},
    )


class Stepper:
    """Runs steps on a DeepSpeed engine without a pipeline."""

    def __init__(self, engine: Any, config: Config, mesh: Mesh) -> None:
        self.engine, self.mesh = engine, mesh
        self.objective = objectives.create(config)

    @torch.no_grad()
    def forward(self, batches: Sequence[PackedBatch]) -> list[Outputs]:
        """What the model makes of this replica's micro-batches; no step."""
        numbers = read_numbers(self._head())
        return [self.engine(without_drop_path(batch))._replace(**numbers) for batch in batches]

    def run(self, batches: Sequence[PackedBatch], lr: float, limit: float = math.inf) -> StepResult:
        """One step on this replica's micro-batches, which lie on the engine's device.

        In a pipeline every process of the replica has their integers. A step whose loss is not finite or above `limit`,
        or whose gradient is not finite, changes nothing: see `nan_if_rejected` and the engine's `was_step_applied`.
        """
        engine, mesh, objective = self.engine, self.mesh, self.objective
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        counts = GlobalCounts.of(batches, mesh, engine.device)
        outputs: list[Outputs] = []
        if objective.all_features_first:
            retain = objective.keeps_graphs
            with torch.set_grad_enabled(retain):
                outputs = self._first_forwards(batches if retain else [without_targets(batch) for batch in batches])
        head, loss = self._head(), None
        if head is not None:
            inputs = StepInputs(batches, outputs, counts=counts, mesh=mesh, **read_numbers(head))
            loss = StepLoss(objective, inputs, limit)
        self._backwards(batches, outputs, loss)
        if head is not None:
            update_log_scale(head.log_scale, lambda value: value.clamp(0, MAX_LOG_SCALE))
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        result = loss.result(read_log_scale(head.log_scale), grad_norm) if head is not None and loss else None
        return self._share(result, counts)

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
            out = outputs[m] if self.objective.keeps_graphs else self.engine(batch)
            self.engine.backward(loss.of(m, out) * undo_means)
            self.engine.step()

    def _head(self) -> Any:
        """The model's head; None where it is on another process."""
        return self.engine.module[-1]

    def _share(self, result: StepResult | None, counts: GlobalCounts) -> StepResult:
        """The result, on every process; `result`: None where the head is on another process."""
        assert result is not None
        return result
