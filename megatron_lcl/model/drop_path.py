"""Stochastic depth (Huang et al., arXiv 1603.09382), drawn by what a residual branch is added to, not by a generator.

A branch is left out for a whole image, in the vision encoder, or a whole sequence, in the language model, and divided
by 1 - rate where it stays. What is left out is a hash of (seed, pack, image slot or first row of the sequence, layer,
branch): no pack is read twice in a run, every layout and a second forward of the same pack draw alike, and nothing is
kept between steps. The rate grows linearly with depth, from 0 in an encoder's first block (DeiT, arXiv 2012.12877;
timm).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_lcl.model.transfer import from_host

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BRANCHES = 2
"""of a block: attention, feed-forward"""
LANGUAGE, VISION = 1 << 20, 1 << 21
"""what is added to the number of a layer of the language model and of the vision encoder: below are the draws of an
image's crop, which have the same key where `data.seed` is `train.seed`"""


class DropPath:
    """What of a block is left out, for all rows of a micro-batch."""

    def __init__(self, rate: float, seed: int, layer: int) -> None:
        """layer: the block's number in its encoder; with LANGUAGE or VISION added."""
        self.rate, self.seed, self.layer = rate, seed, layer

    def factors(self, packs: torch.Tensor, units: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """What each row's branches are multiplied by, 0 or 1 / (1 - rate): BRANCHES of [S, 1].

        packs, units int64 [S]: of each row the number of its pack and, in it, of what it belongs to.
        """
        key = _mix(_mix(_mix(torch.zeros_like(packs), self.seed), packs), units)
        drawn = (uniform(_mix(key, self.layer * BRANCHES + branch)) for branch in range(BRANCHES))
        return [((u >= self.rate).double() / (1 - self.rate)).to(dtype)[:, None] for u in drawn]


def rate_of(layer: int, layers: int, largest: float) -> float:
    """The rate of an encoder's block: linear in its number, the last one's is the largest."""
    return largest * layer / max(layers - 1, 1)


def numbers_of(packs: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers of a micro-batch's packs, int64 [B]."""
    return from_host(packs, device, torch.int64)


def _mix(key: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
    """`data.loading.hashes.mix`, elementwise, the 64 bits as int64."""
    x = key + (_signed(_GOLDEN * (value + 1)) if isinstance(value, int) else _signed(_GOLDEN) * (value + 1))
    for _ in range(2):
        x = (x ^ _right(x, 30)) * _signed(_MIX1)
        x = (x ^ _right(x, 27)) * _signed(_MIX2)
        x = x ^ _right(x, 31)
    return x


def uniform(hashed: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float64, from 64 bits."""
    return _right(hashed, 11).double() * 2.0**-53


def _right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The lowest 64 bits as int64."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number
