"""The sigmoid loss over the pairs of all ranks (SigLIP, arXiv 2303.15343): exact, ragged, without gradient traffic.

Shape legend: n own pairs, N pairs of all R ranks of the group, D feature width.

With x_i the image feature, t_j the context (text) feature, both of unit norm, s = exp(log_scale) and b the bias
(section 3.2 of the paper; z_ij is 1 where i = j, else -1, and d_ij is 1 where i = j, else 0):

    l_ij = s x_i.t_j + b
    loss = -1/N sum_ij log sigmoid(z_ij l_ij) = 1/N [ sum_ij log(1 + exp(l_ij)) - sum_i l_ii ]
    w_ij = sigmoid(l_ij) - d_ij
    dx_i = s/N sum_j w_ij t_j     dt_j = s/N sum_i w_ij x_i     db = 1/N sum_ij w_ij     dlog_scale = sum_i x_i.dx_i

Nothing is normalized over a row, so a tile of logits gives its part of the loss and of the gradients at once, and is
not computed again: the gradients of own rows are ready after forward, as float32. One all-gather of the features, one
of the sums, nothing on the network in backward; memory is O(n·D + N·D), and no similarity matrix is stored. (The
paper's own way passes the texts around the ring of devices, in R - 1 exchanges.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_lcl.losses.contrastive import FeatureGather, start_gather
from megatron_lcl.losses.derivatives import first_derivative_only
from megatron_lcl.losses.sigmoid_tiles import loss_and_gradients

SUMS = 5
"""float64 numbers that a rank sends beside its features"""


class SigmoidOutput(NamedTuple):
    """Scalars over all N pairs, the same on every rank. Only `loss` carries a gradient."""

    loss: torch.Tensor
    """the sum over all N x N pairs of an image and a text, divided by N, in nats; 0 if there are no pairs"""
    image_accuracy: torch.Tensor
    """as in `contrastive.ContrastiveOutput`, like what follows: share of images that are most similar to their text"""
    text_accuracy: torch.Tensor
    positive_similarity: torch.Tensor
    hardest_negative_similarity: torch.Tensor


def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    counts: Sequence[int] | None = None,
) -> SigmoidOutput:
    """The sigmoid loss of n own pairs against the N pairs of all ranks of `group`.

    bias: shape [] or [1], floating point. Everything else, the convention (sum) and the errors are those of
    `contrastive.contrastive_loss`, first derivatives only among them: backward gives the gradient of the global mean
    with respect to this rank's own rows, and this rank's parts of those of log_scale and bias.
    """
    return finish_sigmoid_loss(start_gather(image_features, text_features, log_scale, group, counts, bias=bias))


def finish_sigmoid_loss(gather: FeatureGather) -> SigmoidOutput:
    """Second half of `sigmoid_loss`, after `contrastive.start_gather`: waits for the features and computes the loss.
    ValueError for a gather that was started without a bias."""
    if gather.bias is None:
        raise ValueError("the sigmoid loss has a bias: give it to start_gather, as bias=")
    return SigmoidOutput(
        *_SigmoidFunction.apply(gather.image_nD, gather.text_nD, gather.log_scale, gather.bias, gather)
    )


class _SigmoidFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image_nD, text_nD, log_scale, bias, gather):
        dtype = torch.float64 if image_nD.dtype == torch.float64 else torch.float32
        offset, N = sum(gather.counts[: gather.axis.rank]), sum(gather.counts)
        with torch.autocast(image_nD.device.type, enabled=False):
            scale, b = log_scale.to(dtype).exp().reshape(()), bias.to(dtype).reshape(())
            image_ND, text_ND = (features.detach() for features in gather.wait())
            found = loss_and_gradients(
                image_nD, text_nD, image_ND, text_ND, offset, scale, b, any(ctx.needs_input_grad)
            )
            positive, hardest = found.positive, (found.image_hardest, found.text_hardest)
            sums = torch.stack(
                [found.loss]
                + [(positive > h).sum(dtype=torch.float64) for h in hardest]
                + [positive.sum(dtype=torch.float64), (hardest[0] + hardest[1]).sum(dtype=torch.float64) / 2]
            )
            sums = gather.axis.all_gather(sums).sum(0) / max(N, 1)
            loss, image_hits, text_hits, positive_mean, hardest_mean = sums.to(dtype).unbind()
            if N < 2:
                hardest_mean = torch.full((), -1.0, dtype=dtype, device=image_nD.device) * scale
            statistics = (image_hits, text_hits, positive_mean / scale, hardest_mean / scale)
            image_grad, text_grad = (w_nD * (scale / max(N, 1)) for w_nD in (found.image, found.text))
            scale_grad = (image_nD.detach().to(dtype) * image_grad).sum()
            bias_grad = (found.bias / max(N, 1)).to(dtype)
        ctx.save_for_backward(image_grad, text_grad, scale_grad, bias_grad)
        ctx.inputs = [(x.shape, x.dtype) for x in (image_nD, text_nD, log_scale, bias)]
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @first_derivative_only("sigmoid_loss")
    def backward(ctx, grad, *_):
        gradients = zip(ctx.saved_tensors, ctx.inputs, strict=True)
        return *((grad.to(g.dtype) * g).to(dtype).reshape(shape) for g, (shape, dtype) in gradients), None
