"""What process groups over gloo cost many processes, as torch makes them by default and as `parallel.mesh` does.

    python benchmarks/gloo_groups.py --processes 16,64,128

A group of all processes, connected all to all or on demand; and groups of two, made by all processes together or by
their members alone. All processes are on this machine, forked from one that has imported torch, so that hundreds fit.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import positives
from claims import exit_with


def measure(rank: int, size: int, folder: Path, port: int, ours: bool) -> None:
    """One process: makes the groups, sums in them, and notes what it took."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(ours))
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    dist.barrier()
    files, began = num_files(), time.monotonic()
    everyone: Any = dist.new_group()
    made = time.monotonic()
    dist.all_reduce(torch.ones(1), group=everyone)
    dist.all_gather_object([None] * size, None, group=everyone)
    note = {"all": made - began, "files": num_files() - files}
    dist.barrier()
    pairs, began = [[k, k + 1] for k in range(0, size, 2)], time.monotonic()
    pair: Any
    if ours:
        pair = dist.new_group(pairs[rank // 2], use_local_synchronization=True)
    else:
        pair, _ = dist.new_subgroups_by_enumeration(pairs)
    note["pairs"] = time.monotonic() - began
    dist.all_reduce(torch.ones(1), group=pair)
    (folder / f"{rank}.json").write_text(json.dumps(note))
    dist.barrier()
    if rank == 0:
        time.sleep(1.0)  # it serves the store


def num_files() -> int:
    """That this process has open, sockets among them."""
    return len(os.listdir("/proc/self/fd"))


def run(size: int, port: int, ours: bool) -> list[dict[str, float]]:
    """What the processes of one measurement noted."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(size):
            if not (pid := os.fork()):
                try:
                    measure(rank, size, Path(folder), port, ours)
                finally:
                    os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        return [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=positives, default="16,64,128", help="even numbers (%(default)s)")
    parser.add_argument("--port", type=int, default=29_850, help="the first of as many as there are rows (%(default)s)")
    options = parser.parse_args()
    if odd := [size for size in options.processes if size % 2]:
        parser.error(f"--processes {odd[0]} cannot be divided into groups of two: give even numbers")
    torch.set_num_threads(1)
    port = options.port
    print("processes           a group of all, s  its open files in a process  groups of two, s")
    for size in options.processes:
        for ours in (False, True):
            port += 1
            notes = run(size, port, ours)
            assert len(notes) == size, f"{size - len(notes)} of {size} processes failed"
            everyone, files, pairs = (max(note[name] for note in notes) for name in ("all", "files", "pairs"))
            how = "ours" if ours else "default"
            print(f"{size:9}  {how:7}  {everyone:17.2f}  {files:27.0f}  {pairs:16.2f}", flush=True)


if __name__ == "__main__":
    exit_with(main)
