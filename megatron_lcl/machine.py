"""What of this machine a process may use: cores, GPUs, and the limits of the control groups around it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")
_GPU_DEVICES = ("nvidiactl", "nvmap", "kfd", "dxg")
"""one of them is there for NVIDIA's driver, that of its Jetson, AMD's, or Windows' own under WSL"""


def num_cores() -> int:
    """Cores that this process may use, which are fewer than the machine's in a container or a job: those that it may
    run on, or as many as the time is that its control groups give it."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([own, *map(math.ceil, _quotas())])


def num_gpus() -> int:
    """GPUs that this process may use. torch, which takes seconds to import, is asked where the machine may have any."""
    if "torch" not in sys.modules and not any(Path("/dev", name).exists() for name in _GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count()


def _quotas() -> Iterator[float]:
    """Seconds of CPU in a second, as each control group limits them."""
    for folder, version in control_groups("cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            quota, period = map(float, " ".join((folder / name).read_text() for name in names).split())
        except (OSError, ValueError):  # "max", or a container that shows no more than its own group
            continue
        if quota > 0:  # -1 is none
            yield quota / period


def control_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of this process's control group and those around it, whether or not they are visible here, each with its
    version: 2, whose groups have all controllers, or 1, of which it is that controller's."""
    try:
        groups = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and controller not in controllers.split(","):
            continue
        base = ROOT / controller if controllers else ROOT
        folder = base / path.strip("/")
        for ancestor in (folder, *folder.parents):
            if ancestor == base.parent:
                break
            yield ancestor, 1 if controllers else 2
