"""One process of a replica reads its micro-batches; the others get them from it.

The integers go to every process of the replica, so that all know every count and which images are undecodable, and only
one float tensor travels from stage to stage. The images go to the first pipeline stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lcl.data.loading.batch import PackedBatch, fields_of_kind
from megatron_lcl.parallel.mesh import Mesh


@dataclass(frozen=True)
class Header:
    """What a process must know of a micro-batch to receive it: sent first, as a row of int64."""

    counts: dict[str, int]
    """the batch's fields of kind `count`"""
    lengths: dict[str, int]
    """elements of each of its integer tensors"""
    images: tuple[int, ...]
    """shape of its images"""
    packs: tuple[int, ...]

    @classmethod
    def of(cls, batch: PackedBatch) -> Header:
        counts = {name: getattr(batch, name) for name in fields_of_kind("count")}
        lengths = {name: len(tensor) for name, tensor in batch.integers().items()}
        return cls(counts, lengths, tuple(batch.images.shape), batch.packs)

    @staticmethod
    def size(packs_per_batch: int) -> int:
        """Numbers in a row."""
        return len(fields_of_kind("count")) + len(fields_of_kind("integers")) + 4 + packs_per_batch

    def to_row(self, packs_per_batch: int) -> list[int]:
        """As it is sent; a batch may have fewer packs than there is room for."""
        packs = [*self.packs, *[-1] * packs_per_batch][:packs_per_batch]
        return [*self.counts.values(), *self.lengths.values(), *self.images, *packs]

    @classmethod
    def from_row(cls, row: Sequence[int]) -> Header:
        """From what `to_row` gave."""
        numbers = iter(row)
        counts = {name: next(numbers) for name in fields_of_kind("count")}
        lengths = {name: next(numbers) for name in fields_of_kind("integers")}
        images = tuple(itertools.islice(numbers, 4))
        return cls(counts, lengths, images, tuple(pack for pack in numbers if pack >= 0))


def broadcast_batches(
    batches: Sequence[PackedBatch] | None, num: int, packs_per_batch: int, mesh: Mesh, device: torch.device
) -> list[PackedBatch]:
    """The `num` micro-batches of a step, on every process of the replica and on its device.

    batches: what this process read; None where another one reads (`Mesh.loads_data`). Behind the first pipeline stage
    `images` has no rows. `bad_images` is where they were read only, their number everywhere.
    """
    assert (batches is not None) == mesh.loads_data, "exactly one process of a replica reads"
    if batches is not None:
        assert len(batches) == num, f"{len(batches)} micro-batches, not {num}"
        batches = [batch.to(device) for batch in batches]
        if mesh.model_parallel.size == 1:
            return batches
    rows = torch.zeros(num, Header.size(packs_per_batch), dtype=torch.int64)
    if batches is not None:
        rows = torch.tensor([Header.of(batch).to_row(packs_per_batch) for batch in batches], dtype=torch.int64)
    headers = [Header.from_row(row) for row in mesh.model_parallel.broadcast(rows).tolist()]
    return [_one(header, batches[m] if batches is not None else None, mesh, device) for m, header in enumerate(headers)]


def _one(header: Header, own: PackedBatch | None, mesh: Mesh, device: torch.device) -> PackedBatch:
    if own is None:
        integers = torch.empty(sum(header.lengths.values()), dtype=torch.int32, device=device)
    else:
        integers = torch.cat(list(own.integers().values()))
    mesh.model_parallel.broadcast(integers)
    if mesh.pipeline.rank > 0:
        images = torch.empty(0, *header.images[1:], dtype=torch.uint8, device=device)
    else:
        images = torch.empty(header.images, dtype=torch.uint8, device=device) if own is None else own.images
        mesh.tensor.broadcast(images)
    if own is not None:
        return own
    tensors = dict(zip(header.lengths, integers.split(list(header.lengths.values())), strict=True))
    fields: dict[str, Any] = {**tensors, **header.counts}
    return PackedBatch(images=images, packs=header.packs, **fields)
