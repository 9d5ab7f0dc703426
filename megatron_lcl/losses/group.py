"""The check of both losses' arguments over the ranks of a group, before anything else is sent."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_lcl.parallel.mesh import Axis

HEADER = 6
"""integers that every rank tells the others before anything else: whether it has an error, and up to five facts"""


def exchange(facts: Sequence[int], error: str | None, device: torch.device, axis: Axis) -> list[tuple[int, ...]]:
    """The facts of every rank, in rank order. What is wrong on any rank is a ValueError here, on every rank.

    facts: at most five, of this rank's arguments, as many on every rank; not looked at if there is an error. error:
    what is wrong with them. device: of the tensors to be sent later.

    Ranks whose messages differ in size hang or abort, so this comes before anything whose size follows from arguments.
    Hosts know the facts before their devices have computed anything. The group, or the hosts' beside it, sends from the
    CPU if it can, else in a stream of its own, so that a host does not wait for what its device computes.
    """
    if axis.group is None:
        if error is not None:
            raise ValueError(error)
        return [tuple(facts)]
    types = [of_device.split(":")[0] for of_device in dist.get_backend_config(axis.group).split(",")]
    if error is None and device.type not in types:
        error = f"tensors are on {device}, but the process group sends from {' or '.join(types)}; move them there"
    if "cpu" in types or axis.host_group is not None:
        table = _table(facts, error, torch.device("cpu"), axis)
    else:
        sent_from = device if device.type in types else torch.device(types[0], torch.cuda.current_device())
        with torch.cuda.stream(_stream(sent_from)):
            table = _table(facts, error, sent_from, axis)
    if error is not None:
        raise ValueError(error)
    if bad := [rank for rank, (flag, *_) in enumerate(table) if flag]:
        raise ValueError(f"rank(s) {bad} of the group gave arguments that do not fit; see their errors")
    return [tuple(row[1 : 1 + len(facts)]) for row in table]


def _table(facts: Sequence[int], error: str | None, device: torch.device, axis: Axis) -> list[list[int]]:
    own = torch.zeros(HEADER, dtype=torch.int64)
    own[0] = error is not None
    if error is None:
        own[1 : 1 + len(facts)] = torch.tensor(facts)
    return axis.all_gather(own.to(device)).tolist()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
