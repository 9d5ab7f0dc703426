"""Real processes with a gloo group for tests: start, collect results, leave none behind."""

from __future__ import annotations

import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ports import hold_port
from stacks import register, stacks_of

from megatron_lcl.train.forks import forkserver


def run_processes(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 400.0) -> list[Any]:
    """`function(rank, *arguments)` in `world_size` fresh processes; their results in rank order.

    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set; the function makes its process
    group from them. The first failure, or the timeout, ends all processes and is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _results(function, world_size, arguments, timeout, [Path(folder, str(r)) for r in range(world_size)])


def _results(
    function: Callable[..., Any], world_size: int, arguments: tuple[Any, ...], timeout: float, stacks: list[Path]
) -> list[Any]:
    held = hold_port()
    port = held.getsockname()[1]
    context = forkserver()
    results: Any = context.Queue()
    workers = [
        context.Process(
            target=_work, args=(function, rank, world_size, port, results, stacks[rank], arguments), daemon=True
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    collected: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(collected) < world_size:
            try:
                rank, ok, value = results.get(timeout=1.0)
            except queue.Empty:
                dead = [w.pid for r, w in enumerate(workers) if r not in collected and w.exitcode not in (None, 0)]
                assert not dead, f"processes {dead} died without a result"
                assert time.monotonic() < deadline, (
                    f"no result after {timeout} s; have those of {sorted(collected)}\n"
                    + stacks_of(
                        {w.pid: file for w, file in zip(workers, stacks, strict=True) if w.pid and file.exists()}
                    )
                )
                continue
            assert ok, f"rank {rank}:\n{value}"
            collected[rank] = value
        for worker in workers:
            worker.join(20)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
        held.close()
    return [collected[rank] for rank in range(world_size)]


def _work(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    results: Any,
    stacks: Path,
    arguments: tuple[Any, ...],
) -> None:
    register(stacks)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, True, function(rank, *arguments)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise


class Ends:
    """Ends the process that unpickles it, as a script does that each of its worker processes runs again."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (1,)

    def __call__(self, *_: Any) -> None:
        raise AssertionError("no process gets here")
