"""Do the replicas of the model still agree, to the last bit? A silent fault of a machine shows here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatron_lcl.parallel.layers import is_split
from megatron_lcl.parallel.mesh import Mesh, local_device

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


def find_difference(module: nn.Module, mesh: Mesh) -> str | None:
    """Which processes hold other parameters than their replicas; None if all agree.

    Every process calls it, and gets the same answer. Replicas are along the data axis. What is compared is what ZeRO-1
    and 2 replicate: the parameters as the forward pass reads them. Their optimizer states, and under ZeRO-3 the
    parameters too, exist once, so that nothing is there to compare with. ZeRO rewrites all replicas from the owners'
    float32 copies in every step: found is what happened since, and what the step's all-gather delivered wrongly.

    Parameters that the tensor axis does not split are the same along that axis too, and have optimizer states of their
    own there, so that a difference stays. They can be compared where sums over the data axis are the same to the last
    bit: NCCL adds three or more numbers in an order that need not be the same for two tensor-parallel ranks.
    """
    exact = mesh.data.size <= 2 or dist.get_backend() == "gloo"
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.numel()]
    compared = []
    for axis, split in ((mesh.data_tensor if exact else mesh.data, False), (mesh.data, True)):
        own = [(name, parameter) for name, parameter in named if is_split(parameter) == split]
        prints = fingerprint([p for _, p in own]).to(local_device())  # also of a stage that has none
        compared.append((axis, [name for name, _ in own], axis.all_gather(prints)))
    differs = torch.stack([(rows != rows[0]).any() for _, _, rows in compared]).any()
    if not int(mesh.world.all_reduce(differs.to(torch.int32), dist.ReduceOp.MAX)):
        return None
    found = [_describe(rows.tolist(), axis.ranks, names) for axis, names, rows in compared if axis.rank == 0]
    return "; ".join(dict.fromkeys(text for texts in mesh.world.gather_objects(found) for text in texts if text))


def fingerprint(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One int64 for each tensor, [len(tensors)]: the sum of its elements' bits, each times an odd number of its index.

    Sums of integers do not depend on their order, and one flipped bit always changes the sum: an odd multiple of a
    power of two below 2^64 is not 0.
    """
    sums = [_sum(tensor.detach().reshape(-1)) for tensor in tensors]
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.int64)


def _sum(flat: torch.Tensor) -> torch.Tensor:
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        indices = torch.arange(start, start + len(chunk), device=flat.device)
        total += (chunk * (2 * indices + 1)).sum()
    return total


def _describe(rows: list[list[int]], ranks: Sequence[int], names: Sequence[str]) -> str:
    """In words, for the replicas `ranks`, one row of fingerprints each. "" if they agree."""
    tuples = [tuple(row) for row in rows]
    (common, votes), *others = Counter(tuples).most_common()
    if not others:
        return ""
    columns = [i for i in range(len(names)) if len({row[i] for row in tuples}) > 1]
    where = f"in {', '.join(names[i] for i in columns[:3])}{' and others' if len(columns) > 3 else ''}"
    if votes * 2 > len(tuples):
        odd = [rank for rank, row in zip(ranks, tuples, strict=True) if row != common]
        return f"process {', '.join(map(str, odd))} differs from the {votes} others {where}"
    groups = [[rank for rank, row in zip(ranks, tuples, strict=True) if row == kind] for kind in dict.fromkeys(tuples)]
    named = " and ".join(", ".join(map(str, group)) for group in groups)
    return f"processes {named} differ {where}, and none has a majority"
