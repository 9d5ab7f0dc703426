"""What both encoders are made of: attention, the feed-forward network, the pre-norm transformer block.

q, k and v are separate parameters: a fused [q; k; v] would concatenate wrongly when the tensor-parallel size changes.

Shape legend: S rows of this tensor rank's shard, D width, R rows that all ranks hold when the shards are gathered, H
heads of this rank, K features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_lcl.config import Language, Vision
from megatron_lcl.model.attention_logits import AttentionLogits
from megatron_lcl.model.drop_path import DropPath
from megatron_lcl.model.float8 import use_float8
from megatron_lcl.parallel.layers import ColumnLinear, RowLinear, SharedParameters, gathered_linear
from megatron_lcl.parallel.mesh import Axis

Norm = Callable[..., nn.Module]
"""makes a LayerNorm of a width, and of an epsilon as `eps` where it is not 1e-5; torch's, or apex's fused one"""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""attention over q, k, v [R, H, K] → [R, H, K]; knows where sequences begin and end"""

Recompute = Literal["none", "full", "attention"]
"""what of a block is recomputed in backward instead of kept: nothing, everything, its first half"""


_GRAPHS = 64
"""that torch may make of a function, 8 by default: two encoders, with gradients and without, blocks with drop path and
without, each size of the images"""


class Attention(nn.Module):
    """Projections of multi-head self-attention, heads split over tensor ranks; what is between them is an `Attend`."""

    def __init__(self, width: int, heads: int, axis: Axis, qk_norm: Norm | None = None) -> None:
        """qk_norm: of queries and keys, over the features of a head, with the same parameters for all heads."""
        super().__init__()
        self.axis, self.heads = axis, heads // axis.size
        self.q, self.k, self.v = (ColumnLinear(width, width, axis) for _ in range(3))
        self.out = RowLinear(width, width, axis)
        self.norm_q: nn.Module | None = qk_norm and qk_norm(width // heads)
        self.norm_k: nn.Module | None = qk_norm and qk_norm(width // heads)

    def forward(self, hidden_SD: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [R, H, K] of `num_rows` rows."""
        qkv = gathered_linear([hidden_SD] * 3, (self.q, self.k, self.v), self.axis, num_rows)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in qkv)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return q, k, v


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between; hidden features split over tensor ranks."""

    def __init__(self, width: int, hidden: int, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.up, self.down = ColumnLinear(width, hidden, axis), RowLinear(hidden, width, axis)

    def forward(self, hidden_SD: torch.Tensor, num_rows: int) -> torch.Tensor:
        (up,) = gathered_linear([hidden_SD], (self.up,), self.axis, num_rows)
        return self.down(F.gelu(up))


class Block(nn.Module):
    """Pre-norm residual block (CLIP, Radford et al. 2021): attention, then feed-forward."""

    attention_logits: AttentionLogits | None = None
    """looks at them, in a step that is measured"""

    def __init__(
        self, encoder: Vision | Language, norm: Norm, axis: Axis, recompute: Recompute, drop: DropPath | None
    ) -> None:
        super().__init__()
        width = encoder.width
        self.axis, self.recompute, self.drop = axis, recompute, drop
        self.norm1 = norm(width)
        self.attention = Attention(width, encoder.heads, axis, norm if encoder.qk_norm else None)
        self.norm2, self.mlp = norm(width), FeedForward(width, encoder.mlp_width, axis)
        scaled = encoder.layer_scale is not None
        self.scale1, self.scale2 = (nn.Parameter(torch.empty(width)) if scaled else None for _ in range(2))
        self.shared = SharedParameters(self, axis)

    def residual(
        self, hidden_SD: torch.Tensor, num_rows: int, attend: Attend, factors: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """The block on this tensor rank's shard of `num_rows` rows; factors: see `DropPath.factors`; none: nothing is
        left out."""
        with self.shared.summing(self):
            return self._run("full", self._residual, hidden_SD, num_rows, attend, factors)

    def _residual(
        self, hidden_SD: torch.Tensor, num_rows: int, attend: Attend, factors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        attended = self._run("attention", self._attention, hidden_SD, num_rows, attend)
        return self._feed_forward(hidden_SD, attended, num_rows, factors)

    def _attention(self, hidden_SD: torch.Tensor, num_rows: int, attend: Attend) -> torch.Tensor:
        return self._projection(attend(*self._heads(hidden_SD, num_rows)).flatten(-2))

    def _projection(self, attended: torch.Tensor) -> torch.Tensor:
        return self.attention.out(attended)

    def _heads(self, hidden_SD: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.attention(self.norm1(hidden_SD), num_rows)

    def _feed_forward(
        self, hidden_SD: torch.Tensor, attended_SD: torch.Tensor, num_rows: int, factors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        hidden_SD = hidden_SD + _scaled(attended_SD, self.scale1, factors[:1])
        return hidden_SD + _scaled(self.mlp(self.norm2(hidden_SD), num_rows), self.scale2, factors[1:])

    def compile_parts(self, float8: bool = False, device: torch.device | None = None) -> None:
        """From now on what stands before attention and what follows on it are each one graph of torch.compile.

        Attention itself is a kernel already. A graph is compiled when it is first needed, once for all blocks of the
        same shapes. On one tensor rank alone: collectives overlap with products as they are written.

        float8: linear layers multiply in it (`use_float8`, which gets `device`); rounding is fused with what is
        before.
        """
        assert self.axis.size == 1
        torch.compiler.config.recompile_limit = _GRAPHS
        if float8:
            use_float8(self, device)
            self._projection = torch.compile(self._projection, fullgraph=True)  # type: ignore[method-assign]
        self._heads = torch.compile(self._heads, fullgraph=True)  # type: ignore[method-assign]
        self._feed_forward = torch.compile(self._feed_forward, fullgraph=True)  # type: ignore[method-assign]

    def _run(self, segment: Recompute, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        if self.recompute != segment:
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # no dropout anywhere


def _scaled(branch: torch.Tensor, scale: torch.Tensor | None, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a branch adds: LayerScale's features, and for each row nothing or more, where a factor says so."""
    if scale is not None:
        branch = branch * scale
    for factor in factors:
        branch = branch * factor
    return branch
