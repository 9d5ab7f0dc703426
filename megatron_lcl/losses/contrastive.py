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
HEADER = 16
"""columns after the features in the gathered buffer; the first two hold a rank's status, the rest keeps rows aligned"""


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


class _Status:
    """What each rank found, on its way to the host while the device computes."""

    def __init__(self, status_R2: torch.Tensor) -> None:
        self._status_R2 = status_R2.float().to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if status_R2.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def get(self) -> list[list[float]]:
        """For each rank: 1 if its features are not what they should be, else 0; digest of its counts."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._status_R2.tolist()


@dataclass(eq=False)
class FeatureGather:
    """Features on their way to every rank; `finish_contrastive_loss` waits for them."""

    image_nD: torch.Tensor
    text_nD: torch.Tensor
    counts: tuple[int, ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None
    error: str | None = None
    """what is wrong with this rank's features"""
    own: torch.Tensor | None = None
    """[max(counts), 2D + HEADER]: what this rank sends, kept alive while it is being sent"""
    rows: torch.Tensor | None = None
    """what all ranks sent: [R * max(counts), 2D + HEADER] on the way, [N, 2D + HEADER] when there"""
    work: dist.Work | None = None
    status: _Status | None = None

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' image and text features, [N, D] each."""
        if self.rows is None:
            return self.image_nD, self.text_nD
        if self.work is not None:
            self.work.wait()
            self.work = self.own = None
            parts = self.rows.view(len(self.counts), -1, self.rows.shape[1])
            self.status = _Status(parts[:, 0, -HEADER : 2 - HEADER])
            if min(self.counts) < parts.shape[1]:
                self.rows = torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])
        width = self.image_nD.shape[1]
        return self.rows[:, :width], self.rows[:, width : 2 * width]

    def check(self) -> None:
        """Raises ValueError on every rank if anything is wrong on one."""
        if self.status is None:
            return
        ranks = self.status.get()
        if self.error is not None:
            raise ValueError(self.error)
        if bad := [rank for rank, (flag, _) in enumerate(ranks) if flag]:
            raise ValueError(
                f"rank(s) {bad} gave features that do not match counts {list(self.counts)}; see their errors"
            )
        if len({digest for _, digest in ranks}) > 1:
            raise ValueError(f"counts must be the same on every rank; rank {self.rank} was given {list(self.counts)}")


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
    counts: n of each rank of the group, in rank order, known to whoever built the batch; without it one small exchange
        (which makes the host wait for the device) finds out.

    `.loss` is the global mean, the same on every rank. Convention: sum. backward gives the gradient of that global mean
    with respect to this rank's own rows, and this rank's share of the gradient of log_scale; the shares sum to the
    whole over the group. backward sends nothing, and is once differentiable.

    Raises ValueError, on every rank of the group, if a rank's features are not two [n, D] tensors of one dtype, or not
    counts[rank] pairs; and on a caller that is not in the group. With counts, a width or dtype that differs between
    ranks cannot be seen. Non-finite features give a non-finite loss.
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
    error = _features_error(image_features, text_features)
    if group is None:
        if error is None and counts is not None and list(counts) != [len(image_features)]:
            error = f"counts {list(counts)} must be [{len(image_features)}], the pairs of the one process"
        if error is not None:
            raise ValueError(error)
        return FeatureGather(image_features.contiguous(), text_features.contiguous(), (len(image_features),))

    rank, size = rank_and_size(group)
    if counts is None:
        counts = _exchange_counts(image_features, text_features, error, group)
    elif len(counts) != size or min(counts) < 0:
        raise ValueError(
            f"counts {list(counts)} must hold one number of pairs, 0 or more, for each of the {size} ranks of the group"
        )
    elif error is None and counts[rank] != len(image_features):
        error = f"{len(image_features)} pairs given, but counts[{rank}] of {list(counts)} is {counts[rank]}"
    counts = tuple(int(count) for count in counts)
    if error is not None:  # take part with zeros, so that no rank waits in vain; all raise together in the end
        given = (image_features, text_features)
        width = max((features.shape[1] for features in given if features.ndim == 2), default=1)
        dtype = next((features.dtype for features in given if features.dtype in DTYPES), DTYPES[0])
        image_features = text_features = image_features.new_zeros(counts[rank], width, dtype=dtype)
    image_features, text_features = image_features.contiguous(), text_features.contiguous()
    own = _packed(image_features.detach(), text_features.detach(), max(1, *counts), error is not None, counts)
    rows = own.new_empty(size * len(own), own.shape[1])
    work = all_gather(rows, own, group=group, async_op=True)
    return FeatureGather(image_features, text_features, counts, rank, group, error, own, rows, work)


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
        gather.check()

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


def _exchange_counts(image: torch.Tensor, text: torch.Tensor, error: str | None, group: dist.ProcessGroup) -> list[int]:
    """Pairs of each rank. Whatever is wrong on any rank raises here, on every rank."""
    own = [1, 0, 0, 0] if error else [0, len(image), image.shape[1], DTYPES.index(image.dtype)]
    table = torch.empty(dist.get_world_size(group) * 4, dtype=torch.int64, device=image.device)
    all_gather(table, torch.tensor(own, dtype=torch.int64, device=image.device), group=group)
    rows = table.view(-1, 4).tolist()
    if error:
        raise ValueError(error)
    if bad := [rank for rank, row in enumerate(rows) if row[0]]:
        raise ValueError(f"rank(s) {bad} of the group gave image and text features that do not match; see their errors")
    if len({(width, dtype) for _, _, width, dtype in rows}) > 1:
        given = [(width, DTYPES[dtype]) for _, _, width, dtype in rows]
        raise ValueError(f"features must have one width and dtype on every rank, not {given} (in rank order)")
    return [n for _, n, _, _ in rows]


def _packed(image: torch.Tensor, text: torch.Tensor, rows: int, bad: bool, counts: tuple[int, ...]) -> torch.Tensor:
    """[rows, 2D + HEADER]: the modalities side by side, so that what all ranks send is two matrices as it arrives."""
    n, width = image.shape
    own = image.new_zeros(rows, 2 * width + HEADER)
    own[:n, :width], own[:n, width : 2 * width] = image, text
    own[0, -HEADER] = float(bad)
    own[0, 1 - HEADER] = float(zlib.crc32(repr(counts).encode()) % 256)  # a number every dtype holds exactly
    return own


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
