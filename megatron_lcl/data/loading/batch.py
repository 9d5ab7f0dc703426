"""PackedBatch: what one forward pass sees. Every shape but that of `cu_seqlens` is fixed by the config, for every rank
and step.

Shape legend: B packs of the micro-batch, T token slots and I image slots of a pack, R runs that a pack may have (see
`max_runs`), C those of the micro-batch, P placeholders per image, H = W image side. Rows are the B*T token slots in
order, image slots the B*I images in order; indices below count rows of the whole micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from megatron_lcl.data.loading.packing import max_sequences

RUNS = 32
"""to a multiple of which the runs of a micro-batch are filled up by empty ones, so that few sizes occur: memory of a
device that one micro-batch has had fits the next"""


def max_runs(tokens_per_pack: int, context_length: int) -> int:
    """R: the sequences a pack may hold and the runs of at most a context's rows that an empty pack is cut into.

    Two sequences at least: a pair and its caption stand together.
    """
    return max(2, max_sequences(tokens_per_pack)) + math.ceil(tokens_per_pack / min(context_length, tokens_per_pack))


Kind = Literal["integers", "images", "count", "origin"]
"""of a field: an int32 tensor that every process of a replica needs; the images, for the first pipeline stage; a number
known on the host, for every process; where the batch came from"""
_INTEGERS, _IMAGES, _COUNT, _ORIGIN = ({"kind": kind} for kind in get_args(Kind))


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B packs, flattened. Each field declares its `Kind`."""

    tokens: torch.Tensor = field(metadata=_INTEGERS)
    """[B*T] token ids; placeholders hold the tokenizer's placeholder id, what lies past a pack's last document 0"""
    positions: torch.Tensor = field(metadata=_INTEGERS)
    """[B*T] position inside the own sequence, 0 past the last document"""
    cu_seqlens: torch.Tensor = field(metadata=_INTEGERS)
    """[C + 1] rows where runs start, in order, then B*T. Each row is in exactly one run, no run is longer than
    `max_seqlen`: a run is a sequence, or a piece of what lies past a pack's last document (attention over it is finite
    and unused). The last ones, fewer than `RUNS`, are empty: kernels of attention take time and memory for those too"""
    targets: torch.Tensor = field(metadata=_INTEGERS)
    """[B*T] id of the next token, -1 where there is none: before a placeholder or `<eoi>`, in a sequence's last row,
    and where `Sequences` says"""
    target_positions: torch.Tensor = field(metadata=_INTEGERS)
    """[B*T] rows that have a target, ascending, then -1"""
    images: torch.Tensor = field(metadata=_IMAGES)
    """[B*I, 3, H, W] uint8 RGB, 0 where there is none"""
    image_start: torch.Tensor = field(metadata=_INTEGERS)
    """[B*I] row of the image's first placeholder; -1 for a slot that is empty or whose image does not decode, and for
    every slot where sequences have no placeholders (`Sequences.interleaved`, `.captions`)"""
    image_soi: torch.Tensor = field(metadata=_INTEGERS)
    """[B*I] row of the image's `<soi>` if it takes part in the contrast, else -1; where pairs have captions, the
    `<soi>` of the sequence without placeholders, and `image_start` points into the caption"""
    image_valid: torch.Tensor = field(metadata=_INTEGERS)
    """[B*I] 1 where the slot holds an image that decoded, else 0"""
    kept_patches: torch.Tensor = field(metadata=_INTEGERS)
    """[B*I*K] the K patches of each slot that stay where others are left out (`model.vision.patch_dropout`): indices
    into its (H / patch)² patches in reading order, ascending; [0] where all stay"""
    num_targets: int = field(metadata=_COUNT)
    """rows that have a target (host)"""
    num_pairs: int = field(metadata=_COUNT)
    """images that take part in the contrast (host)"""
    num_images: int = field(metadata=_COUNT)
    """valid images (host)"""
    num_tokens: int = field(metadata=_COUNT)
    """rows that belong to a document, placeholders included (host)"""
    max_seqlen: int = field(metadata=_COUNT)
    """rows of the longest run, or more (host)"""
    num_patches: int = field(metadata=_COUNT)
    """patches of an image that the vision encoder reads: K, or all (host)"""
    num_bad_images: int = field(metadata=_COUNT, default=0)
    """images that did not decode (host)"""
    packs: tuple[int, ...] = field(metadata=_ORIGIN, default=())
    """global numbers of the packs (host)"""
    bad_images: tuple[tuple[int, str], ...] = field(metadata=_ORIGIN, default=())
    """(slot, name and reason) of images that did not decode: blank, not valid, in neither loss (host)"""

    def integers(self) -> dict[str, torch.Tensor]:
        """The integer tensors by name, in order."""
        return {name: getattr(self, name) for name in fields_of_kind("integers")}

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on a device, in two copies, one for all integers and one for the images; itself if it is there.

        To CUDA they are made from page-locked memory, so the host does not wait for them.
        """
        device, here = torch.device(device), self.images.device
        if device.type == here.type and device.index in (None, here.index):
            return self
        integers, images = self.integers(), self.images
        flat = torch.cat(list(integers.values()))
        if device.type == "cuda":
            flat, images = flat.pin_memory(), images.pin_memory()  # itself where it is already
        moved = flat.to(device, non_blocking=True).split([len(part) for part in integers.values()])
        images = images.to(device, non_blocking=True)
        return dataclasses.replace(self, images=images, **dict(zip(integers, moved, strict=True)))

    def pin_memory(self) -> PackedBatch:
        """The batch with its images in page-locked memory."""
        return dataclasses.replace(self, images=self.images.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Of a copy that `to` has made on another stream: `stream` uses it, so its memory is not given to others before
        that is done."""
        for tensor in (self.tokens, self.images):  # all integers are in one storage
            tensor.record_stream(stream)


def fields_of_kind(kind: Kind) -> tuple[str, ...]:
    """Names of the batch's fields of a kind, in order."""
    return tuple(f.name for f in dataclasses.fields(PackedBatch) if f.metadata["kind"] == kind)


def batch_bytes(packs: int, tokens_per_pack: int, images_per_pack: int, image_size: int) -> int:
    """Bytes of a batch's tensors: its images, and five integers of a token slot (the runs are fewer)."""
    return packs * (images_per_pack * 3 * image_size**2 + 4 * 5 * tokens_per_pack)


def integer_sizes(B: int, T: int, I: int, R: int, K: int = 0) -> dict[str, int]:  # noqa: E741
    """The most elements of each integer tensor, by name; shape legend as above. K: 0 where no patch is left out."""
    return {
        "tokens": B * T,
        "positions": B * T,
        "cu_seqlens": B * R + 1,
        "targets": B * T,
        "target_positions": B * T,
        "image_start": B * I,
        "image_soi": B * I,
        "image_valid": B * I,
        "kept_patches": B * I * K,
    }
