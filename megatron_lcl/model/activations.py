"""What layers hand to each other, and what the last one gives.

Shape legend: N image slots, P patches of an image, K of them that stay (`PackedBatch.kept_patches`; else K = P),
L = 1+registers+K, V vision width, D language width, R = B*T token slots; S rows of this tensor rank's shard of any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_lcl.data.loading.batch import PackedBatch


class Activations(NamedTuple):
    """What one layer hands to the next: one float tensor and the token part of the batch (see PackedBatch)."""

    hidden: torch.Tensor
    """before the first layer: images [N, 3, H, W], uint8 or normalized float; in the vision encoder: the own shard of
    N*L rows, [S, V]; from pool + interleave on: [S, D], the own shard of R token rows, then that of N image latents"""
    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    targets: torch.Tensor
    target_positions: torch.Tensor
    """only the rows that have a target"""
    image_start: torch.Tensor
    image_soi: torch.Tensor
    kept_patches: torch.Tensor
    max_seqlen: int
    num_patches: int
    """rows of an image in the vision encoder, beside the class token's and the registers"""
    packs: tuple[int, ...] = ()
    """numbers of the packs, by which drop path draws; without them nothing is dropped"""

    @property
    def kept_NK(self) -> torch.Tensor | None:
        """[N, K] the patches that stay of each slot; None: all."""
        return self.kept_patches.view(-1, self.num_patches) if len(self.kept_patches) else None

    @property
    def images_used(self) -> torch.Tensor:
        """[N] whether a loss reads the image of a slot."""
        return (self.image_start >= 0) | (self.image_soi >= 0)

    @classmethod
    def of(cls, batch: PackedBatch) -> Activations:
        x = cls(batch.images, *(getattr(batch, name) for name in cls._fields[1:]))
        return x._replace(target_positions=x.target_positions[: batch.num_targets])


class Outputs(NamedTuple):
    """What the head gives: the same on every tensor rank, which all do the same with it."""

    generation: torch.Tensor
    """sum of the negative log-likelihoods (nats) of all targets, float32 scalar; NaN in the first forwards of a step
    with `contrast.strategy: recompute`, which leave the targets out"""
    latents: torch.Tensor
    """[N, D] float32 image latents z, of every slot, as the pool gives them"""
    contexts: torch.Tensor
    """[N, D] float32 context features read at each slot's `<soi>`, as the projection gives them (meaningless where
    image_soi is -1)"""
    log_scale: torch.Tensor
    """[1] float32"""
    logit_bias: torch.Tensor | None = None
    """[1] float32; None where the model has none"""

    @property
    def image_features(self) -> torch.Tensor:
        """[N, D] the latents, unit norm."""
        return unit_norm(self.latents)

    @property
    def text_features(self) -> torch.Tensor:
        """[N, D] the context features, unit norm."""
        return unit_norm(self.contexts)


def unit_norm(features: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length one, in float32."""
    return F.normalize(features.float(), dim=-1)
