"""PackedBatch: what one forward pass sees. Every shape is fixed by the config, for every rank and step.

Shape legend: B packs of the micro-batch, T token places and I image slots of a pack, S sequences a pack can hold,
P placeholders per image. Rows are the B*T token places in order, image slots the B*I images in order; indices below
count rows of the whole micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B packs, flattened. Integer tensors are int32."""

    tokens: torch.Tensor
    """[B*T] token ids; placeholders and what lies past a pack's last document hold 0"""
    positions: torch.Tensor
    """[B*T] position inside the own sequence, 0 past the last document"""
    cu_seqlens: torch.Tensor
    """[B*(S+1)] starts of sequences, each pack's list padded by repeating its end; what lies past a pack's last
    document thereby is a sequence of its own (or, in the last pack, none); attention over it is finite and unused"""
    targets: torch.Tensor
    """[B*T] id of the next token, -1 where there is no target"""
    target_positions: torch.Tensor
    """[B*T] rows that have a target, ascending, then -1"""
    images: torch.Tensor
    """[B*I, 3, H, W] uint8 RGB"""
    image_start: torch.Tensor
    """[B*I] row of the image's first placeholder, -1 for an empty slot"""
    image_soi: torch.Tensor
    """[B*I] row of the image's `<soi>` if it takes part in the contrast, else -1"""
    image_valid: torch.Tensor
    """[B*I] 1 where the slot holds an image that decoded, else 0"""
    num_targets: int
    """rows that have a target (host)"""
    num_pairs: int
    """images that take part in the contrast (host)"""
    num_images: int
    """valid images (host)"""
    num_tokens: int
    """rows that belong to a document, placeholders included (host)"""
    max_seqlen: int
    """an upper bound of the longest sequence (host; the config's, so that it does not change)"""
    packs: tuple[int, ...] = ()
    """global numbers of the packs (host)"""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The batch on a device, in two copies: one for all integers, one for the images."""
        names = [
            f.name
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor) and f.name != "images"
        ]
        flat = torch.cat([getattr(self, name) for name in names])
        if torch.device(device).type == "cuda":
            flat = flat.pin_memory()
        parts = flat.to(device, non_blocking=non_blocking).split([getattr(self, name).numel() for name in names])
        images = self.images.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, images=images, **dict(zip(names, parts, strict=True)))
