"""The contrastive loss's arithmetic for own rows against all rows, tile by tile, in plain torch.

Shape legend: n own rows, N all rows, D feature width. Formulas: `contrastive.py`.

The logits of own images against own texts are also, transposed, those of own texts against own images: each tile of
that block is computed once and serves both directions. A single process has no other block, so it does four matrix
products where the plain formula does six.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

# 32 MiB of float32. Smaller tiles stay in smaller caches, worth some 5 % to a thread that is alone; but threads
# wait for each other after every operator on a tile, and where they share their cores with others, short ones take
# several times as long.
TILE_ROWS = 4096
TILE_COLUMNS = 2048


class RowStatistics(NamedTuple):
    """Per own row, [n] each; logits are scaled similarities."""

    positive: torch.Tensor
    """logit of the row's own pair"""
    image_lse: torch.Tensor
    """log-sum-exp of an image's logits with all other pairs' texts (negatives only); -inf if there are none"""
    text_lse: torch.Tensor
    image_hardest: torch.Tensor
    """largest of an image's logits with other pairs' texts; the dtype's lowest number if there are none"""
    text_hardest: torch.Tensor


class _Tiles:
    """Cuts of [0, n) and [0, N), and memory for two tiles, used again and again (fresh memory costs page faults)."""

    def __init__(self, like: torch.Tensor, n: int, N: int, offset: int) -> None:
        self.rows = list(_cuts(0, n, TILE_ROWS))
        self.own_columns = list(_cuts(offset, offset + n, TILE_COLUMNS))
        self.other_columns = [*_cuts(0, offset, TILE_COLUMNS), *_cuts(offset + n, N, TILE_COLUMNS)]
        size = min(TILE_ROWS, n) * min(TILE_COLUMNS, N)
        self._memory = [like.new_empty(size) for _ in range(2)]

    def pair(self, rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        first, second = (memory[: shape[0] * shape[1]].view(shape) for memory in self._memory)
        return first, second


def _cuts(start: int, stop: int, step: int) -> Iterator[slice]:
    for i in range(start, stop, step):
        yield slice(i, min(i + step, stop))


def _own_pairs(tile: torch.Tensor, rows: slice, columns: slice, offset: int) -> torch.Tensor:
    """The tile's entries that pair a row with itself, as a view; empty where the diagonal misses the tile."""
    return tile.diagonal(rows.start + offset - columns.start)


class _RunningLogSumExp:
    """Log-sum-exp and maximum per row, over tiles that arrive one after the other."""

    def __init__(self, like: torch.Tensor, n: int) -> None:
        # the lowest finite number rather than -inf, so that a row that is all -inf so far gives no inf - inf
        self.max_n = like.new_full((n,), torch.finfo(like.dtype).min)
        self.sum_n = like.new_zeros(n)

    def add(self, rows: slice, tile: torch.Tensor, dim: int, scratch: torch.Tensor) -> None:
        old, total = self.max_n[rows], self.sum_n[rows]
        new = torch.maximum(old, tile.amax(dim))
        torch.sub(tile, new.unsqueeze(dim), out=scratch).exp_()
        total.mul_((old - new).exp_()).add_(scratch.sum(dim))
        old.copy_(new)

    def result(self) -> torch.Tensor:
        return self.max_n + self.sum_n.log()


def forward(
    image_nD: torch.Tensor,
    text_nD: torch.Tensor,
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    offset: int,
    scale: torch.Tensor,
) -> RowStatistics:
    """Statistics of own rows [offset, offset + n) against all N; `scale` is a scalar in the dtype of the arithmetic."""
    n, N, dtype = len(image_nD), len(image_ND), scale.dtype
    tiles = _Tiles(scale, n, N, offset)
    positive_n = scale.new_empty(n)
    image, text = _RunningLogSumExp(scale, n), _RunningLogSumExp(scale, n)
    for rows in tiles.rows:
        query = image_nD[rows].to(dtype) * scale
        for columns in tiles.own_columns:
            logits, scratch = tiles.pair(rows, columns)
            torch.mm(query, text_ND[columns].to(dtype).t(), out=logits)
            own = _own_pairs(logits, rows, columns, offset)
            if len(own):
                first = max(rows.start, columns.start - offset)
                positive_n[first : first + len(own)] = own
                own.fill_(-torch.inf)
            image.add(rows, logits, 1, scratch)
            text.add(slice(columns.start - offset, columns.stop - offset), logits, 0, scratch)
        for statistics, queries, keys in ((image, query, text_ND), (text, text_nD[rows].to(dtype) * scale, image_ND)):
            for columns in tiles.other_columns:
                logits, scratch = tiles.pair(rows, columns)
                torch.mm(queries, keys[columns].to(dtype).t(), out=logits)
                statistics.add(rows, logits, 1, scratch)
    return RowStatistics(positive_n, image.result(), text.result(), image.max_n, text.max_n)


def backward(
    image_nD: torch.Tensor,
    text_nD: torch.Tensor,
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    image_lse_N: torch.Tensor,
    text_lse_N: torch.Tensor,
    shortfall_n: torch.Tensor,
    offset: int,
    scale: torch.Tensor,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients [n, D] of own images and texts, and own rows' part of the gradient of log_scale.

    image_lse_N, text_lse_N: log-sum-exp of every row's logits, own pair included. shortfall_n: [n] by how much the two
    softmaxes at a row's own pair together fall short of 2; their difference to 2 would be rounding where they are near
    it. factor: scale / 2N times the incoming gradient, a scalar.
    """
    n, N, dtype = len(image_nD), len(image_ND), scale.dtype
    tiles = _Tiles(scale, n, N, offset)
    image_grad, text_grad = (scale.new_zeros(image_nD.shape) for _ in range(2))

    def softmaxes(queries, keys, query_lse, key_lse, rows, columns):
        """exp(logit - query's lse) + exp(logit - key's lse)"""
        logits, scratch = tiles.pair(rows, columns)
        torch.mm(queries, keys.t(), out=logits)
        torch.sub(logits, query_lse[offset + rows.start : offset + rows.stop, None], out=scratch).exp_()
        return logits.sub_(key_lse[columns]).exp_().add_(scratch)

    for rows in tiles.rows:
        image, text = image_nD[rows].to(dtype), text_nD[rows].to(dtype)
        query = image * scale
        for columns in tiles.own_columns:
            keys = text_ND[columns].to(dtype)
            weight = softmaxes(query, keys, image_lse_N, text_lse_N, rows, columns)
            own = _own_pairs(weight, rows, columns, offset)
            if len(own):
                first = max(rows.start, columns.start - offset)
                torch.neg(shortfall_n[first : first + len(own)], out=own)
            image_grad[rows].addmm_(weight, keys)
            text_grad[columns.start - offset : columns.stop - offset].addmm_(weight.t(), image)
        for columns in tiles.other_columns:
            keys = text_ND[columns].to(dtype)
            image_grad[rows].addmm_(softmaxes(query, keys, image_lse_N, text_lse_N, rows, columns), keys)
        query = text * scale
        for columns in tiles.other_columns:
            keys = image_ND[columns].to(dtype)
            text_grad[rows].addmm_(softmaxes(query, keys, text_lse_N, image_lse_N, rows, columns), keys)
    scale_grad = scale.new_zeros(())
    for rows in tiles.rows:
        image_grad[rows] *= factor
        text_grad[rows] *= factor
        scale_grad += (image_nD[rows].to(dtype) * image_grad[rows]).sum()
    return image_grad, text_grad, scale_grad
