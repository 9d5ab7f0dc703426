"""Muon's update of a matrix, and how the pieces of matrices meet for it.

Every matrix has an owner among the processes that hold a piece of some: pieces go there, the whole is orthogonalized as
one process would, and the pieces of the result go back. One exchange each way for all matrices of a partition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.optimizers.pieces import Piece, Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""of the quintic iteration (Jordan et al. 2024)"""
EPS = 1e-7


def newton_schulz(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """Matrices [..., d_out, d_in] with their singular values brought near 1 (0.7 to 1.2), in their own dtype.

    X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, from X / |X|, transposed where d_out > d_in (Jordan et al. 2024, "Muon: an
    optimizer for hidden layers in neural networks"; arXiv 2502.16982, eq. 2).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # rounded once
    return x.mT if tall else x


def matrix_update(matrix: torch.Tensor, steps: int, heads: int = 1) -> torch.Tensor:
    """A matrix [d_out, d_in] orthogonalized; heads: each of so many equal parts of its rows by itself."""
    if heads == 1:
        return newton_schulz(matrix, steps)
    return newton_schulz(matrix.unflatten(0, (heads, -1)), steps).flatten(0, 1)


class MatrixExchange:
    """Brings the pieces of each matrix of a partition to one process, and what is made of it back."""

    def __init__(
        self, holders: Sequence[tuple[int, Sequence[Piece]]], tensors: Mapping[str, Tensor], axis: Axis
    ) -> None:
        """holders: tensor rank and pieces of each process of the axis; tensors: whole, by name; axis: data and tensor
        ranks of a pipeline stage."""
        self._axis, self._tensors, self._holders = axis, tensors, holders
        names = sorted({piece.name for _, pieces in holders for piece in pieces})
        load = [0] * axis.size
        self._owner: dict[str, int] = {}
        for name in sorted(names, key=lambda name: -_cost(tensors[name].shape)):
            self._owner[name] = load.index(min(load))
            load[self._owner[name]] += _cost(tensors[name].shape)
        self._own = [name for name in names if self._owner[name] == axis.rank]

    @property
    def numbers_sent(self) -> tuple[int, int]:
        """How many numbers this process sends to others: of its pieces, and of what it has made of whole matrices."""
        me = self._axis.rank
        others = [rank for rank in range(self._axis.size) if rank != me]
        pieces = sum(piece.length for owner in others for piece in self._sent(me, owner))
        results = sum(p.length for rank in others for p in self._holders[rank][1] if self._owner[p.name] == me)
        return pieces, results

    def through(
        self,
        pieces: Sequence[torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        function: Callable[[str, torch.Tensor], torch.Tensor],
    ) -> list[torch.Tensor]:
        """A function of whole matrices, from this process's pieces of them to its pieces of the results.

        pieces: in the order of the holder's; dtype: in which they travel, and the function has them.
        """
        axis, (_, mine) = self._axis, self._holders[self._axis.rank]
        nothing = torch.empty(0, dtype=dtype, device=device)
        held = dict(zip(mine, pieces, strict=True))
        outgoing = [[held[piece] for piece in self._sent(axis.rank, owner)] for owner in range(axis.size)]
        incoming = [[piece.length for piece in self._sent(rank, axis.rank)] for rank in range(axis.size)]
        received = _exchange(axis, outgoing, incoming, nothing)
        shards: dict[str, dict[int, list[torch.Tensor]]] = {name: {} for name in self._own}
        for rank, of_rank in enumerate(received):  # data ranks in order: runs of a shard, one behind the other
            for piece, values in zip(self._sent(rank, axis.rank), of_rank, strict=True):
                shards[piece.name].setdefault(self._holders[rank][0], []).append(values)
        results = {name: function(name, self._whole(name, shards.pop(name))) for name in self._own}
        flat = {
            (name, rank): self._shard(name, result, rank).flatten()
            for name, result in results.items()
            for rank in {rank for rank, _ in self._holders}
        }
        back = [
            [
                flat[piece.name, rank].narrow(0, piece.offset, piece.length)
                for piece in theirs
                if self._owner[piece.name] == axis.rank
            ]
            for rank, theirs in self._holders
        ]
        awaited = [[piece for piece in mine if self._owner[piece.name] == owner] for owner in range(axis.size)]
        returned = _exchange(axis, back, [[piece.length for piece in of_owner] for of_owner in awaited], nothing)
        result = {
            piece: values
            for of_owner, values_of_owner in zip(awaited, returned, strict=True)
            for piece, values in zip(of_owner, values_of_owner, strict=True)
        }
        return [result[piece] for piece in mine]

    def _sent(self, rank: int, owner: int) -> list[Piece]:
        """What a process sends to an owner; of what every tensor rank has, the first one's."""
        tensor_rank, pieces = self._holders[rank]
        return [
            piece
            for piece in pieces
            if self._owner[piece.name] == owner
            and (tensor_rank == 0 or self._tensors[piece.name].partition_dim is not None)
        ]

    def _whole(self, name: str, shards: Mapping[int, list[torch.Tensor]]) -> torch.Tensor:
        shape, dim = list(self._tensors[name].shape), self._tensors[name].partition_dim
        if dim is not None:
            shape[dim] //= len(shards)
        whole = [torch.cat(runs).view(shape) for _, runs in sorted(shards.items())]
        return whole[0] if dim is None else torch.cat(whole, dim)

    def _shard(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
        dim, num_ranks = self._tensors[name].partition_dim, 1 + max(rank for rank, _ in self._holders)
        return whole if dim is None else whole.chunk(num_ranks, dim)[rank]


def _cost(shape: torch.Size) -> int:
    return shape.numel() * min(shape)


def _exchange(
    axis: Axis, outgoing: Sequence[Sequence[torch.Tensor]], lengths: Sequence[Sequence[int]], nothing: torch.Tensor
) -> list[list[torch.Tensor]]:
    """From each process the tensors of these lengths that it has for this one; nothing: no number, of their dtype."""
    sent = torch.cat([nothing, *(x.to(nothing.dtype) for of_rank in outgoing for x in of_rank)])
    sizes = [sum(of_rank) for of_rank in lengths]
    received = axis.all_to_all(sent, [sum(map(len, of_rank)) for of_rank in outgoing], sizes)
    return [list(part.split(list(of_rank))) for part, of_rank in zip(received.split(sizes), lengths, strict=True)]
