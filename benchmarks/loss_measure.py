"""Time and peak memory of one loss with its backward, for the loss benchmarks beside this file."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import resident


class Measured(NamedTuple):
    seconds: float
    cpu_seconds: float
    """of all threads: what a busy machine does not change"""
    mebibytes: float
    """peak memory above what was held before (inputs)"""
    loss: float


def measure_cpu(run: Callable[[], torch.Tensor]) -> Measured:
    """One run, in a process that has done little else: memory is the process's peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    loss = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Measured(seconds, cpu, resident("VmHWM") - before, loss.item())


def measure_cuda(run: Callable[[], torch.Tensor], repeats: int = 10) -> Measured | None:
    """Median of several runs after two that warm up; None if it does not fit."""
    try:
        times = []
        for number in range(repeats + 2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            loss = run()
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                times.append(start.elapsed_time(end) / 1000)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        return Measured(statistics.median(times), 0.0, peak, loss.item())
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def in_a_fresh_process(file: str, *arguments: object) -> Measured:
    """What `file` prints with report() when called with these arguments."""
    command = [sys.executable, file, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return Measured(*json.loads(result.stdout.splitlines()[-1]))


def report(measured: Measured) -> None:
    print(json.dumps(measured))


class Ratios(NamedTuple):
    """Ours by a peer's."""

    seconds: float
    cpu_seconds: float
    mebibytes: float

    def __str__(self) -> str:
        return f"time x{self.seconds:.2f} (CPU seconds x{self.cpu_seconds:.2f}), memory x{self.mebibytes:.3f}"


def ratios(ours: list[Measured], peer: list[Measured]) -> Ratios:
    """Medians over pairs of runs, which are neighbors in time."""
    pairs = [[a / b for a, b in zip(mine, other, strict=True)] for mine, other in zip(ours, peer, strict=True)]
    return Ratios(*(statistics.median(column) for column in list(zip(*pairs, strict=True))[:3]))


def row(name: str, runs: list[Measured]) -> str:
    seconds, cpu, mebibytes, loss = (statistics.median(values) for values in zip(*runs, strict=True))
    return f"{name:<28}{seconds:>9.2f} s{cpu:>9.2f} CPU s{mebibytes:>9.0f} MiB   loss {loss:.6f}"
