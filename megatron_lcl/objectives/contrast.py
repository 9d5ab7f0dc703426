"""The contrast of images with their contexts, negatives from the whole global batch, as one term of a step's loss.

It needs every micro-batch's features before the first backward. The loss is taken on detached features; its gradients
re-enter each micro-batch's graph as a weighted sum of its features. They are needed in the first backward only, so with
`recompute` the features travel while the first micro-batch's second forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.errors import UserError
from megatron_lcl.losses.contrastive import ContrastiveOutput, finish_contrastive_loss, start_gather
from megatron_lcl.losses.group import HEADER
from megatron_lcl.losses.sigmoid import SUMS, SigmoidOutput, finish_sigmoid_loss
from megatron_lcl.model.activations import Outputs, unit_norm
from megatron_lcl.objectives.base import GlobalCounts, StepInputs, Term, refuse_without_features
from megatron_lcl.parallel.mappings import shard_size
from megatron_lcl.parallel.mesh import Axis, Mesh

METRICS = ("contrastive", *ContrastiveOutput._fields[1:])
"""what `Contrast` measures, to be repeated in `Objective.metrics`"""
SIGMOID_METRICS = ("contrastive", *SigmoidOutput._fields[1:], "logit_bias")
"""what `SigmoidContrast` measures; the last one: the bias with which the step's loss was taken"""
_FLOAT, _LONG, _DOUBLE = 4, 8, 8


class Features:
    """Features of one micro-batch's pairs, attached to its graph."""

    def __init__(self, out: Outputs, batch: PackedBatch) -> None:
        pairs = torch.nonzero_static(batch.image_soi >= 0, size=batch.num_pairs)[:, 0]
        self.image, self.text = unit_norm(out.latents[pairs]), unit_norm(out.contexts[pairs])


@dataclass(frozen=True)
class ContrastGradients:
    """The contrastive loss of the global batch, and its weighted gradients for this replica's features."""

    output: ContrastiveOutput | SigmoidOutput
    """the same on every process of the pipeline stage"""
    loss: torch.Tensor
    """scalar: its loss times the objective's weight"""
    image: Sequence[torch.Tensor]
    """per micro-batch: gradient of the weighted global mean with respect to its image features [pairs, D]"""
    text: Sequence[torch.Tensor]
    numbers: torch.Tensor
    """[1] or [2] this replica's part of the gradient of the log scale, and of the logit bias where the model has one:
    the sum over replicas is the gradient"""


class Contrast(Term):
    """Symmetric InfoNCE over all pairs of the global batch. Its creation sends this replica's features."""

    task = "retrieval"
    all_features_first = True
    has_triton = True
    names: ClassVar[tuple[str, ...]] = METRICS
    """of the loss's outputs, as metrics"""
    sigmoid = False

    def __init__(self, step: StepInputs, weight: float) -> None:
        self.batches = step.batches
        self.bias = step.logit_bias if self.sigmoid else None
        if len(step.outputs) < len(step.batches):
            raise refuse_without_features(self, step.mesh.pipeline)
        with torch.no_grad():
            features = [Features(out, batch) for out, batch in zip(step.outputs, step.batches, strict=True)]
        self._finish: Callable[[], ContrastGradients] | None = start_contrast(
            features, step.log_scale, weight, step.counts, step.mesh, self.bias
        )
        self._found: ContrastGradients | None = None

    def surrogate(self, m: int, out: Outputs) -> torch.Tensor:
        if self._finish is not None:
            self._found, self._finish = self._finish(), None  # and all ranks' features are freed
        assert self._found is not None
        found, own = self._found, Features(out, self.batches[m])
        loss = out.log_scale.sum() * found.numbers[0] / len(self.batches)
        if self.bias is not None:
            assert out.logit_bias is not None
            loss = loss + out.logit_bias.sum() * found.numbers[1] / len(self.batches)
        return loss + (own.image * found.image[m]).sum() + (own.text * found.text[m]).sum()

    def loss(self) -> torch.Tensor:
        assert self._found is not None, "no surrogate was asked for"
        return self._found.loss

    def metrics(self) -> Mapping[str, torch.Tensor]:
        assert self._found is not None, "no surrogate was asked for"
        return dict(zip(self.names, self._found.output, strict=True))

    @classmethod
    def gathers(cls, pairs: Sequence[int], width: int, mesh: Mesh) -> list[tuple[Axis, int]]:
        """Features and sums once, nothing in backward; tensor ranks exchange rows of gradients."""
        stage, tensor = mesh.data_tensor, mesh.tensor
        most = max(1, *(shard_size(n, tensor) for n in pairs))
        own = shard_size(pairs[mesh.data.rank], tensor)
        sums = SUMS * _DOUBLE if cls.sigmoid else (5 + 2 * most) * _FLOAT  # the sigmoid's need nothing of a row
        of_rank = (HEADER * _LONG, most * 2 * width * _FLOAT, sums)
        return [*((stage, num * stage.size) for num in of_rank), (tensor, own * 2 * width * _FLOAT * tensor.size)]


class SigmoidContrast(Contrast):
    """The sigmoid loss over all pairs of the global batch (SigLIP). Its creation sends this replica's features."""

    has_triton = False
    names = SIGMOID_METRICS[:-1]
    sigmoid = True

    def __init__(self, step: StepInputs, weight: float) -> None:
        """UserError where the model has no bias, also of an objective that makes its own `terms`."""
        _check_bias(step.logit_bias)
        super().__init__(step, weight)

    @classmethod
    def check_config(cls, config: Config) -> None:
        _check_bias(config.model.logit_bias)

    def metrics(self) -> Mapping[str, torch.Tensor]:
        assert self.bias is not None
        return {**super().metrics(), "logit_bias": self.bias[0]}


def _check_bias(bias: object) -> None:
    """UserError where there is none: `config` gives one to `objective.name: siglip` only."""
    if bias is None:
        raise UserError(
            "model.logit_bias is null, and the objective's sigmoid contrast needs a bias; set SigLIP's: "
            "--model.logit_bias -10 --contrast.initial_log_scale 2.302585"
        )


def without_features(out: Outputs, batch: PackedBatch) -> torch.Tensor:
    """0, with the features in its graph: where nothing is contrasted their parameters have gradients, which are 0."""
    own = Features(out, batch)
    numbers = out.log_scale.sum() if out.logit_bias is None else out.log_scale.sum() + out.logit_bias.sum()
    return (own.image.sum() + own.text.sum() + numbers) * 0


def start_contrast(
    features: Sequence[Features],
    log_scale: torch.Tensor,
    weight: float,
    counts: GlobalCounts,
    mesh: Mesh,
    bias: torch.Tensor | None = None,
) -> Callable[[], ContrastGradients]:
    """Sends this replica's features to the others; what it returns waits for theirs, and is called once.

    The tensor-parallel ranks hold the same features; each computes a part of the rows. bias: of the sigmoid loss; None:
    the softmax's.
    """
    sizes_of_replicas = [_split_evenly(pairs, mesh.tensor.size) for pairs in counts.pairs]
    own = sizes_of_replicas[mesh.data.rank]
    sizes = [len(f.image) for f in features]
    image, text = (
        torch.cat(rows).detach().split(own)[mesh.tensor.rank].requires_grad_()
        for rows in ([f.image for f in features], [f.text for f in features])
    )
    scale = log_scale.detach().clone().requires_grad_()
    own_bias = None if bias is None else bias.detach().clone().requires_grad_()
    numbers = [scale] if own_bias is None else [scale, own_bias]
    of_ranks = [count for of_replica in sizes_of_replicas for count in of_replica]
    gather = start_gather(image, text, scale, counts=of_ranks, bias=own_bias, axis=mesh.data_tensor)

    def finish() -> ContrastGradients:
        with torch.enable_grad():
            finish_loss = finish_contrastive_loss if bias is None else finish_sigmoid_loss
            out = finish_loss(gather)
            loss = out.loss * weight
            image_grad, text_grad, *number_grads = torch.autograd.grad(loss, (image, text, *numbers))
        both = mesh.tensor.gather_ragged(torch.cat([image_grad, text_grad], 1), own)
        images, texts = (rows.split(sizes) for rows in both.split(image.shape[1], 1))
        return ContrastGradients(out, loss.detach(), images, texts, mesh.tensor.all_reduce(torch.cat(number_grads)))

    return finish


def _split_evenly(rows: int, size: int) -> list[int]:
    """Rows of each of `size` ranks, as equal as can be."""
    return [rows // size + (rank < rows % size) for rank in range(size)]
