"""One process of a replica reads its micro-batches; the others get them from it.

The integers go to every process of the replica, so that all know every count and which images are rotten, and only one
float tensor travels from stage to stage. The images go to the first pipeline stage.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.parallel.mesh import Mesh

_TENSORS = [f.name for f in dataclasses.fields(PackedBatch) if f.type == "torch.Tensor" and f.name != "images"]
_NUMBERS = [f.name for f in dataclasses.fields(PackedBatch) if f.type == "int"]


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
    width = len(_NUMBERS) + len(_TENSORS) + 4 + packs_per_batch
    header = torch.zeros(num, width, dtype=torch.int64)
    if batches is not None:
        header = torch.tensor([_header(batch, packs_per_batch) for batch in batches], dtype=torch.int64)
    rows = mesh.model_parallel.broadcast(header.to(device)).tolist()
    return [_one(row, batches[m] if batches is not None else None, mesh, device) for m, row in enumerate(rows)]


def _header(batch: PackedBatch, packs_per_batch: int) -> list[int]:
    packs = [*batch.packs, *[-1] * packs_per_batch][:packs_per_batch]
    numbers = [getattr(batch, name) for name in _NUMBERS]
    return [*numbers, *(len(getattr(batch, name)) for name in _TENSORS), *batch.images.shape, *packs]


def _one(row: list[int], own: PackedBatch | None, mesh: Mesh, device: torch.device) -> PackedBatch:
    fields = iter(row)
    numbers = dict(zip(_NUMBERS, fields, strict=False))
    lengths, shape = list(itertools.islice(fields, len(_TENSORS))), list(itertools.islice(fields, 4))
    packs = tuple(pack for pack in fields if pack >= 0)
    if own is None:
        integers = torch.empty(sum(lengths), dtype=torch.int32, device=device)
    else:
        integers = torch.cat([getattr(own, name) for name in _TENSORS])
    mesh.model_parallel.broadcast(integers)
    if mesh.pipeline.rank > 0:
        images = torch.empty(0, *shape[1:], dtype=torch.uint8, device=device)
    else:
        images = torch.empty(shape, dtype=torch.uint8, device=device) if own is None else own.images
        mesh.tensor.broadcast(images)
    if own is not None:
        return own
    tensors = dict(zip(_TENSORS, integers.split(lengths), strict=True))
    return PackedBatch(images=images, packs=packs, **tensors, **numbers)  # type: ignore[arg-type]
