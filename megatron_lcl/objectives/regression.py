"""The regression term: the mean squared distance between each image's latent and what its context predicts.

    regression = 1/N sum over the N pairs of the global batch of |c_i - z_i|^2 / D

z_i is the image's latent as the pool gives it, c_i the head's projection of the language model's output at the image's
`<soi>`, both of width D and not normalized. No gradient is stopped: it reaches the encoder through z_i as well, so that
a z that is the same for all images, which any c predicts, has the smallest loss there is. Two metrics show it:
`latent_std`, the standard deviation of the latents over the global batch (the root of the variance's mean over the D
numbers), whose square is the loss of the best prediction that ignores the context; and `latent_spread`, that deviation
divided by the root mean square, 0 where all latents are the same and 1 where their mean is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_lcl.model.activations import Outputs
from megatron_lcl.objectives.base import StepInputs, Term
from megatron_lcl.parallel.mesh import Axis, Mesh

METRICS = ("regression", "latent_std", "latent_spread")
_DOUBLE = 8


class Regression(Term):
    """The mean over all pairs; their number is known beforehand, so micro-batches need nothing of each other."""

    task = "retrieval"

    def __init__(self, step: StepInputs, weight: float) -> None:
        self.batches, self.mesh, self.weight = step.batches, step.mesh, weight
        self.num_pairs = max(step.counts.counts["num_pairs"], 1)
        self.sums = torch.zeros((), dtype=torch.float64, device=step.log_scale.device)
        """[1 + 2D], once there was a micro-batch; of this replica's pairs so far: mean squared distances, latents [D],
        squared latents [D]; in float64, since variances are differences of these"""
        self._total: torch.Tensor | None = None

    def surrogate(self, m: int, out: Outputs) -> torch.Tensor:
        batch = self.batches[m]
        pairs = torch.nonzero_static(batch.image_soi >= 0, size=batch.num_pairs)[:, 0]
        latents_ND = out.latents[pairs]
        distance = (out.contexts[pairs] - latents_ND).square().mean(1).sum()
        with torch.no_grad():
            z = latents_ND.double()
            self.sums = self.sums + torch.cat([distance.double()[None], z.sum(0), z.square().sum(0)])
        return distance * (self.weight / self.num_pairs)

    def loss(self) -> torch.Tensor:
        return self.weight * self._means()[0].float()

    def metrics(self) -> Mapping[str, torch.Tensor]:
        means = self._means()
        mean_D, square_D = means[1:].chunk(2)
        variance, square = (square_D - mean_D.square()).clamp(min=0).mean(), square_D.mean()
        spread = torch.where(square > 0, variance / square, 0.0)
        return dict(zip(METRICS, (means[0], variance.sqrt(), spread.sqrt()), strict=True))

    def _means(self) -> torch.Tensor:
        """The means over all pairs, which are asked for once all micro-batches were there."""
        if self._total is None:
            self._total = self.mesh.data.all_reduce(self.sums.clone()) / self.num_pairs
        return self._total

    @classmethod
    def gathers(cls, pairs: Sequence[int], width: int, mesh: Mesh) -> list[tuple[Axis, int]]:
        return [(mesh.data, (1 + 2 * width) * _DOUBLE)] * 2  # one all-reduce of its sums
