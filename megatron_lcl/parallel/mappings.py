"""The collectives of tensor parallelism, with gradients; named after Megatron-Core's `tensor_parallel/mappings.py`.

Sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2): between two products with split weights
every rank holds a shard of the rows. R rows split into `size` shards of ceil(R / size) rows, in rank order; the last
shards end with rows of zeros, which only this file sees. At size 1 every function gives its argument back.

What a gradient means: that of a shard is complete, what one process would have there. Of rows that every rank holds,
each rank has what its own use of them contributes, and the sum over ranks is the gradient. `gather_replicated` is the
exception: every rank does the same with its result and gets the same, complete gradient for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_lcl.parallel.mesh import Axis, Pending


def shard_size(num_rows: int, axis: Axis) -> int:
    """Rows of one rank's shard of `num_rows`."""
    return -(-num_rows // axis.size)


def local_shard(rows: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's shard of rows [R, ...] that every rank holds; not for rows that need a gradient."""
    if axis.size == 1:
        return rows
    size = shard_size(len(rows), axis)
    return pad_rows(rows[axis.rank * size : (axis.rank + 1) * size], size)


def pad_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows of zeros appended, so that there are `num_rows`."""
    missing = num_rows - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows


def gather_from_sequence_parallel(local: torch.Tensor, axis: Axis, num_rows: int) -> torch.Tensor:
    """All ranks' shards → all `num_rows` rows, on every rank. Backward sums the ranks' gradients (reduce-scatter)."""
    return local if axis.size == 1 else _GatherFromSequenceParallel.apply(local, axis, num_rows)


def gather_replicated(local: torch.Tensor, axis: Axis, num_rows: int) -> torch.Tensor:
    """All ranks' shards → all `num_rows` rows, with which every rank does the same. Backward keeps the own shard."""
    return local if axis.size == 1 else _GatherReplicated.apply(local, axis, num_rows)


def reduce_scatter_to_sequence_parallel(partial: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Rows [R, ...] whose sum over ranks is meant → this rank's shard of the sum. Backward gathers."""
    return partial if axis.size == 1 else _ReduceScatterToSequenceParallel.apply(partial, axis)


def copy_to_tensor_parallel(tensors: Sequence[torch.Tensor], axis: Axis) -> Sequence[torch.Tensor]:
    """Tensors of one dtype that are the same on every rank, to compute with. Backward sums their gradients over ranks.

    For what is used on a shard of the rows, or for a shard of the result. One all-reduce for the gradients of all.
    """
    return tensors if axis.size == 1 else _CopyToTensorParallel.apply(axis, *tensors)


def start_gather(local: torch.Tensor, axis: Axis, num_rows: int) -> Pending:
    """Start to gather all ranks' shards: gives all `num_rows` rows."""
    return axis.start_all_gather(local).then(lambda shards: shards.flatten(0, 1)[:num_rows])


def start_reduce_scatter(partial: torch.Tensor, axis: Axis) -> Pending:
    """Start to sum rows [R, ...] over ranks: gives this rank's shard of the sum."""
    return axis.start_reduce_scatter(pad_rows(partial, axis.size * shard_size(len(partial), axis)))


class _GatherFromSequenceParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, axis, num_rows):
        ctx.axis = axis
        return start_gather(local, axis, num_rows).wait()

    @staticmethod
    def backward(ctx, grad):
        return start_reduce_scatter(grad, ctx.axis).wait(), None, None


class _GatherReplicated(_GatherFromSequenceParallel):
    @staticmethod
    def backward(ctx, grad):
        return local_shard(grad, ctx.axis), None, None


class _ReduceScatterToSequenceParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, axis):
        ctx.axis, ctx.num_rows = axis, len(partial)
        return start_reduce_scatter(partial, axis).wait()

    @staticmethod
    def backward(ctx, grad):
        return start_gather(grad, ctx.axis, ctx.num_rows).wait(), None


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, axis, *tensors):
        ctx.axis = axis
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):
        flat = ctx.axis.all_reduce(torch.cat([grad.flatten() for grad in grads]))
        summed = flat.split([grad.numel() for grad in grads])
        return None, *(one.view_as(grad) for one, grad in zip(summed, grads, strict=True))
