"""The processes of a benchmark's setting, which meet as those of a run do; used by the programs beside it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def measured_by_all(program: str, name: str, processes: int) -> list[Any]:
    """What `program --measure NAME` prints in its last line, as JSON, in each of so many new processes, by rank.

    SystemExit as soon as one fails; the others, which would wait for it, are ended.
    """
    from megatron_lcl.train.launch import hold_port  # here: torch reads OMP_NUM_THREADS when it is imported

    started: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        port = stack.enter_context(hold_port()).getsockname()[1]
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        stack.callback(_end, started)
        for rank, output in enumerate(outputs):
            environment = {**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, program, "--measure", name]
            started.append(subprocess.Popen(command, stdout=output, text=True, env=environment))
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.1)
        if failed := [rank for rank, code in enumerate(codes) if code]:
            raise SystemExit(f"{name}: process {failed[0]} has failed")
        said = []
        for output in outputs:
            output.seek(0)
            said.append(json.loads(output.read().splitlines()[-1]))
        return said


def _end(started: Iterable[subprocess.Popen[str]]) -> None:
    for process in started:
        process.kill()
        process.wait()


def those_that_fit(settings: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> Iterator[str]:
    """The settings with a GPU for each of their `processes`, which NCCL needs; a line says which have none. Without
    CUDA all of them."""
    import torch

    gpus = torch.cuda.device_count()
    for name in names:
        number = settings[name].get("processes", 1)
        if gpus and number > gpus:
            print(f"{name}: left out ({number} processes need {number} GPUs, not {gpus})")
        else:
            yield name
