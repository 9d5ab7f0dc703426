"""`megatron-lcl selftest --all-reduce`: do all processes of a launch reach each other, and how fast?

Every process says in the launch's store that it is there. Once all are, a `Watchdog` names the one that hangs or dies,
while one sum goes over all of them, which is checked and then timed, and then one of a number in host memory. On GPUs
that travels by gloo, as much does in every step of a run. The sbatch scripts run it before training.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_lcl.parallel.mesh import Axis, join_processes, local_device
from megatron_lcl.train.launch import hosts
from megatron_lcl.train.launch_store import PortTaken, keys_set, open_store, wait_for_keys
from megatron_lcl.train.resilience.faults import exit_if_lost, name_nodes, node
from megatron_lcl.train.resilience.signals import leave
from megatron_lcl.train.resilience.start import LOST
from megatron_lcl.train.resilience.watchdog import Watchdog
from megatron_lcl.units import counted, listed

MIB = 2**20
SIZES = {"nccl": 256 * MIB, "gloo": 16 * MIB}
"""bytes that are summed: enough that latency does not count on the networks that each is used with"""
REPEATS = 5


def bus_bandwidth(num_bytes: int, seconds: float, size: int) -> float:
    """Bytes a second by nccl-tests' definition for an all-reduce over `size` processes: 2(n-1)/n · bytes/time.

    What each link carries in a ring, so it can be compared with the hardware's, however many processes there are.
    """
    return 2 * (size - 1) / size * num_bytes / seconds


@exit_if_lost()
def check_all_reduce(timeout: float) -> str:
    """Called by every process of a launch; on the first one what was found, in a line, on the others nothing.

    Ends the process with LOST and a line that names nodes (for the launch script too: `faults.name_nodes`) where a
    process has not come after `timeout` seconds, or hangs or dies later.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return "all-reduce  one process: nothing to sum"
    store, nodes = _meet(rank, size, timeout)
    with Watchdog(Axis(None, rank, size), timeout, timeout, store, ("--timeout", "--timeout")) as watchdog:
        with watchdog.long_phase(0, "making the process group"):
            group = dist.PrefixStore("all-reduce", store)
            # the watchdog is sooner, and knows whose fault it is
            join_processes(group, rank, size, timedelta(seconds=2 * timeout))
            backend, world = dist.get_backend(), Axis.of_all()
        with watchdog.long_phase(0, "summing over all processes"):
            first, seconds = _time_all_reduce(SIZES[backend], rank, size)
        with watchdog.long_phase(0, "summing over all hosts by gloo"):
            world.all_reduce(torch.ones(1))
        dist.barrier()  # the first process serves the store
    dist.destroy_process_group()
    bandwidth = bus_bandwidth(SIZES[backend], seconds, size) / 1e9
    return "" if rank else (
        f"all-reduce  {size} processes on {counted(len(set(nodes)), 'node')}, {backend}: "
        f"{SIZES[backend] // MIB} MiB in {1e3 * seconds:.3g} ms, bus bandwidth {bandwidth:.3g} GB/s "
        f"(the first one took {first:.2g} s)"
    )  # fmt: skip


def _meet(rank: int, size: int, timeout: float) -> tuple[dist.Store, list[str]]:
    """The launch's store and the node of every process, once all are there."""
    try:
        store = open_store(timeout)
        store.set_timeout(
            timedelta(seconds=timeout + 30)
        )  # the first process waits for the others as long as `timeout`
        store.set(f"node {rank}", node())
        if rank == 0:
            store.set("missing", json.dumps(_wait_for(store, size, timeout)))
        missing = json.loads(store.get("missing"))
    except (RuntimeError, PortTaken) as error:  # another node may have the port free
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        _end(rank, [0], f"does not answer at {where} ({str(error).splitlines()[0]})")
    if missing and rank == 0:
        time.sleep(1)  # the others read it
        _end(rank, missing, f"{'has' if len(missing) == 1 else 'have'} not come within {timeout:g} s")
    if missing:
        os._exit(LOST)
    return store, [name.decode() for name in store.multi_get([f"node {r}" for r in range(size)])]


def _wait_for(store: dist.Store, size: int, timeout: float) -> list[int]:
    """The processes that have not come in time."""
    keys = [f"node {r}" for r in range(size)]
    wait_for_keys(store.check, keys, timeout)
    there = set(keys_set(store.check, keys))
    return [r for r, key in enumerate(keys) if key not in there]


def _end(rank: int, missing: Sequence[int], what: str) -> Any:
    """End with LOST; says which processes are missing, and on which nodes they are to run, where Slurm tells."""
    names: list[str] = []
    with contextlib.suppress(KeyError):
        all_hosts = hosts(os.environ["SLURM_STEP_NODELIST"])  # ranks are counted along each node
        names = sorted({all_hosts[r * len(all_hosts) // int(os.environ["WORLD_SIZE"])] for r in missing})
    name_nodes(names, rank)
    where = f" of {' '.join(names)}" if names else ""
    leave(LOST, f"all-reduce: {listed(missing, 'process')}{where} {what}")


def _time_all_reduce(num_bytes: int, rank: int, size: int) -> tuple[float, float]:
    """Seconds of the first sum, in which connections are made, and the mean of the next ones; the slowest process's."""
    device = local_device()
    values = torch.full((num_bytes // 4,), rank + 1.0, device=device)
    first = _timed(values)
    expected = size * (size + 1) / 2
    wrong = torch.zeros(size, dtype=torch.int64, device=device)
    wrong[rank] = (values != expected).sum()
    dist.all_reduce(wrong)
    if wrong.any():
        who = ", ".join(f"{counted(count, 'number')} on process {r}" for r, count in enumerate(wrong.tolist()) if count)
        leave(LOST, f"all-reduce: the sum over all processes is wrong ({who}): a GPU or the network corrupts data")
    values.zero_()
    times = torch.tensor([first, sum(_timed(values) for _ in range(REPEATS)) / REPEATS], device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times[0].item(), times[1].item()


def _timed(values: torch.Tensor) -> float:
    """Seconds of one sum, begun together."""
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
