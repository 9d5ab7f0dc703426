"""The sigmoid loss's arithmetic for own rows against all rows, tile by tile, in plain torch.

Shape legend: n own rows, N all rows, D feature width. Formulas: `sigmoid.py`. Each tile of logits is computed once.
As in `contrastive_tiles`, those of own images against own texts serve both directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_lcl.losses.contrastive_tiles import _own_pairs, _Tiles


class SigmoidParts(NamedTuple):
    """Of own rows; all but the last three in the dtype of the arithmetic."""

    positive: torch.Tensor
    """[n] scaled similarity of the row's own pair (without the bias)"""
    image_hardest: torch.Tensor
    """[n] largest scaled similarity of an image to another pair's text; the dtype's lowest number if there are none"""
    text_hardest: torch.Tensor
    image: torch.Tensor
    """[n, D] sum_j w_ij t_j of own images i; zeros where no gradients are wanted"""
    text: torch.Tensor
    """[n, D] sum_i w_ij x_i of own texts j"""
    loss: torch.Tensor
    """sum over own images and all texts, float64 scalar"""
    bias: torch.Tensor
    """sum of w_ij over own images and all texts, float64 scalar"""


def loss_and_gradients(
    image_nD: torch.Tensor,
    text_nD: torch.Tensor,
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    offset: int,
    scale: torch.Tensor,
    bias: torch.Tensor,
    gradients: bool = True,
) -> SigmoidParts:
    """Sums of own rows [offset, offset + n) against all N; scale and bias: scalars in the dtype of the arithmetic."""
    n, N, dtype = len(image_nD), len(image_ND), scale.dtype
    tiles = _Tiles(scale, n, N, offset)
    lowest = torch.finfo(dtype).min
    positive_n = scale.new_empty(n)
    image_hardest, text_hardest = (scale.new_full((n,), lowest) for _ in range(2))
    image_sum, text_sum = (scale.new_zeros(image_nD.shape) for _ in range(2))
    loss, bias_sum = (torch.zeros((), dtype=torch.float64, device=scale.device) for _ in range(2))
    zero = torch.zeros_like(scale)

    def similarities(queries: torch.Tensor, keys: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        logits = tiles.pair(rows, columns)[0]
        return torch.mm(queries, keys.t(), out=logits)

    for rows in tiles.rows:
        image, text = image_nD[rows].to(dtype), text_nD[rows].to(dtype)
        query = image * scale
        for columns in (*tiles.own_columns, *tiles.other_columns):
            keys, scratch = text_ND[columns].to(dtype), tiles.pair(rows, columns)[1]
            logits = similarities(query, keys, rows, columns)
            own = _own_pairs(logits, rows, columns, offset)
            first = max(rows.start, columns.start - offset)
            if len(own):
                positive_n[first : first + len(own)] = own
                own.fill_(-torch.inf)  # no negative: it adds nothing to what follows
            image_hardest[rows] = torch.maximum(image_hardest[rows], logits.amax(1))
            both = offset <= columns.start < offset + n  # these texts are own ones: the tile is theirs, too
            texts = slice(columns.start - offset, columns.stop - offset)
            if both:
                text_hardest[texts] = torch.maximum(text_hardest[texts], logits.amax(0))
            logits += bias
            loss += torch.logaddexp(logits, zero, out=scratch).sum(dtype=torch.float64)
            if not gradients:
                continue
            weight = torch.sigmoid(logits, out=scratch)
            if len(own):
                _own_pairs(weight, rows, columns, offset).copy_(
                    -torch.sigmoid(-(positive_n[first : first + len(own)] + bias))
                )
            bias_sum += weight.sum(dtype=torch.float64)
            image_sum[rows].addmm_(weight, keys)
            if both:
                text_sum[texts].addmm_(weight.t(), image)
        query = text * scale
        for columns in tiles.other_columns:
            keys = image_ND[columns].to(dtype)
            logits = similarities(query, keys, rows, columns)
            text_hardest[rows] = torch.maximum(text_hardest[rows], logits.amax(1))
            if gradients:
                text_sum[rows].addmm_(logits.add_(bias).sigmoid_(), keys)
    # NaN where a positive is infinite, which its loss alone would hide
    own_losses = torch.logaddexp(-(positive_n + bias), zero) + (positive_n - positive_n)
    loss += own_losses.sum(dtype=torch.float64)
    return SigmoidParts(positive_n, image_hardest, text_hardest, image_sum, text_sum, loss, bias_sum)
