"""Four gloo processes that stay alive for many tests, each of which may use the first 1 to 4 of them."""

from __future__ import annotations

import datetime
import re
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_lcl.train.forks import forkserver

SIZE = 4
PATIENCE = 240.0
"""seconds a process may take over one call; more is a hang"""


class GlooPool:
    def __init__(self) -> None:
        context = forkserver()
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], arguments: list[tuple]) -> list[Any]:
        """function(group, *arguments[rank]) on ranks 0 to len(arguments) - 1, which form the group; their results.

        A process that raises gives the exception as its result. TimeoutError if one does not answer, EOFError or
        BrokenPipeError if it has died.
        """
        pipes = self._pipes[: len(arguments)]
        for pipe, given in zip(pipes, arguments, strict=True):
            pipe.send((function, len(arguments), given))
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"rank {rank} of {len(arguments)} did not answer within {PATIENCE} s")
            results.append(pipe.recv())
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def assert_told(said: list[Any], message: str) -> None:
    """Every process had a ValueError, of these texts: rank 1's arguments do not fit, or not those of the others."""
    assert all(isinstance(text, str) for text in said), said
    assert re.search(message, said[1]), said
    first, second, *others = said
    assert first in (second, "rank(s) [1] of the group gave arguments that do not fit; see their errors"), said
    assert others == [first] * len(others), said


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=datetime.timedelta(seconds=PATIENCE)
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, SIZE + 1)}
    while True:
        function, size, arguments = pipe.recv()
        try:
            pipe.send(function(groups[size], *arguments))
        except Exception as error:  # noqa: BLE001 - handed to the test
            error.add_note(traceback.format_exc())
            pipe.send(error)
