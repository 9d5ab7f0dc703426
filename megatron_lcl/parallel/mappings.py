"""Rows split over the tensor axis, and the collectives with gradients that put them together and take them apart.

Sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2): between two products with split weights
every rank holds a share of the rows. R rows split into `size` shares of ceil(R / size) rows, in rank order; the last
shares end with rows of zeros, which nobody but this file sees. At size 1 every function gives its argument back.

What a gradient means: that of a share is whole, what one process would have there. Of rows that every rank holds, each
rank has the part that its own use of them contributes; the parts add up to the whole.
`gather_replicated` is the exception: every rank does the same with its result and gets the same, whole gradient for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lcl.parallel.mesh import Axis

# the names since torch 2.13; the older ones warn there
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard_size(num_rows: int, axis: Axis) -> int:
    """Rows of one rank's share of `num_rows`."""
    return -(-num_rows // axis.size)


def local_shard(rows: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's share of rows [R, ...] that every rank holds; has no use for a gradient (see `gather_replicated`)."""
    if axis.size == 1:
        return rows
    size = shard_size(len(rows), axis)
    return pad_rows(rows[axis.rank * size : (axis.rank + 1) * size], size)


def pad_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows of zeros put behind, so that there are `num_rows`."""
    missing = num_rows - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows


def gather_from_sequence_parallel(share: torch.Tensor, axis: Axis, num_rows: int) -> torch.Tensor:
    """All ranks' shares → all `num_rows` rows, on every rank. Backward sums the ranks' gradients (reduce-scatter)."""
    return share if axis.size == 1 else _Gather.apply(share, axis, num_rows)


def gather_replicated(share: torch.Tensor, axis: Axis, num_rows: int) -> torch.Tensor:
    """All ranks' shares → all `num_rows` rows, with which every rank does the same. Backward keeps the own share."""
    return share if axis.size == 1 else _GatherSame.apply(share, axis, num_rows)


def reduce_scatter_to_sequence_parallel(parts: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Rows [R, ...] whose sum over ranks is meant → this rank's share of the sum. Backward gathers."""
    return parts if axis.size == 1 else _ReduceScatter.apply(parts, axis)


def copy_to_tensor_parallel(tensors: Sequence[torch.Tensor], axis: Axis) -> Sequence[torch.Tensor]:
    """Tensors of one dtype that are the same on every rank, to compute with. Backward sums their gradients over ranks.

    For what is used on a share of the rows, or for a share of the result. One all-reduce for the gradients of all.
    """
    return tensors if axis.size == 1 else _SumGradients.apply(axis, *tensors)


def start_gather(share: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Any]:
    """All shares, and what to wait for before looking at them."""
    whole = share.new_empty(axis.size * len(share), *share.shape[1:])
    return whole, all_gather(whole, share.contiguous(), group=axis.group, async_op=True)


def start_reduce_scatter(parts: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Any]:
    """The own share of the sum, and what to wait for before looking at it."""
    size = shard_size(len(parts), axis)
    share = parts.new_empty(size, *parts.shape[1:])
    return share, _reduce_scatter(
        share, pad_rows(parts, axis.size * size).contiguous(), group=axis.group, async_op=True
    )


def finish(started: tuple[torch.Tensor, Any]) -> torch.Tensor:
    """What `start_gather` or `start_reduce_scatter` began, when it is there."""
    tensor, work = started
    work.wait()
    return tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share, axis, num_rows):
        ctx.axis = axis
        return finish(start_gather(share, axis))[:num_rows]

    @staticmethod
    def backward(ctx, grad):
        return finish(start_reduce_scatter(grad, ctx.axis)), None, None


class _GatherSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share, axis, num_rows):
        ctx.axis = axis
        return finish(start_gather(share, axis))[:num_rows]

    @staticmethod
    def backward(ctx, grad):
        return local_shard(grad, ctx.axis), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, axis):
        ctx.axis, ctx.num_rows = axis, len(parts)
        return finish(start_reduce_scatter(parts, axis))

    @staticmethod
    def backward(ctx, grad):
        return finish(start_gather(grad, ctx.axis))[: ctx.num_rows], None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, axis, *tensors):
        ctx.axis = axis
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):
        together = ctx.axis.all_reduce(torch.cat([grad.flatten() for grad in grads]))
        parts = together.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))
