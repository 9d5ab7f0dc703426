"""PackedBatch: what one forward pass sees. Every shape is fixed by the config, for every rank and step.

Shape legend: B packs of the micro-batch, T token places and I image slots of a pack, R runs of a pack (see
`num_runs`), P placeholders per image, H = W image side. Rows are the B*T token places in order, image slots the B*I
images in order; indices below count rows of the whole micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_lcl.data.loading.packing import max_sequences


def num_runs(tokens_per_pack: int, max_seqlen: int) -> int:
    """R: the sequences a pack may hold and the runs of at most `max_seqlen` rows that an empty pack is cut into."""
    return max_sequences(tokens_per_pack) + math.ceil(tokens_per_pack / max_seqlen)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B packs, flattened. Integer tensors are int32."""

    tokens: torch.Tensor
    """[B*T] token ids; placeholders hold the tokenizer's placeholder id, what lies past a pack's last document 0"""
    positions: torch.Tensor
    """[B*T] position inside the own sequence, 0 past the last document"""
    cu_seqlens: torch.Tensor
    """[B*R + 1] rows where runs start, then B*T. Each row is in exactly one run, no run is longer than `max_seqlen`: a
    run is a sequence, or a piece of what lies past a pack's last document (attention over it is finite and unused), or
    empty"""
    targets: torch.Tensor
    """[B*T] id of the next token, -1 where there is none: before a placeholder or `<eoi>`, in a sequence's last row"""
    target_positions: torch.Tensor
    """[B*T] rows that have a target, ascending, then -1"""
    images: torch.Tensor
    """[B*I, 3, H, W] uint8 RGB, 0 where there is none"""
    image_start: torch.Tensor
    """[B*I] row of the image's first placeholder; -1 for a slot that is empty or whose image does not decode, and for
    every slot of objective `clip`, which has no placeholders"""
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
    """min(context length, T): an upper bound of the longest run (host)"""
    num_bad_images: int = 0
    """images that did not decode (host)"""
    packs: tuple[int, ...] = ()
    """global numbers of the packs (host)"""
    bad_images: tuple[tuple[int, str], ...] = ()
    """(slot, name and reason) of images that did not decode: blank, not valid, in neither loss (host)"""

    def _integers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor) and field.name != "images":
                yield field.name, value

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The batch on a device, in two copies: one for all integers, one for the images.

        With pinned memory (`pin_memory`) the copies run beside the computation.
        """
        names, parts = zip(*self._integers(), strict=True)
        flat = torch.cat(parts)
        if torch.device(device).type == "cuda":
            flat = flat.pin_memory()
        moved = flat.to(device, non_blocking=non_blocking).split([p.numel() for p in parts])
        images = self.images.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, images=images, **dict(zip(names, moved, strict=True)))

    def pin_memory(self) -> PackedBatch:
        """The batch with its images in page-locked memory."""
        return dataclasses.replace(self, images=self.images.pin_memory())
