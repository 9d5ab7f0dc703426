"""The parts that both encoders are made of: linear layers, the feed-forward part, the pre-norm transformer block.

q, k and v are separate parameters: a fused [q; k; v] would concatenate wrongly when the tensor-parallel size changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Norm = Callable[[int], nn.Module]
"""makes a LayerNorm of a width; torch's, or apex's fused one"""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""attention over q, k, v [R, H, K] → [R, H, K]; knows where sequences begin and end"""


class Attention(nn.Module):
    """Multi-head self-attention on rows [R, width]; which rows see which is the caller's `attend`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden_RD: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = (layer(hidden_RD).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        return self.out(attend(q, k, v).flatten(-2))


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(hidden_RD)))


class Block(nn.Module):
    """Pre-norm residual block (CLIP, Radford et al. 2021): attention, then feed-forward."""

    def __init__(self, width: int, heads: int, mlp_width: int, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.attention = norm(width), Attention(width, heads)
        self.norm2, self.mlp = norm(width), FeedForward(width, mlp_width)

    def residual(self, hidden_RD: torch.Tensor, attend: Attend) -> torch.Tensor:
        hidden_RD = hidden_RD + self.attention(self.norm1(hidden_RD), attend)
        return hidden_RD + self.mlp(self.norm2(hidden_RD))
