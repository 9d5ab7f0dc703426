"""Layers whose parameters are split over the tensor axis (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053).

A split parameter says so itself: `tensor_model_parallel` (DeepSpeed's gradient norm reads it), `partition_dim`, and
`full_size`, the real size of that dimension; what the last ranks hold beyond it is zero and stays zero. `shard` and
`full_tensor` translate. A parameter without these attributes is the same on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lcl.parallel.mappings import (
    copy_to_tensor_parallel,
    finish,
    gather_replicated,
    reduce_scatter_to_sequence_parallel,
    shard_size,
    start_gather,
    start_reduce_scatter,
)
from megatron_lcl.parallel.mesh import Axis


def mark_split(parameter: torch.Tensor, dim: int, full_size: int) -> None:
    """Say that the parameter is this rank's part, along `dim`, of one with `full_size` entries there."""
    tagged: Any = parameter
    tagged.tensor_model_parallel, tagged.partition_dim, tagged.full_size = True, dim, full_size


def is_split(parameter: torch.Tensor) -> bool:
    """Whether the parameter is split over the tensor axis (be it of size 1), not the same on every rank."""
    return getattr(parameter, "tensor_model_parallel", False)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The parameter's shape in one process."""
    shape = list(parameter.shape)
    if is_split(parameter):
        shape[parameter.partition_dim] = parameter.full_size  # type: ignore[attr-defined]
    return torch.Size(shape)


def shard(full: torch.Tensor, parameter: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part of a full tensor (weights, gradients, moments) that belongs to the parameter."""
    if not is_split(parameter):
        return full
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    size = shard_size(full.shape[dim], axis)
    part = full.narrow(dim, min(axis.rank * size, full.shape[dim]), _num_real(axis.rank, size, full.shape[dim]))
    missing = size - part.shape[dim]
    return F.pad(part, (0, 0) * (full.dim() - 1 - dim) + (0, missing)) if missing else part


def full_tensor(value: torch.Tensor, parameter: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The inverse of `shard`: the full tensor of which `value`, shaped like the parameter, is this rank's part.

    All ranks of the axis call it together. Without padding. It may be `value` itself.
    """
    if axis.size == 1 or not is_split(parameter):
        return value
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    rows = value.detach().transpose(0, dim)
    return gather_replicated(rows, axis, full_shape(parameter)[dim]).transpose(0, dim).contiguous()


def _num_real(rank: int, size: int, full_size: int) -> int:
    return min(size, max(0, full_size - rank * size))


class SharedParameters:
    """The parameters that a module has, now, and that are not split: the same on every rank, which must stay so.

    Each rank has a part of their gradients, since it uses them on its share of the rows or for its share of the result.
    Inside `summing` the module computes with stand-ins whose backward sums these parts, all in one all-reduce. That is
    before gradients are accumulated, so whoever takes them during backward, as DeepSpeed does, finds them summed.
    """

    def __init__(self, module: nn.Module, axis: Axis) -> None:
        self.axis = axis
        named = [(part, part.named_parameters(recurse=False)) for part in module.modules()]
        self.places = [(part, name) for part, own in named for name, p in own if not is_split(p)]

    @contextlib.contextmanager
    def summing(self) -> Iterator[None]:
        """What the module computes in here owes its gradients to all ranks."""
        if self.axis.size == 1:
            yield
            return
        parameters = [getattr(part, name) for part, name in self.places]
        self._put(copy_to_tensor_parallel(parameters, self.axis))
        try:
            yield
        finally:
            self._put(parameters)

    def _put(self, tensors: Sequence[torch.Tensor]) -> None:
        for (part, name), tensor in zip(self.places, tensors, strict=True):
            part._parameters[name] = tensor  # type: ignore[assignment]  # a stand-in is no Parameter


class ColumnLinear(nn.Linear):
    """Linear layer of which every rank computes a part of the output features.

    Called, it maps rows that every rank holds; `gathered_linear` maps rows of which every rank has a share.
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis) -> None:
        assert out_features % axis.size == 0, f"{out_features} features over {axis.size} ranks"
        super().__init__(in_features, out_features // axis.size)
        mark_split(self.weight, 0, out_features)
        mark_split(self.bias, 0, out_features)


def gathered_linear(
    shares: Sequence[torch.Tensor], layers: Sequence[ColumnLinear], axis: Axis, num_rows: int
) -> tuple[torch.Tensor, ...]:
    """Column-split layers, each on rows of which each rank has a share: all `num_rows` rows, own features.

    shares: for each layer; what several share is gathered once. Rows travel together, and are not kept: backward
    gathers them again while it computes their gradients, and sums these over ranks while it computes the weights'.
    """
    if axis.size == 1:  # called: ZeRO-3 gathers a module's parameters when it is
        return tuple(layer(share) for share, layer in zip(shares, layers, strict=True))
    different = list({id(share): share for share in shares}.values())
    sources = [next(i for i, one in enumerate(different) if one is share) for share in shares]
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    return _GatheredLinear.apply(axis, num_rows, sources, *different, *parameters)


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, axis, num_rows, sources, *tensors):
        shares, parameters = tensors[: max(sources) + 1], tensors[max(sources) + 1 :]
        weights, biases = parameters[::2], parameters[1::2]
        ctx.axis, ctx.num_rows, ctx.sources = axis, num_rows, sources
        ctx.save_for_backward(*shares, *weights)
        gathers = [start_gather(share, axis) for share in shares]
        rows: list[torch.Tensor] = []
        outputs = []
        for source, *layer in zip(sources, weights, biases, strict=True):
            while len(rows) <= source:  # the next rows travel while these are multiplied
                rows.append(finish(gathers[len(rows)])[:num_rows])
            outputs.append(F.linear(rows[source], *layer))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        num_shares, saved = max(ctx.sources) + 1, ctx.saved_tensors  # read once: checkpointing allows no more
        shares, weights = saved[:num_shares], saved[num_shares:]
        gathers = [start_gather(share, ctx.axis) for share in shares]
        sums = []
        for i in range(num_shares):
            (grad, weight), *others = [
                pair for *pair, source in zip(grads, weights, ctx.sources, strict=True) if source == i
            ]
            grad_rows = grad @ weight
            for grad, weight in others:
                grad_rows.addmm_(grad, weight)
            sums.append(start_reduce_scatter(grad_rows, ctx.axis))
        rows = [finish(gather)[: ctx.num_rows] for gather in gathers]
        of_parameters = [
            part
            for grad, source in zip(grads, ctx.sources, strict=True)
            for part in (grad.t() @ rows[source], grad.sum(0))
        ]
        return None, None, None, *(finish(started) for started in sums), *of_parameters


class RowParts(nn.Linear):
    """Linear layer of which every rank has a part of the input features: gives what the ranks have to sum, no bias."""

    def __init__(self, in_features: int, out_features: int, axis: Axis) -> None:
        assert in_features % axis.size == 0, f"{in_features} features over {axis.size} ranks"
        super().__init__(in_features // axis.size, out_features, bias=False)
        mark_split(self.weight, 1, in_features)


class RowLinear(nn.Linear):
    """Linear layer of which every rank has a part of the input features: gives this rank's share of the rows."""

    def __init__(self, in_features: int, out_features: int, axis: Axis) -> None:
        assert in_features % axis.size == 0, f"{in_features} features over {axis.size} ranks"
        super().__init__(in_features // axis.size, out_features)
        self.axis = axis
        mark_split(self.weight, 1, in_features)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return super().forward(rows)
        return reduce_scatter_to_sequence_parallel(F.linear(rows, self.weight), self.axis) + self.bias


class VocabularyEmbedding(nn.Embedding):
    """Embedding whose entries are split: gives the rows of the own ids and zeros for others, so that ranks sum."""

    def __init__(self, vocab_size: int, width: int, axis: Axis) -> None:
        super().__init__(shard_size(vocab_size, axis), width)
        self.axis = axis
        mark_split(self.weight, 0, vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return self._look_up(ids)
        own = ids - self.axis.rank * self.num_embeddings
        others = (own < 0) | (own >= self.num_embeddings)
        return self._look_up(own.masked_fill(others, 0)).masked_fill(others[..., None], 0)

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        if torch.are_deterministic_algorithms_enabled():  # on CUDA the embedding's backward adds rows in any order
            return self.weight[ids]
        return super().forward(ids)
