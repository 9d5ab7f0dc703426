"""Symmetric InfoNCE over the pairs of all ranks: exact, ragged, without gradient traffic.

Shape legend: n own pairs, N pairs of all R ranks of the group, D feature width.

With x_i the image feature, t_i the context (text) feature, both of unit norm, and s = exp(log_scale)
(CLIP, arXiv 2103.00020, figure 3):

    a_i  = logsumexp_j s x_i.t_j        b_i = logsumexp_j s t_i.x_j
    loss = 1/(2N) sum_i (a_i + b_i - 2 s x_i.t_i)
    dx_i = s/(2N) [ sum_j (exp(s x_i.t_j - a_i) + exp(s x_i.t_j - b_j)) t_j - 2 t_i ]
    dt_i = s/(2N) [ sum_j (exp(s t_i.x_j - b_i) + exp(s t_i.x_j - a_j)) x_j - 2 x_i ]

A rank's gradient needs the features and the a and b of all ranks, and both are known after the forward pass: one
all-gather of the features, one of a and b, and nothing on the network in backward. Logits exist one tile at a time and
are computed again in backward, as in Inf-CL (arXiv 2410.17243): memory is O(n·D + N·D).

The gradient of log_scale is free: scaling x scales the logits as s does, hence dloss/dlog_scale = sum_i x_i.dx_i.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_lcl.losses import contrastive_tiles
from megatron_lcl.losses.group import all_gather, rank_and_size

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
    """log N - loss, in nats: the InfoNCE lower bound on the mutual information (arXiv 1807.03748, equation 5)"""


@dataclass(eq=False)
class FeatureGather:
    """Features on their way to every rank; `finish_contrastive_loss` waits for them."""

    image_nD: torch.Tensor
    text_nD: torch.Tensor
    counts: tuple[int, ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None
    own: torch.Tensor | None = None
    """[max(counts), 2D]: what this rank sends, kept alive while it is being sent"""
    rows: torch.Tensor | None = None
    """what all ranks sent: [R * max(counts), 2D] on the way, [N, 2D] when there"""
    work: dist.Work | None = None

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' image and text features, [N, D] each."""
        if self.rows is None:
            return self.image_nD, self.text_nD
        if self.work is not None:
            self.work.wait()
            self.work = self.own = None
            longest = max(self.counts)
            if min(self.counts) < longest:
                parts = self.rows.split(longest)
                self.rows = torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])
        width = self.image_nD.shape[1]
        return self.rows[:, :width], self.rows[:, width:]


def contrastive_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    log_scale: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    counts: Sequence[int] | None = None,
) -> ContrastiveOutput:
    """Symmetric InfoNCE of n own pairs against the N pairs of all ranks of `group`.

    image_features, text_features: [n, D], rows of unit norm; float32, bfloat16 or float16 (arithmetic in float32), or
        float64. D and the dtype are the same on every rank; n may differ and be 0.
    log_scale: natural log of the scale (the inverse temperature), shape [] or [1].
    group: the ranks whose pairs are each other's negatives; None: this process alone, also where torch.distributed is
        initialised.
    counts: n of each rank of the group, in rank order, if the caller knows it: it is compared with what the ranks say.

    `.loss` is the global mean, the same on every rank. Convention: sum. backward gives the gradient of that global mean
    with respect to this rank's own rows, and this rank's share of the gradient of log_scale; the shares sum to the
    whole over the group. backward sends nothing, and is once differentiable.

    Raises ValueError, on every rank of the group and before any feature is sent, if a rank's features are not two
    [n, D] tensors of one dtype, if D or the dtype differs between ranks, or if a rank's counts are not those of the
    group; and on a caller that is not in the group. Non-finite features give a non-finite loss.
    """
    return finish_contrastive_loss(start_gather(image_features, text_features, group, counts), log_scale)


def start_gather(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    counts: Sequence[int] | None = None,
) -> FeatureGather:
    """First half of `contrastive_loss`: sends this rank's features and returns while they travel.

    Every rank of the group calls it, then `finish_contrastive_loss`; what is computed in between overlaps with the
    transfer. Arguments and errors: `contrastive_loss`.
    """
    image_features, text_features = image_features.contiguous(), text_features.contiguous()
    error = _features_error(image_features, text_features)
    if group is None:
        alone = [len(image_features)] if error is None else []
        if error is None and counts is not None and list(counts) != alone:
            error = f"counts {list(counts)} must be {alone}, the pairs of the one process"
        if error is not None:
            raise ValueError(error)
        return FeatureGather(image_features, text_features, tuple(alone))

    rank, _ = rank_and_size(group)
    sizes = _exchange(image_features, error, counts, group)
    longest = max(sizes)
    if longest == 0:
        return FeatureGather(image_features, text_features, sizes, rank, group)
    own = image_features.new_zeros(longest, 2 * image_features.shape[1])  # side by side: two matrices as they arrive
    torch.cat([image_features.detach(), text_features.detach()], 1, out=own[: len(image_features)])
    rows = own.new_empty(len(sizes) * longest, own.shape[1])
    work = all_gather(rows, own, group=group, async_op=True)
    return FeatureGather(image_features, text_features, sizes, rank, group, own, rows, work)


def finish_contrastive_loss(gather: FeatureGather, log_scale: torch.Tensor) -> ContrastiveOutput:
    """Second half of `contrastive_loss`: waits for the features and computes the loss."""
    if log_scale.numel() != 1 or not log_scale.is_floating_point():
        # not a matter of the batch, hence the same on every rank
        raise ValueError(
            f"log_scale must be one floating-point number, not {log_scale.dtype} of shape {list(log_scale.shape)}"
        )
    outputs = _ContrastiveFunction.apply(gather.image_nD, gather.text_nD, log_scale, gather)
    return ContrastiveOutput(*outputs)


class _ContrastiveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image_nD, text_nD, log_scale, gather):
        dtype = torch.float64 if image_nD.dtype == torch.float64 else torch.float32
        offset, N = sum(gather.counts[: gather.rank]), sum(gather.counts)
        with torch.autocast(image_nD.device.type, enabled=False):
            scale = log_scale.to(dtype).exp().reshape(())
            image_ND, text_ND = (features.detach() for features in gather.wait())
            rows = _backend(image_nD).forward(image_nD, text_nD, image_ND, text_ND, offset, scale)

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
            sums, image_lse_N, text_lse_N = _gather_rows(gather, sums, lse_2n)

        ctx.save_for_backward(image_nD, text_nD, image_ND, text_ND, image_lse_N, text_lse_N, scale)
        ctx.offset, ctx.log_scale = offset, (log_scale.shape, log_scale.dtype)
        loss, image_hits, text_hits, positive_mean, hardest_mean = (sums / max(N, 1)).unbind()
        if N < 2:
            hardest_mean = torch.full_like(hardest_mean, -1.0)
        statistics = (image_hits, text_hits, positive_mean, hardest_mean, math.log(max(N, 1)) - loss)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        image_nD, text_nD, image_ND, text_ND, image_lse_N, text_lse_N, scale = ctx.saved_tensors
        with torch.autocast(image_nD.device.type, enabled=False):
            factor = grad.to(scale.dtype) * scale / (2 * max(1, len(image_ND)))
            image_grad, text_grad, scale_grad = _backend(image_nD).backward(
                image_nD, text_nD, image_ND, text_ND, image_lse_N, text_lse_N, ctx.offset, scale, factor
            )
        shape, dtype = ctx.log_scale
        return image_grad.to(image_nD.dtype), text_grad.to(text_nD.dtype), scale_grad.to(dtype).reshape(shape), None


def _backend(features: torch.Tensor) -> ModuleType:
    if features.is_cuda and features.dtype != torch.float64:
        from megatron_lcl.losses import contrastive_triton

        return contrastive_triton
    return contrastive_tiles


def _features_error(image: torch.Tensor, text: torch.Tensor) -> str | None:
    if image.ndim != 2 or image.shape != text.shape:
        return f"image and text features must both be [pairs, width], not {list(image.shape)} and {list(text.shape)}"
    if image.dtype != text.dtype or image.dtype not in DTYPES:
        return f"image and text features must be of one floating-point dtype, not {image.dtype} and {text.dtype}"
    if image.device != text.device:
        return f"image and text features must be on one device, not {image.device} and {text.device}"
    return None


def _exchange(
    image: torch.Tensor, error: str | None, counts: Sequence[int] | None, group: dist.ProcessGroup
) -> tuple[int, ...]:
    """Pairs of each rank. Whatever is wrong on any rank raises here, on every rank.

    Ranks whose messages differ in size hang or abort, so nothing else is sent before this: five integers, which every
    host has before its device has computed anything. A stream of its own keeps the host from waiting for the device.
    """
    given = 0 if counts is None else _digest(counts)
    own = [1, 0, 0, 0, 0] if error else [0, len(image), image.shape[1], DTYPES.index(image.dtype), given]
    stream = torch.cuda.Stream(image.device) if image.is_cuda else None
    with torch.cuda.stream(stream):
        sent = torch.tensor(own, dtype=torch.int64, device=image.device)
        table = sent.new_empty(dist.get_world_size(group) * len(own))
        all_gather(table, sent, group=group)
        ranks = table.view(-1, len(own)).tolist()
    if error:
        raise ValueError(error)
    if bad := [rank for rank, (flag, *_) in enumerate(ranks) if flag]:
        raise ValueError(f"rank(s) {bad} of the group gave image and text features that do not match; see their errors")
    if len({(width, dtype) for _, _, width, dtype, _ in ranks}) > 1:
        described = [(width, DTYPES[dtype]) for _, _, width, dtype, _ in ranks]
        raise ValueError(f"features must have one width and dtype on every rank, not {described} (in rank order)")
    sizes = tuple(n for _, n, _, _, _ in ranks)
    if bad := [rank for rank, (*_, digest) in enumerate(ranks) if digest not in (0, _digest(sizes))]:
        own_counts = f"; this rank's are {list(counts)}" if counts is not None else ""
        raise ValueError(
            f"counts must be {list(sizes)}, the pairs given on each rank, but not on rank(s) {bad}{own_counts}"
        )
    return sizes


def _digest(counts: Sequence[int]) -> int:
    return 1 + zlib.crc32(repr([int(count) for count in counts]).encode())


def _gather_rows(
    gather: FeatureGather, sums: torch.Tensor, lse_2n: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over all ranks, and every row's image and text log-sum-exp, each [N], in one all-gather."""
    if gather.group is None:
        return sums, lse_2n[0], lse_2n[1]
    rows = max(gather.counts)
    own = sums.new_zeros(len(sums) + 2 * rows)
    own[: len(sums)] = sums
    for k, lse_n in enumerate(lse_2n):
        own[len(sums) + k * rows :][: len(lse_n)] = lse_n
    table = own.new_empty(len(gather.counts), len(own))
    all_gather(table.view(-1), own, group=gather.group)
    image, text = (
        torch.cat([row[start : start + count] for row, count in zip(table, gather.counts, strict=True)])
        for start in (len(sums), len(sums) + rows)
    )
    return table[:, : len(sums)].sum(0), image, text
