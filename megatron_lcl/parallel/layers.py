"""Layers whose parameters are split over the tensor axis (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053).

A split parameter says so itself: `tensor_model_parallel` (DeepSpeed's gradient norm reads it), `partition_dim`, and
`full_size`, the real size of that dimension; what the last ranks hold beyond it is zero and stays zero. `shard` and
`full_tensor` convert. A parameter without these attributes is the same on every rank.
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
    gather_replicated,
    local_shard,
    reduce_scatter_to_sequence_parallel,
    shard_size,
    start_gather,
    start_reduce_scatter,
)
from megatron_lcl.parallel.mesh import Axis, Pending


def mark_split(parameter: torch.Tensor, dim: int, full_size: int) -> None:
    """Say that the parameter is this rank's shard, along `dim`, of one with `full_size` entries there."""
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
    """This rank's shard of a full tensor (weights, gradients, moments) that belongs to the parameter."""
    if not is_split(parameter):
        return full
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    return local_shard(full.transpose(0, dim), axis).transpose(0, dim)


def full_tensor(value: torch.Tensor, parameter: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The inverse of `shard`: the full tensor of which `value`, shaped like the parameter, is this rank's shard.

    All ranks of the axis call it together. Without padding. It may be `value` itself.
    """
    if axis.size == 1 or not is_split(parameter):
        return value
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    rows = value.detach().transpose(0, dim)
    return gather_replicated(rows, axis, full_shape(parameter)[dim]).transpose(0, dim).contiguous()


class SharedParameters:
    """The parameters that a module has, now, and that are not split: the same on every rank, which must stay so.

    Each rank has a part of their gradients, since it uses them on its shard of the rows or for its shard of the result.
    Inside `summing` the module computes with copies whose backward sums these parts, all in one all-reduce. That is
    before gradients are accumulated, so code that takes them during backward, as DeepSpeed does, finds them summed.
    """

    def __init__(self, module: nn.Module, axis: Axis) -> None:
        self.axis = axis
        # no references to the module, which has this object: a model is freed when nobody uses it, not by and by
        self.names = [name for name, p in module.named_parameters() if not is_split(p)]

    @contextlib.contextmanager
    def summing(self, module: nn.Module) -> Iterator[None]:
        """The gradients of what the module, the same, computes in here are summed over ranks."""
        if self.axis.size == 1:
            yield
            return
        paths = [name.rpartition(".") for name in self.names]
        named = [(module.get_submodule(path), name) for path, _, name in paths]
        slots = [(owner, name) for owner, name in named if getattr(owner, name).requires_grad]
        parameters = [getattr(owner, name) for owner, name in slots]
        if parameters:
            _put(slots, copy_to_tensor_parallel(parameters, self.axis))
        try:
            yield
        finally:
            _put(slots, parameters)


def _put(slots: Sequence[tuple[nn.Module, str]], tensors: Sequence[torch.Tensor]) -> None:
    for (owner, name), tensor in zip(slots, tensors, strict=True):
        owner._parameters[name] = tensor  # type: ignore[assignment]  # a copy is no Parameter


class ColumnLinear(nn.Linear):
    """Linear layer of which every rank computes a shard of the output features.

    Called, it maps rows that every rank holds; `gathered_linear` maps rows of which every rank has a shard.
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis) -> None:
        assert out_features % axis.size == 0, f"{out_features} features over {axis.size} ranks"
        super().__init__(in_features, out_features // axis.size)
        mark_split(self.weight, 0, out_features)
        mark_split(self.bias, 0, out_features)


def gathered_linear(
    inputs: Sequence[torch.Tensor], layers: Sequence[ColumnLinear], axis: Axis, num_rows: int
) -> tuple[torch.Tensor, ...]:
    """Column-split layers, each on rows of which each rank has a shard: all `num_rows` rows, own features.

    inputs: this rank's shard for each layer; one that several layers take is gathered once. All are gathered at the
    same time, and are not kept: backward gathers them again while it computes their gradients, and sums these over
    ranks while it computes the weights'.
    """
    if axis.size == 1:  # called: ZeRO-3 gathers a module's parameters when it is
        return tuple(layer(local) for local, layer in zip(inputs, layers, strict=True))
    distinct = list({id(local): local for local in inputs}.values())
    sources = [next(i for i, one in enumerate(distinct) if one is local) for local in inputs]
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    return _GatheredLinear.apply(axis, num_rows, sources, *distinct, *parameters)


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, axis, num_rows, sources, *tensors):
        inputs, parameters = tensors[: max(sources) + 1], tensors[max(sources) + 1 :]
        weights, biases = parameters[::2], parameters[1::2]
        ctx.axis, ctx.num_rows, ctx.sources = axis, num_rows, sources
        ctx.save_for_backward(*inputs, *weights)
        gathers = [start_gather(local, axis, num_rows) for local in inputs]
        rows: list[torch.Tensor] = []
        outputs = []
        for source, *layer in zip(sources, weights, biases, strict=True):
            while len(rows) <= source:  # the next rows are gathered while these are multiplied
                rows.append(gathers[len(rows)].wait())
            outputs.append(F.linear(rows[source], *layer))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        num_inputs, saved = max(ctx.sources) + 1, ctx.saved_tensors  # read once: checkpointing allows no more
        inputs, weights = saved[:num_inputs], saved[num_inputs:]
        of_inputs, of_weights = ctx.needs_input_grad[3 : 3 + num_inputs], ctx.needs_input_grad[3 + num_inputs :: 2]
        read = {source for source, needed in zip(ctx.sources, of_weights, strict=True) if needed}  # others are frozen
        gathers = {i: start_gather(inputs[i], ctx.axis, ctx.num_rows) for i in sorted(read)}
        sums: list[Pending | None] = [None] * num_inputs
        for i in filter(of_inputs.__getitem__, range(num_inputs)):
            (grad, weight), *others = [
                pair for *pair, source in zip(grads, weights, ctx.sources, strict=True) if source == i
            ]
            grad_rows = grad @ weight
            for grad, weight in others:
                grad_rows.addmm_(grad, weight)
            sums[i] = start_reduce_scatter(grad_rows, ctx.axis)
        rows = {i: gather.wait() for i, gather in gathers.items()}
        of_parameters = [
            gradient
            for grad, source, needed in zip(grads, ctx.sources, of_weights, strict=True)
            for gradient in (grad.t() @ rows[source] if needed else None, grad.sum(0))
        ]
        return None, None, None, *(pending and pending.wait() for pending in sums), *of_parameters


class RowLinear(nn.Linear):
    """Linear layer of which every rank has a shard of the input features: gives this rank's shard of the rows.

    partial_output: it gives instead, for all rows, what the ranks still have to sum, and has no bias.
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis, partial_output: bool = False) -> None:
        assert in_features % axis.size == 0, f"{in_features} features over {axis.size} ranks"
        super().__init__(in_features // axis.size, out_features, bias=not partial_output)
        self.axis = axis
        self.partial_output = partial_output
        mark_split(self.weight, 1, in_features)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1 or self.partial_output:
            return super().forward(rows)
        return reduce_scatter_to_sequence_parallel(F.linear(rows, self.weight), self.axis) + self.bias


def rows_of(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a table [V, D] by ids [...] from 0 on → [..., D], with a gradient summed in float32. IndexError, on CPUs,
    for an id that is none.

    torch sums that of `table[ids]` in the table's dtype, one row after the other: in bfloat16 a sum of 4,096 rows, as a
    position of 4,096 sequences has, is off by up to a half. Sums of a float64 table are float64. The gradient has the
    same bits in every run where torch.use_deterministic_algorithms is set.
    """
    return _Rows.apply(table, ids)


class _Rows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(table, ids):
        return F.embedding(ids, table)  # which refuses negative ids, whose gradient would be lost

    @staticmethod
    def setup_context(ctx, inputs, output):
        table, ids = inputs
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = table.shape, table.dtype

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        grad = grad.to(torch.promote_types(ctx.dtype, torch.float32))
        if torch.are_deterministic_algorithms_enabled():  # the embedding's, on CUDA, adds rows in any order
            total = grad.new_zeros(ctx.shape).index_put_((ids,), grad, accumulate=True)
        else:
            total = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.shape[0], -1, False)
        return total.to(ctx.dtype), None


class VocabularyEmbedding(nn.Embedding):
    """Embedding whose entries are split: gives the rows of the own ids and zeros for others, for the ranks to sum."""

    def __init__(self, vocab_size: int, width: int, axis: Axis) -> None:
        super().__init__(shard_size(vocab_size, axis), width)
        self.axis = axis
        mark_split(self.weight, 0, vocab_size)

    def reset_parameters(self) -> None:
        """Draws nothing: `model.initialize` does, and on the meta device torch would import its compiler for it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return self._look_up(ids)
        own = ids - self.axis.rank * self.num_embeddings
        others = (own < 0) | (own >= self.num_embeddings)
        return self._look_up(own.masked_fill(others, 0)).masked_fill(others[..., None], 0)

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        # CUDA's embedding sums its gradient in float32 without a float32 copy of it, but in any order
        if ids.is_cuda and not torch.are_deterministic_algorithms_enabled():
            return super().forward(ids)
        return rows_of(self.weight, ids)
