"""What both losses need of a process group."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_lcl.parallel.mappings import all_gather

HEADER = 6
"""integers that every rank tells the others before anything else: whether it has an error, and up to five facts"""


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's place in the group, and its size; without a group a process is alone.

    Raises ValueError if the group does not contain this process.
    """
    if group is None:
        return 0, 1
    rank = dist.get_rank(group) if isinstance(group, dist.ProcessGroup) else -1  # new_group gives outsiders a number
    if rank < 0:
        raise ValueError(
            "this process is not in the given process group; call this only on the group's ranks, "
            "or with group=None for this process alone"
        )
    return rank, dist.get_world_size(group)


def exchange(
    facts: Sequence[int], error: str | None, device: torch.device, group: dist.ProcessGroup | None
) -> list[tuple[int, ...]]:
    """The facts of every rank, in rank order. What is wrong on any rank is a ValueError here, on every rank.

    facts: at most five, of this rank's arguments, as many on every rank; not looked at if there is an error. error:
    what is wrong with them. device: of the tensors to be sent later.

    Ranks whose messages differ in size hang or abort, so this comes before anything whose size follows from arguments.
    Hosts know the facts before their devices have computed anything. The group sends from the CPU if it can, else in a
    stream of its own, so that a host does not wait for what its device computes.
    """
    if group is None:
        if error is not None:
            raise ValueError(error)
        return [tuple(facts)]
    types = [of_device.split(":")[0] for of_device in dist.get_backend_config(group).split(",")]
    if error is None and device.type not in types:
        error = f"tensors are on {device}, but the process group sends from {' or '.join(types)}; move them there"
    if "cpu" in types:
        table = _table(facts, error, torch.device("cpu"), group)
    else:
        place = device if device.type in types else torch.device(types[0], torch.cuda.current_device())
        with torch.cuda.stream(_stream(place)):
            table = _table(facts, error, place, group)
    if error is not None:
        raise ValueError(error)
    if bad := [rank for rank, (flag, *_) in enumerate(table) if flag]:
        raise ValueError(f"rank(s) {bad} of the group gave arguments that do not fit; see their errors")
    return [tuple(row[1 : 1 + len(facts)]) for row in table]


def _table(facts: Sequence[int], error: str | None, place: torch.device, group: dist.ProcessGroup) -> list[list[int]]:
    own = torch.zeros(HEADER, dtype=torch.int64)
    own[0] = error is not None
    if error is None:
        own[1 : 1 + len(facts)] = torch.tensor(facts)
    own = own.to(place)
    table = own.new_empty(dist.get_world_size(group) * HEADER)
    all_gather(table, own, group=group)
    return table.view(-1, HEADER).tolist()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
