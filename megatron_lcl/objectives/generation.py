"""The generation term: the mean negative log-likelihood of all targets of the global batch, in nats."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_lcl.model.activations import Outputs
from megatron_lcl.objectives.base import StepInputs, Term

METRICS = ("generation",)


class Generation(Term):
    """The mean over all targets; with weight 0 it is measured and has no gradient."""

    task = "generation"

    def __init__(self, step: StepInputs, weight: float) -> None:
        self.mesh, self.num_targets = step.mesh, max(step.counts.counts["num_targets"], 1)
        self.scale = weight / self.num_targets
        """what a target's negative log-likelihood counts for in the step's loss"""
        self.sum = torch.zeros((), dtype=torch.float32, device=step.log_scale.device)
        """of this replica's negative log-likelihoods so far"""
        self._total: torch.Tensor | None = None

    def surrogate(self, m: int, out: Outputs) -> torch.Tensor | None:
        self.sum += out.generation.detach()
        return out.generation * self.scale if self.scale else None

    def loss(self) -> torch.Tensor:
        total = self.total()
        return total * self.scale if self.scale else torch.zeros_like(total)

    def metrics(self) -> Mapping[str, torch.Tensor]:
        return {"generation": self.total() / self.num_targets}

    def total(self) -> torch.Tensor:
        """The sum over all replicas, which is asked for once all micro-batches were there."""
        if self._total is None:
            self._total = self.mesh.data.all_reduce(self.sum.clone())
        return self._total
