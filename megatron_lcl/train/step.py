"""One optimizer step on one global batch: both losses, means over the whole of it, negatives from the whole of it.

The contrast needs every micro-batch's features before the first backward. `retain` keeps the graphs of all forwards,
`recompute` runs the forwards twice and keeps none; both give the same gradients. The loss is taken on detached
features; its gradients re-enter each micro-batch's graph as a weighted sum of its features. They are needed in the
first backward only, so in `recompute` the features travel while the first micro-batch's second forward runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.losses.contrastive import ContrastiveOutput, finish_contrastive_loss, start_gather
from megatron_lcl.model.layers import MAX_LOG_SCALE, Outputs
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.master_weights import read_log_scale, update_log_scale


@dataclass(frozen=True)
class StepResult:
    """What a step gave; the same on every process.

    `generation` and `contrastive` are unweighted global means, in nats. What is said of the contrast is over all pairs
    of the global batch (`losses.contrastive.ContrastiveOutput`), and 0 where the objective has none.
    """

    loss: float
    """what the step minimizes: the weighted sum of both"""
    generation: float
    contrastive: float
    log_scale: float
    grad_norm: float
    image_accuracy: float
    text_accuracy: float
    positive_similarity: float
    hardest_negative_similarity: float
    mutual_information: float
    num_targets: int
    num_pairs: int
    num_images: int
    num_tokens: int
    num_bad_images: int


_OF_CONTRAST = ("contrastive", *ContrastiveOutput._fields[1:])
_COUNTS = ("num_pairs", "num_targets", "num_images", "num_tokens", "num_bad_images")


@dataclass(frozen=True)
class GlobalCounts:
    """Counts of the global batch, known to every process before the forward."""

    counts: dict[str, int]
    """num_pairs, num_targets, num_images, num_tokens, num_bad_images of the global batch"""
    pairs: list[int]
    """pairs of each data-parallel replica"""

    @classmethod
    def of(cls, batches: Sequence[PackedBatch], mesh: Mesh, device: torch.device) -> GlobalCounts:
        """From the micro-batches of this replica; one small exchange over the data axis."""
        own = torch.tensor([sum(getattr(batch, name) for batch in batches) for name in _COUNTS], device=device)
        table = own[None]
        if mesh.data.group is not None:
            everyone = [torch.empty_like(own) for _ in range(mesh.data.size)]
            dist.all_gather(everyone, own, group=mesh.data.group)
            table = torch.stack(everyone)
        table = table.cpu()
        return cls(dict(zip(_COUNTS, table.sum(0).tolist(), strict=True)), table[:, 0].tolist())


class Features:
    """Features of one micro-batch's pairs, attached to its graph."""

    def __init__(self, out: Outputs, batch: PackedBatch) -> None:
        pairs = torch.nonzero_static(batch.image_soi >= 0, size=batch.num_pairs)[:, 0]
        self.image, self.text = out.image_features[pairs], out.text_features[pairs]


@dataclass(frozen=True)
class Contrast:
    """The contrastive loss of the global batch, and its weighted gradients for this replica's features."""

    output: ContrastiveOutput
    """the same on every process of the stage"""
    loss: torch.Tensor
    """scalar: its loss times the objective's weight"""
    image: Sequence[torch.Tensor]
    """per micro-batch: gradient of the weighted global mean with respect to its image features [pairs, D]"""
    text: Sequence[torch.Tensor]
    scale: torch.Tensor
    """[1] this replica's share of the gradient of the log scale: the sum over replicas is the gradient"""


def start_contrast(
    features: Sequence[Features], log_scale: torch.Tensor, weight: float, totals: GlobalCounts, mesh: Mesh
) -> Callable[[], Contrast]:
    """Sends this replica's features to the others; what it returns waits for theirs, and is called once.

    The tensor-parallel ranks hold the same features; each computes a share of the rows.
    """
    shares = [_shares(pairs, mesh.tensor.size) for pairs in totals.pairs]
    own = shares[mesh.data.rank]
    sizes = [len(f.image) for f in features]
    image, text = (
        torch.cat(rows).detach().split(own)[mesh.tensor.rank].requires_grad_()
        for rows in ([f.image for f in features], [f.text for f in features])
    )
    scale = log_scale.detach().clone().requires_grad_()
    counts = [count for of_replica in shares for count in of_replica]
    gather = start_gather(image, text, scale, group=mesh.data_tensor.group, counts=counts)

    def finish() -> Contrast:
        with torch.enable_grad():
            out = finish_contrastive_loss(gather)
            loss = out.loss * weight
            image_grad, text_grad, scale_grad = torch.autograd.grad(loss, (image, text, scale))
        both = _gather_rows(torch.cat([image_grad, text_grad], 1), own, mesh)
        images, texts = (rows.split(sizes) for rows in both.split(image.shape[1], 1))
        return Contrast(out, loss.detach(), images, texts, mesh.tensor.all_reduce(scale_grad))

    return finish


def _shares(rows: int, size: int) -> list[int]:
    """Rows of each of `size` ranks, as equal as can be."""
    return [rows // size + (rank < rows % size) for rank in range(size)]


def _gather_rows(own: torch.Tensor, shares: list[int], mesh: Mesh) -> torch.Tensor:
    """Every tensor-parallel rank's rows, in order."""
    if mesh.tensor.group is None:
        return own
    padded = own.new_zeros(max(shares), own.shape[1])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded, group=mesh.tensor.group)
    return torch.cat([part[:count] for part, count in zip(parts, shares, strict=True)])


def nan_if_rejected(surrogate_loss: torch.Tensor, loss: torch.Tensor, limit: float) -> torch.Tensor:
    """The surrogate as it is where the step's loss is finite and not above `limit`, else NaN, with NaN as gradients.

    Before every optimizer step DeepSpeed asks all processes together whether a gradient is not finite, as it must for
    float16, and if so leaves parameters and optimizer as they are. So one question serves losses and gradients, every
    precision, ZeRO stage and pipeline part, no process can decide alone, and the device is not waited for. Only the
    last micro-batch need be refused; the processes of a pipeline's last stage refuse, and the rest get NaN from them.
    """
    good = torch.isfinite(loss) & (loss <= limit)
    return surrogate_loss * torch.where(good, 1.0, torch.nan)


def surrogate(
    out: Outputs,
    own: Features,
    contrast: Contrast | None,
    micro_batch: int,
    num_micro_batches: int,
    generation_scale: float,
) -> torch.Tensor:
    """A scalar whose gradient, summed over micro-batches and replicas, is that of the step's loss.

    generation_scale: what a target's negative log-likelihood counts for in the step's loss.
    """
    if contrast is None:  # in the graph all the same: its parameters have gradients, which are 0
        loss = (own.image.sum() + own.text.sum() + out.log_scale.sum()) * 0
    else:
        loss = out.log_scale.sum() * contrast.scale.sum() / num_micro_batches
        loss = loss + (own.image * contrast.image[micro_batch]).sum() + (own.text * contrast.text[micro_batch]).sum()
    return loss + out.generation * generation_scale if generation_scale else loss


def without_targets(batch: PackedBatch) -> PackedBatch:
    """The batch for a pass of which only the features are wanted: the head multiplies no row with the vocabulary."""
    return dataclasses.replace(batch, num_targets=0)


class StepLoss:
    """What a step minimises, micro-batch by micro-batch, where the head's outputs are."""

    def __init__(
        self,
        outputs: Sequence[Outputs],
        batches: Sequence[PackedBatch],
        log_scale: torch.Tensor,
        totals: GlobalCounts,
        limit: float,
        config: Config,
        mesh: Mesh,
    ) -> None:
        """outputs: of every micro-batch of the replica, with or without graphs; none where nothing is contrasted.

        Their features are sent; the others' are waited for when the first surrogate is asked for.
        """
        self.batches, self.totals, self.limit, self.mesh = batches, totals, limit, mesh
        contrastive_weight, generation_weight = config.objective.weights
        self.generation_scale = generation_weight / max(totals.counts["num_targets"], 1)
        self.generation = torch.zeros((), dtype=torch.float32, device=log_scale.device)
        """sum of the negative log-likelihoods so far"""
        self.contrast: Contrast | None = None
        self._finish_contrast: Callable[[], Contrast] | None = None
        if outputs:
            with torch.no_grad():
                features = [Features(out, batch) for out, batch in zip(outputs, batches, strict=True)]
            self._finish_contrast = start_contrast(features, log_scale, contrastive_weight, totals, mesh)

    def of(self, m: int, out: Outputs) -> torch.Tensor:
        """The surrogate of micro-batch m, from its outputs with their graph; asked for in order."""
        if self._finish_contrast is not None:
            self.contrast, self._finish_contrast = self._finish_contrast(), None  # and all ranks' features are freed
        own, num = Features(out, self.batches[m]), len(self.batches)
        loss = surrogate(out, own, self.contrast, m, num, self.generation_scale)
        self.generation += out.generation.detach()
        if m < num - 1:
            return loss
        return nan_if_rejected(loss, self.means()[0], self.limit)

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scalars, once all micro-batches were there: the step's loss, and the generation loss in it, global means."""
        total = self.mesh.data.all_reduce(self.generation.clone())
        loss = total * self.generation_scale if self.generation_scale else torch.zeros_like(total)
        if self.contrast is not None:
            loss = loss + self.contrast.loss
        return loss, total / max(self.totals.counts["num_targets"], 1)

    def result(self, log_scale: torch.Tensor, grad_norm: float) -> StepResult:
        """After the optimizer's step; log_scale: [1], as it is now."""
        loss, generation = self.means()
        values = {"loss": loss, "generation": generation, "log_scale": log_scale[0]}
        contrast = self.contrast.output if self.contrast is not None else (torch.zeros_like(loss),) * len(_OF_CONTRAST)
        values |= dict(zip(_OF_CONTRAST, contrast, strict=True))
        numbers = torch.stack([v.detach().float() for v in values.values()]).tolist()  # one wait for the device
        return StepResult(**dict(zip(values, numbers, strict=True)), grad_norm=grad_norm, **self.totals.counts)


class Stepper:
    """Runs steps on a DeepSpeed engine without a pipeline."""

    def __init__(self, engine: Any, config: Config, mesh: Mesh) -> None:
        self.engine, self.config, self.mesh = engine, config, mesh
        self.with_contrast = config.objective.name != "generation"
        self.retain = self.with_contrast and config.contrast.strategy == "retain"

    @torch.no_grad()
    def forward(self, batches: Sequence[PackedBatch]) -> list[Outputs]:
        """What the model makes of this replica's micro-batches; no step."""
        log_scale = read_log_scale(self.engine.module[-1].log_scale)
        return [self.engine(batch)._replace(log_scale=log_scale) for batch in batches]

    def run(self, batches: Sequence[PackedBatch], lr: float, limit: float = math.inf) -> StepResult:
        """One step on this replica's micro-batches, which lie on the engine's device.

        A step whose loss is not finite or above `limit`, or whose gradient is not finite, changes nothing: see
        `nan_if_rejected` and the engine's `was_step_applied`.
        """
        engine, config, mesh = self.engine, self.config, self.mesh
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        totals = GlobalCounts.of(batches, mesh, engine.device)
        head = engine.module[-1]
        outputs: list[Outputs] = []
        if self.with_contrast:
            with torch.set_grad_enabled(self.retain):
                outputs = [engine(batch if self.retain else without_targets(batch)) for batch in batches]
        loss = StepLoss(outputs, batches, read_log_scale(head.log_scale), totals, limit, config, mesh)
        undo_means = mesh.data.size * len(batches)  # DeepSpeed averages over both; ours is one global mean
        for m, batch in enumerate(batches):
            out = outputs[m] if self.retain else engine(batch)
            engine.backward(loss.of(m, out) * undo_means)
            engine.step()
        update_log_scale(head.log_scale, lambda value: value.clamp(0, MAX_LOG_SCALE))
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        return loss.result(read_log_scale(head.log_scale), grad_norm)
