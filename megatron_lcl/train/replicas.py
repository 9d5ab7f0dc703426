"""Do the replicas of the model still agree, to the last bit? A silent fault of a machine shows here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatron_lcl.parallel.mesh import Mesh

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


def find_difference(module: nn.Module, mesh: Mesh) -> str | None:
    """Which processes hold other parameters than their fellows of the data axis; None if all agree.

    Every process calls it, and gets the same answer. What is compared is what ZeRO-1 and 2 replicate: the parameters
    as the forward pass reads them. Their optimizer states, and under ZeRO-3 the parameters too, exist once, so that
    nothing is there to compare with. ZeRO rewrites all replicas from the owners' float32 copies in every step: found
    is what happened since, and what the step's all-gather delivered wrongly.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.numel()]
    mine = fingerprint([p for p in module.parameters() if p.numel()])
    everyone = [mine]
    if mesh.data.group is not None and len(mine):
        everyone = [torch.empty_like(mine) for _ in range(mesh.data.size)]
        dist.all_gather(everyone, mine, group=mesh.data.group)
    rows = torch.stack(everyone)
    differs = mesh.world.all_reduce((rows != rows[0]).any().to(torch.int32), dist.ReduceOp.MAX)
    if not int(differs):
        return None
    found = [_describe(rows.tolist(), mesh.data.ranks, names)] if mesh.data.rank == 0 else [""]
    return "; ".join(dict.fromkeys(text for texts in mesh.world.gather_objects(found) for text in texts if text))


def fingerprint(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One int64 for each tensor, [len(tensors)]: the sum of its elements' bits, each times an odd number of its place.

    Sums of integers do not depend on their order, and one flipped bit always changes the sum: an odd multiple of a
    power of two below 2^64 is not 0.
    """
    sums = [_sum(tensor.detach().reshape(-1)) for tensor in tensors]
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.int64)


def _sum(flat: torch.Tensor) -> torch.Tensor:
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(part), device=flat.device)
        total += (part * (2 * places + 1)).sum()
    return total


def _describe(rows: list[list[int]], ranks: Sequence[int], names: Sequence[str]) -> str:
    """In words, for the data-parallel fellows `ranks`, one row of fingerprints each. "" if they agree."""
    tuples = [tuple(row) for row in rows]
    (common, votes), *others = Counter(tuples).most_common()
    if not others:
        return ""
    columns = [i for i in range(len(names)) if len({row[i] for row in tuples}) > 1]
    where = f"in {', '.join(names[i] for i in columns[:3])}{' and others' if len(columns) > 3 else ''}"
    if votes * 2 > len(tuples):
        odd = [rank for rank, row in zip(ranks, tuples, strict=True) if row != common]
        return f"process {', '.join(map(str, odd))} differs from the {votes} others {where}"
    camps = [[rank for rank, row in zip(ranks, tuples, strict=True) if row == kind] for kind in dict.fromkeys(tuples)]
    return (
        f"processes {' and '.join(', '.join(map(str, camp)) for camp in camps)} differ {where}, and none has a majority"
    )
