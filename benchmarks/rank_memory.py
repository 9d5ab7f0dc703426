"""What one process of a run keeps of all others, in host memory: built as a run builds it, without the others.

    python benchmarks/rank_memory.py --processes 64,512,4096 --tensor 2 --pipeline 4

Collectives give what as many processes like this one would: torch's "fake" process group sends nothing. Counted
are Python's objects (tracemalloc): kept is what stays, peak the most while it is made or read. What torch's own code
and a network library take is not seen.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from arguments import positive, positives
from claims import exit_with
from torch.testing._internal.distributed.fake_pg import FakeStore

os.environ["DS_ACCELERATOR"] = "cpu"  # it is imported here, before any process group is made
import deepspeed
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.losses.group import exchange
from megatron_lcl.objectives.base import COUNTS, GlobalCounts
from megatron_lcl.parallel.mesh import Axis, Mesh
from megatron_lcl.train.engine import quiet_deepspeed
from megatron_lcl.train.layout import build_mesh, build_topology
from megatron_lcl.train.resilience import watchdog
from megatron_lcl.train.resilience.watchdog import State, Watchdog
from megatron_lcl.train.telemetry.clock import Clock
from megatron_lcl.train.telemetry.meter import StepMeter

CHUNKS, SKIPPED = 1000, 100
"""states of a ledger, which are as many as it keeps, and ranges of packs that were passed over"""


def gathered(axis: Axis, tensor: torch.Tensor) -> torch.Tensor:
    """As many rows."""
    return tensor.detach()[None].repeat(axis.size, *[1] * tensor.dim())


def objects(axis: Axis, value: Any) -> list[Any]:
    """As many objects, none of which is another."""
    return [pickle.loads(pickle.dumps(value)) for _ in range(axis.size)]


class Others:
    """A store in which every process has left its state."""

    def __init__(self, mesh: Mesh) -> None:
        sequences = {str(n): 10**6 for n in range(sum(axis.group is not None for axis in vars(mesh).values()))}
        self._state = State(host="node-0000.cluster", step=10**5, doing="computing", sequences=sequences)

    def check(self, keys: Sequence[str]) -> bool:
        return True

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [json.dumps(vars(self._state) | {"num_published": n + 1}).encode() for n in range(len(keys))]

    def set(self, key: str, value: str) -> None: ...


def heartbeats(mesh: Mesh) -> Watchdog:
    """One turn of the thread that reads the others' states."""
    found = Watchdog(mesh.world, 600.0, 600.0, store=Others(mesh))  # type: ignore[arg-type]
    with (
        mock.patch.object(watchdog, "_sequences", return_value={}),
        mock.patch.object(found._closing, "wait", side_effect=[False, True]),
    ):
        found._publish_and_read()
    assert len(found._others) == mesh.world.size - 1
    return found


def ledger() -> Ledger:
    """Of a run on four corpora that has read a billion documents and passed over packs, as a checkpoint gives it."""
    corpora = [f"/data/corpora/part-{n}" for n in range(4)]
    blend = [{"path": path, "fingerprint": f"{n:064x}", "weight": 1.0} for n, path in enumerate(corpora)]
    skipped = [{"from_pack": 5000 * n, "skip": 512} for n in range(SKIPPED)]
    states = [
        {
            "pack": 40_000 * n,
            "positions": {path: [n, 7 * n] for path in corpora},
            "blend": 0,
            "served": dict.fromkeys(corpora, 7 * n),
        }
        for n in range(1, CHUNKS + 1)
    ]
    value = {"settings": {}, "entries": [{"from_pack": 0, "blend": blend}, *skipped], "states": states}
    return Ledger.from_json(json.loads(json.dumps(value)))


def counts_of(mesh: Mesh) -> GlobalCounts:
    """Of the global batch."""
    return GlobalCounts.of([SimpleNamespace(**dict.fromkeys(COUNTS, 1000))], mesh, torch.device("cpu"))  # type: ignore[list-item]


def line_of(meter: StepMeter) -> dict[str, Any]:
    """A line of metrics."""
    meter._slots, result = [0, 0], SimpleNamespace(num_tokens=0, num_images=0, metrics={}, measured=None)
    return meter.line(1, result, 1e-3)  # type: ignore[arg-type]


def measured(make: Callable[[], Any]) -> tuple[Any, int, int]:
    """What is made, bytes that stay, and the most there were."""
    gc.collect()
    tracemalloc.start()
    made = make()
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return made, kept, peak


def rows(processes: int, config: Config) -> list[tuple[str, int, int]]:
    """What it is, kept and peak, of the first process of so many."""
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    deepspeed.init_distributed("gloo", verbose=False)
    found = []

    def add(name: str, make: Callable[[], Any]) -> Any:
        made, kept, peak = measured(make)
        found.append((name, kept, peak))
        return made

    try:
        mesh = add("mesh: axes and their groups", lambda: build_mesh(config))
        data, parallel = mesh.data.size, config.parallel
        if parallel.tensor * parallel.pipeline > 1:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the topology
                add("DeepSpeed's topology and groups", lambda: PipelineParallelGrid(build_topology(config, data)))
        with (
            mock.patch.object(Axis, "all_gather", gathered),
            mock.patch.object(Axis, "gather_objects", objects),
        ):
            add("counts of the global batch, every step", lambda: counts_of(mesh))
            facts, device = (1000, 1, 1, 1, 1), torch.device("cpu")
            add("headers of the contrast, every step", lambda: exchange(facts, None, device, mesh.data_tensor))
            meter = add("places of processes", lambda: StepMeter(config, mesh, Clock(device), mock.Mock()))
            add("times of processes, every line", lambda: line_of(meter))
        add("heartbeats", lambda: heartbeats(mesh))
        add(f"ledger, {CHUNKS} chunks", ledger)
    finally:
        dist.destroy_process_group()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=positives, default="64,512,4096", help="(%(default)s)")
    parser.add_argument("--tensor", type=positive, default=2, help="(%(default)s)")
    parser.add_argument("--pipeline", type=positive, default=4, help="(%(default)s)")
    options = parser.parse_args()
    replica, sizes = options.tensor * options.pipeline, options.processes
    if odd := [size for size in sizes if size % replica]:
        parser.error(f"--processes {odd[0]} is no multiple of tensor times pipeline ({replica})")
    quiet_deepspeed()
    parallel = {"tensor": options.tensor, "pipeline": options.pipeline}
    _, *columns = (  # the first is there to import what is imported when it is used
        rows(size, configs.from_dict({"parallel": parallel, "train": {"global_batch": size}}))
        for size in (replica, *sizes)
    )
    print("kB, kept / peak, of " + ", ".join(f"{size:,}" for size in sizes) + " processes")
    for of_sizes in zip(*columns, strict=True):
        numbers = " | ".join(f"{kept / 1e3:,.1f} / {peak / 1e3:,.1f}" for _, kept, peak in of_sizes)
        print(f"| {of_sizes[0][0]} | {numbers} |")


if __name__ == "__main__":
    exit_with(main)
