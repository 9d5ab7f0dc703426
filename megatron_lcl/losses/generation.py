"""Next-token cross-entropy from hidden states and the head's weight, without the logits ever existing at once.

Shape legend: R rows that have a target, D width, V vocabulary entries of this rank, c rows of one chunk.

The gradient is computed together with the loss while a chunk's logits are there, as in liger-kernel (arXiv 2410.10989,
section 3.2): three matrix products, like the plain formula, and neither logits nor the weight are kept for backward. So
a weight that DeepSpeed's ZeRO-3 gathers for its module's forward is needed for that long only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_lcl.losses.group import all_gather, rank_and_size

CHUNK_ROWS = 256


def generation_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Sum over rows of -log p(target), in nats: a float32 scalar, the same on every rank of the group.

    hidden: [R, D], only the rows that have a target, after the final norm; the same on every rank of the group. R may
        be 0 (on all of them).
    weight: [V, D], this rank's rows of the head; the vocabulary is split in rank order into equal parts.
    targets: [R] int32 or int64 in [0, vocab_size); one outside makes the loss infinite (no check, so no host sync).
    group: the tensor-parallel ranks that share the vocabulary; None: all of it is here.
    vocab_size: the real size, where the last rows of the last ranks' weights are padding: those never count, and their
        gradient is zero. None: no padding.

    hidden and weight are of one dtype (under autocast they are converted to its dtype): float32, bfloat16 or float16
    (logits, their exponentials and sums over rows in float32), or float64 (then so is the result).

    Convention over the group: sum. weight gets the whole gradient of its rows; hidden gets this rank's share, and the
    shares sum to the whole. So hidden is entered through the usual copy whose backward all-reduces over the group, or
    the sequence-parallel gather whose backward reduce-scatters.

    The gradient is computed in forward, if gradients are enabled and asked for, and handed out once: a second backward
    (retain_graph) raises RuntimeError. Raises ValueError for shapes, dtypes or a vocab_size that do not fit, and on a
    caller that is not in the group.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [rows, D], [vocabulary, D]"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"targets must be {len(hidden)} int32 or int64 numbers, one per row of hidden, "
            f"not {targets.dtype} of shape {list(targets.shape)}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must be of one floating-point dtype, not {hidden.dtype}, {weight.dtype}")
    rank, size = rank_and_size(group)
    places = size * len(weight)
    vocab_size = places if vocab_size is None else vocab_size
    if not 0 < vocab_size <= places:
        raise ValueError(f"vocab_size {vocab_size} must be 1 to {places}, the weight's rows on all {size} rank(s)")
    first = rank * len(weight)
    num_real = min(max(vocab_size - first, 0), len(weight))
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _GenerationFunction.apply(hidden, weight, targets, group, first, num_real, with_gradient)


class _GenerationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, group, first, num_real, with_gradient):
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:2]]
        with torch.autocast(hidden_RD.device.type, enabled=False):
            # Kept beside, not among, the saved tensors: a checkpointed segment that ends here and is recomputed has
            # nothing to fetch from this function and stops short of it.
            loss, *ctx.gradients = _chunked(hidden_RD, weight_VD, targets_R - first, group, num_real, *wanted)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("generation_loss hands its gradient out once; call it again for a second backward")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad)
        return *gradients, None, None, None, None, None


def _chunked(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_R: torch.Tensor,
    group: dist.ProcessGroup | None,
    num_real: int,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss and the wanted gradients; targets_R count from this rank's first vocabulary entry."""
    dtype = torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32
    hidden_grad = torch.zeros_like(hidden_RD, memory_format=torch.contiguous_format) if hidden_wanted else None
    weight_grad = torch.zeros(weight_VD.shape, dtype=dtype, device=weight_VD.device) if weight_wanted else None
    loss = torch.zeros((), dtype=dtype, device=hidden_RD.device)
    given_dtype = hidden_RD.dtype
    if hidden_RD.device.type == "cpu":  # no matrix product of half-precision numbers with a float32 result there
        hidden_RD, weight_VD = hidden_RD.to(dtype), weight_VD.to(dtype)
    weight_VD = weight_VD[:num_real]

    for start in range(0, len(hidden_RD), CHUNK_ROWS):
        hidden_cD, targets_c = hidden_RD[start : start + CHUNK_ROWS], targets_R[start : start + CHUNK_ROWS].long()
        logits_cV = _matmul(hidden_cD, weight_VD.t(), dtype)
        here_c = (targets_c >= 0) & (targets_c < num_real)
        index_c1 = targets_c.where(here_c, 0).unsqueeze(1)
        if num_real:
            target_c = logits_cV.gather(1, index_c1).squeeze(1).masked_fill(~here_c, -torch.inf)
            max_c = logits_cV.amax(1)
        else:  # nothing but padding on this rank
            target_c = logits_cV.new_full((len(logits_cV),), -torch.inf)
            max_c = logits_cV.new_full((len(logits_cV),), torch.finfo(dtype).min)
        sum_c = logits_cV.sub_(max_c.unsqueeze(1)).exp_().sum(1)
        all_max_c, all_sum_c, target_c = _over_group(max_c, sum_c, target_c, group)
        loss += (all_sum_c.log() + all_max_c - target_c).sum()
        if not (hidden_wanted or weight_wanted):
            continue
        probability_cV = logits_cV.mul_(((max_c - all_max_c).exp() / all_sum_c).unsqueeze(1))
        if num_real:
            probability_cV.scatter_add_(1, index_c1, -here_c.to(dtype).unsqueeze(1))
        probability_cV = probability_cV.to(hidden_RD.dtype)
        if hidden_grad is not None:
            hidden_grad[start : start + CHUNK_ROWS] = _matmul(probability_cV, weight_VD, dtype)
        if weight_grad is not None:
            weight_grad[:num_real] += _matmul(probability_cV.t(), hidden_cD, dtype)
    return loss, hidden_grad, None if weight_grad is None else weight_grad.to(given_dtype)


def _matmul(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return a @ b if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _over_group(
    max_c: torch.Tensor, sum_c: torch.Tensor, target_c: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The maximum, the sum of exponentials relative to it, and the target's logit, over the whole vocabulary."""
    if group is None:
        return max_c, sum_c, target_c
    own = torch.stack([max_c, sum_c, target_c])
    parts = own.new_empty(dist.get_world_size(group), *own.shape)
    all_gather(parts.view(-1), own.view(-1), group=group)
    all_max_c = parts[:, 0].amax(0)
    return all_max_c, (parts[:, 1] * (parts[:, 0] - all_max_c).exp()).sum(0), parts[:, 2].amax(0)
