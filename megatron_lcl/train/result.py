"""What a step gives: on the device at first, and on the host once somebody reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch

from megatron_lcl.objectives.base import GlobalCounts, Objective
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.parts import PARTS


@dataclass(frozen=True)
class Measured:
    """What is looked at in a step that is logged, beside its result."""

    grad_norms: Mapping[str, float]
    """of the gradient before it is clipped, by part of the model; the root of the sum of squares is the whole norm"""
    update_norms: Mapping[str, float]
    """of the change of the float32 weights, weight decay included, by part"""
    latents: torch.Tensor
    """[n, D] float32, in host memory: latents of some pairs of the global batch, as the pool gives them; [0, D] on
    processes other than the first, and where there are no pairs"""
    contexts: torch.Tensor
    """[n, D] the context features of the same pairs, as the projection gives them"""


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
    measured: Measured | None = field(default=None, compare=False)
    """where the step was asked to measure it"""

    @property
    def generation(self) -> float:
        """The generation loss; 0 where the objective does not measure it."""
        return self.metrics.get("generation", 0.0)

    @property
    def contrastive(self) -> float:
        """The contrastive loss; 0 where the objective does not measure it."""
        return self.metrics.get("contrastive", 0.0)

    def numbers(self) -> dict[str, float]:
        """All numbers of it by name, for a line of metrics."""
        own = [f.name for f in fields(self) if f.name not in ("metrics", "measured")]
        return {name: getattr(self, name) for name in own} | dict(self.metrics)


class PendingResult:
    """A step that is on its way; its numbers lie on the device until `read`."""

    def __init__(
        self,
        numbers: Mapping[str, torch.Tensor] | None,
        objective: Objective,
        counts: GlobalCounts,
        pipeline: Axis,
        device: torch.device,
        norms: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        wanted: bool = True,
    ) -> None:
        """numbers: scalars by the names of `result_names`, where the head is, else None; what is missing is 0.
        AssertionError where there are others. norms: [2, parts] of gradient and update, the same on every process.
        features: [n, 2 D] latents and contexts, without values where the head is not; both None where nothing is
        measured. wanted: whether this process is to have the features."""
        self.counts = counts
        self._names, self._objective, self._pipeline = result_names(objective), objective, pipeline
        self._wanted = wanted
        self._norms, self._features = norms, features
        self._own = torch.zeros(len(self._names), device=device)
        if numbers is not None:
            undeclared = numbers.keys() - {*self._names}
            assert not undeclared, f"{type(objective).__name__}.metrics does not name {', '.join(sorted(undeclared))}"
            zero = self._own[0]
            self._own = torch.stack([numbers.get(name, zero).detach().float() for name in self._names])
        self._result: StepResult | None = None

    def read(self) -> StepResult:
        """The result; waits for the device, once. The processes of a pipeline call it together."""
        if self._result is None:
            self._result = self._read()
        return self._result

    def _read(self) -> StepResult:
        parts = [self._own] if self._features is None else [self._own, self._features.flatten()]
        flat, length = torch.cat(parts), len(self._names)
        if self._pipeline.size > 1:
            self._pipeline.broadcast(flat, source=self._pipeline.size - 1)
        if self._norms is None or self._features is None:
            return self._made(flat.tolist())
        if not self._wanted:
            flat = flat[:length]
        host = torch.cat([self._norms.flatten(), flat]).cpu()
        norms, numbers, features = host.split([self._norms.numel(), length, len(flat) - length])
        grads, updates = norms.view(2, -1).tolist()
        latents, contexts = features.view(-1, self._features.shape[1]).chunk(2, 1)
        measured = Measured(
            dict(zip(PARTS, grads, strict=True)), dict(zip(PARTS, updates, strict=True)), latents, contexts
        )
        return self._made(numbers.tolist(), measured)

    def _made(self, values: Sequence[float], measured: Measured | None = None) -> StepResult:
        numbers = dict(zip(self._names, values, strict=True))
        return StepResult(
            numbers["loss"],
            numbers["log_scale"],
            numbers["grad_norm"],
            **self.counts.counts,
            metrics={name: numbers[name] for name in self._objective.metrics},
            measured=measured,
        )


def result_names(objective: Objective) -> tuple[str, ...]:
    """The floating-point numbers of a step's result."""
    return ("loss", "log_scale", "grad_norm", *objective.metrics)
