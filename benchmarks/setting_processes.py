"""The processes of a benchmark's setting, which meet as those of a run do; used by the programs beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from megatron_lcl.train.launch import free_port


def measured_by_all(program: str, name: str, processes: int) -> list[Any]:
    """What `program --measure NAME` prints in its last line, as JSON, in each of so many new processes, by rank."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, program, "--measure", name],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{name}: a process has failed")
    return [json.loads(text.splitlines()[-1]) for text in said]
