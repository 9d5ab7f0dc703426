"""What both losses need of a process group."""

from __future__ import annotations

import torch.distributed as dist

# the name since torch 2.13; the older one warns there
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
