"""Symmetric InfoNCE over the pairs of all ranks: exact, ragged, without gradient traffic.

Shape legend: n own pairs, N pairs of all R ranks of the group, D feature width.

With x_i the image feature, t_i the context (text) feature, both of unit norm, and s = exp(log_scale)
(CLIP, arXiv 2103.00020, figure 3):

    a_i  = logsumexp_j s x_i.t_j        b_i = logsumexp_j s t_i.x_j
    loss = 1/(2N) sum_i (a_i + b_i - 2 s x_i.t_i)
    dx_i = s/(2N) [ sum_j (exp(s x_i.t_j - a_i) + exp(s x_i.t_j - b_j)) t_j - 2 t_i ]
    dt_i = s/(2N) [ sum_j (exp(s t_i.x_j - b_i) + exp(s t_i.x_j - a_j)) x_j - 2 x_i ]

Of the own pair's weight, exp(s x_i.t_i - a_i) + exp(s x_i.t_i - b_i) - 2, float32 keeps little once the pairs are told
apart well (a_i is near 100 there); it is computed as -sigmoid(a'_i - s x_i.t_i) - sigmoid(b'_i - s x_i.t_i), a' and b'
being the logsumexp of the negatives alone, and so is exact at the smallest loss.

A rank's gradient needs the features and the a and b of all ranks, and both are known after the forward pass: one
all-gather of the features, one of a and b, and nothing on the network in backward. Logits exist one tile at a time and
are computed again in backward, as in Inf-CL (arXiv 2410.17243): memory is O(n·D + N·D).

The gradient of log_scale is free: scaling x scales the logits as s does, hence dloss/dlog_scale = sum_i x_i.dx_i.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_lcl.losses import contrastive_tiles
from megatron_lcl.losses.derivatives import first_derivative_only
from megatron_lcl.losses.group import exchange
from megatron_lcl.losses.kernels import triton_fault
from megatron_lcl.parallel.mesh import Axis, Pending

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ContrastiveOutput(NamedTuple):
    """Scalars over all N pairs, the same on every rank. Only `loss` carries a gradient."""

    loss: torch.Tensor
    """mean of both directions' cross-entropy, in nats; 0 if there are no pairs"""
    image_accuracy: torch.Tensor
    """share of images that are more similar to their own text than to any other (a tie counts as a miss)"""
    text_accuracy: torch.Tensor
    """share of texts that are more similar to their own image than to any other"""
    positive_similarity: torch.Tensor
    """mean cosine similarity of the pairs"""
    hardest_negative_similarity: torch.Tensor
    """mean, over images and texts, of the similarity to the most similar other; -1 where there is no other"""
    mutual_information: torch.Tensor
    """log N - loss, in nats: the InfoNCE lower bound on the mutual information (arXiv 1807.03748, section 2.3;
    derived in appendix A.1)"""


@dataclass(eq=False)
class FeatureGather:
    """Features on their way to every rank; `finish_contrastive_loss` waits for them."""

    image_nD: torch.Tensor
    text_nD: torch.Tensor
    log_scale: torch.Tensor
    counts: tuple[int, ...]
    """pairs of each rank"""
    kernels: ModuleType
    """what does the arithmetic"""
    axis: Axis
    rows: Pending | None
    """[N, 2D], what all ranks sent; None where nothing is sent"""
    bias: torch.Tensor | None = None
    """of the sigmoid loss"""

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' image and text features, [N, D] each."""
        if self.rows is None:
            return self.image_nD, self.text_nD
        rows = self.rows.wait()
        width = self.image_nD.shape[1]
        return rows[:, :width], rows[:, width:]


def contrastive_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    log_scale: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    counts: Sequence[int] | None = None,
    kernels: ModuleType | None = None,
) -> ContrastiveOutput:
    """Symmetric InfoNCE of n own pairs against the N pairs of all ranks of `group`.

    image_features, text_features: [n, D], rows of unit norm; float32, bfloat16 or float16 (arithmetic in float32), or
        float64. D and the dtype are the same on every rank; n may differ and be 0.
    log_scale: natural log of the scale (the inverse temperature), shape [] or [1].
    group: the ranks whose pairs are each other's negatives; None: this process alone, also where torch.distributed is
        initialized.
    counts: n of each rank of the group, in rank order, if the caller knows it: it is compared with what the ranks say.
    kernels: the module that does the arithmetic, `contrastive_tiles` or `contrastive_triton`; None: chosen by device.

    `.loss` is the global mean, the same on every rank. Convention: sum. backward gives the gradient of that global mean
    with respect to this rank's own rows, and this rank's part of the gradient of log_scale; the sum over the group is
    the gradient. backward sends nothing.

    Raises ValueError, on every rank of the group and before any feature is sent, if a rank's features are not two
    [n, D] tensors of one dtype on one device from which the group sends, if its log_scale is not one number there, if D
    or the dtype differs between ranks, or if a rank's counts are not those of the group; and on a caller that is not in
    the group. Non-finite features give a non-finite loss. First derivatives only: a backward with create_graph=True is
    a RuntimeError.
    """
    return finish_contrastive_loss(start_gather(image_features, text_features, log_scale, group, counts, kernels))


def start_gather(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    log_scale: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    counts: Sequence[int] | None = None,
    kernels: ModuleType | None = None,
    bias: torch.Tensor | None = None,
    axis: Axis | None = None,
) -> FeatureGather:
    """First half of `contrastive_loss`, and of `sigmoid.sigmoid_loss`: sends this rank's features and returns while
    they travel.

    Every rank of the group calls it, then `finish_contrastive_loss` (or `finish_sigmoid_loss`); what is computed in
    between overlaps with the transfer. Arguments and errors: as there.

    bias: of the sigmoid loss, which needs it, on every rank; None: for `finish_contrastive_loss`, which takes none.
    axis: in place of `group`, with what it knows of how the hosts meet.
    """
    axis = axis or Axis.of_group(group)
    sizes = _sizes(image_features, text_features, log_scale, bias, axis, counts)
    image_features, text_features = image_features.contiguous(), text_features.contiguous()
    kernels = kernels or _backend(image_features)
    rows = None
    if axis.group is not None and max(sizes) > 0:
        # side by side: two matrices as they arrive
        own = torch.cat([image_features.detach(), text_features.detach()], 1)
        rows = axis.start_gather_ragged(own, sizes)
    return FeatureGather(image_features, text_features, log_scale, sizes, kernels, axis, rows, bias)


def finish_contrastive_loss(gather: FeatureGather) -> ContrastiveOutput:
    """Second half of `contrastive_loss`: waits for the features and computes the loss. ValueError for a gather that was
    started with a bias."""
    if gather.bias is not None:
        raise ValueError(
            "this gather has a bias, which is the sigmoid loss's: finish_sigmoid_loss, or start without it"
        )
    outputs = _ContrastiveFunction.apply(gather.image_nD, gather.text_nD, gather.log_scale, gather)
    return ContrastiveOutput(*outputs)


class _ContrastiveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image_nD, text_nD, log_scale, gather):
        dtype = torch.float64 if image_nD.dtype == torch.float64 else torch.float32
        offset, N = sum(gather.counts[: gather.axis.rank]), sum(gather.counts)
        with torch.autocast(image_nD.device.type, enabled=False):
            scale = log_scale.to(dtype).exp().reshape(())
            image_ND, text_ND = (features.detach() for features in gather.wait())
            rows = gather.kernels.forward(image_nD, text_nD, image_ND, text_ND, offset, scale)

            # logsumexp - positive as log(1 + exp(negatives - positive)): exact also when the loss is tiny. The last
            # term is 0, or NaN where a positive is infinite, which the first alone would hide.
            positive = rows.positive
            zero = torch.zeros_like(positive)
            row_losses = [
                torch.logaddexp(negatives - positive, zero) + (positive - positive)
                for negatives in (rows.image_lse, rows.text_lse)
            ]
            hardest = (rows.image_hardest, rows.text_hardest)
            sums = torch.stack(
                [(row_losses[0] + row_losses[1]).sum() / 2]
                + [(positive > h).sum(dtype=dtype) for h in hardest]
                + [positive.sum() / scale, (hardest[0] + hardest[1]).sum() / 2 / scale]
            )
            lse_2n = [torch.logaddexp(negatives, positive) for negatives in (rows.image_lse, rows.text_lse)]
            # for the gradient, 1 - exp(positive - logsumexp) of both directions, exact for the same reason
            shortfall_n = torch.sigmoid(rows.image_lse - positive) + torch.sigmoid(rows.text_lse - positive)
            sums, image_lse_N, text_lse_N = _gather_rows(gather, sums, lse_2n)

        ctx.save_for_backward(image_nD, text_nD, image_ND, text_ND, image_lse_N, text_lse_N, shortfall_n, scale)
        ctx.offset, ctx.log_scale, ctx.kernels = offset, (log_scale.shape, log_scale.dtype), gather.kernels
        loss, image_hits, text_hits, positive_mean, hardest_mean = (sums / max(N, 1)).unbind()
        if N < 2:
            hardest_mean = torch.full_like(hardest_mean, -1.0)
        statistics = (image_hits, text_hits, positive_mean, hardest_mean, math.log(max(N, 1)) - loss)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @first_derivative_only("contrastive_loss")
    def backward(ctx, grad, *_):
        *features, image_lse_N, text_lse_N, shortfall_n, scale = ctx.saved_tensors
        image_nD, text_nD, image_ND, _ = features
        with torch.autocast(image_nD.device.type, enabled=False):
            factor = grad.to(scale.dtype) * scale / (2 * max(1, len(image_ND)))
            image_grad, text_grad, scale_grad = ctx.kernels.backward(
                *features, image_lse_N, text_lse_N, shortfall_n, ctx.offset, scale, factor
            )
        shape, dtype = ctx.log_scale
        return image_grad.to(image_nD.dtype), text_grad.to(text_nD.dtype), scale_grad.to(dtype).reshape(shape), None


def _backend(features: torch.Tensor) -> ModuleType:
    if features.is_cuda and features.dtype != torch.float64 and triton_fault() is None:
        from megatron_lcl.losses import contrastive_triton

        return contrastive_triton
    return contrastive_tiles


def _sizes(
    image: torch.Tensor,
    text: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor | None,
    axis: Axis,
    counts: Sequence[int] | None,
) -> tuple[int, ...]:
    """Pairs of each rank. Whatever is wrong on any rank raises here, on every rank."""
    numbers = {"log_scale": log_scale} if bias is None else {"log_scale": log_scale, "bias": bias}
    error, digest = _error(image, text, numbers), 0
    if counts is not None:
        try:
            digest = _digest(counts)
        except TypeError:
            error = error or f"counts must be integers, one per rank, not {counts}"
    facts, device = (0,) * 5, torch.device("cpu")  # where the features may be no tensors
    if error is None:
        facts, device = (len(image), image.shape[1], DTYPES.index(image.dtype), bias is not None, digest), image.device
    ranks = exchange(facts, error, device, axis)
    if len({(width, dtype) for _, width, dtype, *_ in ranks}) > 1:
        described = [(width, DTYPES[dtype]) for _, width, dtype, *_ in ranks]
        raise ValueError(f"features must have one width and dtype on every rank, not {described} (in rank order)")
    if len({biased for *_, biased, _ in ranks}) > 1:
        without = [rank for rank, (*_, biased, _) in enumerate(ranks) if not biased]
        raise ValueError(
            f"bias must be given on every rank, for the sigmoid loss, or on none; rank(s) {without} lack it"
        )
    sizes = tuple(n for n, *_ in ranks)
    if bad := [rank for rank, (*_, digest) in enumerate(ranks) if digest not in (0, _digest(sizes))]:
        own_counts = f"; this rank's are {list(counts)}" if counts is not None else ""
        raise ValueError(
            f"counts must be {list(sizes)}, the pairs given on each rank, but not on rank(s) {bad}{own_counts}"
        )
    return sizes


def _error(image: torch.Tensor, text: torch.Tensor, numbers: Mapping[str, torch.Tensor]) -> str | None:
    for name, given in {"image features": image, "text features": text, **numbers}.items():
        if not isinstance(given, torch.Tensor):
            return f"{name} must be a tensor, not {type(given).__name__}"
    if image.ndim != 2 or image.shape != text.shape:
        return f"image and text features must both be [pairs, width], not {list(image.shape)} and {list(text.shape)}"
    if image.dtype != text.dtype or image.dtype not in DTYPES:
        return f"image and text features must be of one floating-point dtype, not {image.dtype} and {text.dtype}"
    for name, number in numbers.items():
        if number.numel() != 1 or not number.is_floating_point():
            return f"{name} must be one floating-point number, not {number.dtype} of shape {list(number.shape)}"
        if not image.device == text.device == number.device:
            devices = f"{image.device}, {text.device} and {number.device}"
            return f"image features, text features and {name} must be on one device, not {devices}"
    return None


def _digest(counts: Sequence[int]) -> int:
    return 1 + zlib.crc32(repr([operator.index(count) for count in counts]).encode())


def _gather_rows(
    gather: FeatureGather, sums: torch.Tensor, lse_2n: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over all ranks, and every row's image and text log-sum-exp, each [N], in one all-gather."""
    if gather.axis.group is None:
        return sums, lse_2n[0], lse_2n[1]
    rows = max(gather.counts)
    own = sums.new_zeros(len(sums) + 2 * rows)
    own[: len(sums)] = sums
    for k, lse_n in enumerate(lse_2n):
        own[len(sums) + k * rows :][: len(lse_n)] = lse_n
    table = gather.axis.all_gather(own)
    image, text = (
        torch.cat([row[start : start + count] for row, count in zip(table, gather.counts, strict=True)])
        for start in (len(sums), len(sums) + rows)
    )
    return table[:, : len(sums)].sum(0), image, text
