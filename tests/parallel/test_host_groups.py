"""Where a group sends from devices only, what lies in host memory travels by gloo beside it."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from pathlib import Path
from unittest.mock import create_autospec, patch

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from megatron_lcl.parallel.mesh import Axis, Mesh, join_processes
from megatron_lcl.selftest.cases import Case
from megatron_lcl.train.engine import init_processes


def sent_by(axis: Axis) -> tuple[int, int]:
    """Collectives so far in the axis's group and in that of its hosts."""
    assert axis.group is not None
    assert axis.host_group is not None
    return tuple(g._get_sequence_number_for_group() for g in (axis.group, axis.host_group))  # type: ignore[return-value]


def exchange(rank: int) -> None:
    dist.init_process_group("gloo")
    lists = {"data": [[0, 1], [2, 3]], "tensor": [[0, 2], [1, 3]], "model_parallel": [[0, 1, 2, 3]]}
    with patch.object(dist, "get_backend", lambda *_: "nccl"):  # as on GPUs; here both are gloo
        mesh = Mesh.of_lists(lists)
    plain = Mesh.of_lists(lists)
    assert plain.world.host_group is plain.data.host_group is None
    for axis in (mesh.world, mesh.data, mesh.tensor, mesh.model_parallel):
        before = sent_by(axis)
        own = torch.tensor([10 * rank])
        assert axis.all_gather(own)[:, 0].tolist() == [10 * r for r in axis.ranks]
        assert axis.all_reduce(own.clone()).tolist() == [sum(10 * r for r in axis.ranks)]
        assert axis.broadcast(own.clone(), axis.size - 1).tolist() == [10 * axis.ranks[-1]]
        assert axis.gather_objects(rank) == list(axis.ranks)
        assert axis.broadcast_object(rank) == axis.ranks[0]
        after = sent_by(axis)
        assert after[0] == before[0], "nothing in the group of devices"
        assert after[1] > before[1] + 4
    dist.destroy_process_group()


def test_host_memory_and_objects_travel_by_the_hosts_group() -> None:
    run_processes(exchange, 4)


def num_sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


def sockets_of_a_group(rank: int) -> int:
    """How many a group of all processes has that has summed something."""
    init_processes(Case(data=12).config())
    one = torch.ones(1)
    for _ in range(2):  # the default group has connected what it connects
        dist.all_reduce(one.clone())
        dist.barrier()
    before = num_sockets()
    group = dist.new_group(backend="gloo")
    dist.all_reduce(one, group=group)
    assert one == 12
    found = num_sockets() - before
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts sockets as Linux lists them")
def test_a_process_connects_only_to_those_it_sends_to() -> None:
    """Not to all others: at 512 processes two groups would be more files than a process may usually open."""
    assert max(run_processes(sockets_of_a_group, 12)) < 11


@pytest.mark.parametrize(("size", "device"), [(1, None), (2, torch.device("cuda", 3))])
def test_on_gpus_the_group_of_all_is_made_as_deepspeed_makes_a_runs(size: int, device: torch.device | None) -> None:
    """Bound to the device, where there are several processes: so later groups are split from it, in a check as in a
    run."""
    store = dist.HashStore()
    with (
        patch.dict(os.environ, {"LOCAL_RANK": "3"}),
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "set_device") as chosen,
        patch.object(torch.cuda, "current_device", lambda: chosen.call_args.args[0]),
        patch.object(dist, "init_process_group", create_autospec(dist.init_process_group)) as made,
    ):
        join_processes(store, 0, size, timedelta(seconds=9))
    limit = timedelta(seconds=9)
    made.assert_called_once_with("nccl", store=store, rank=0, world_size=size, timeout=limit, device_id=device)
