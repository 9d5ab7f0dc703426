"""What of this machine a process may use: cores, GPUs, and the limits of the control groups around it."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron_lcl.filesystem import exists

OWN = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may use, which are fewer than the machine's in a container or a job: those that it may
    run on, or as many as the time is that its control groups give it."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([own, *map(math.ceil, _quotas())])


def num_gpus() -> int:
    """GPUs that this process may use: by CUDA's driver, or by torch where it is imported already or built for ROCm.

    Importing it takes seconds.
    """
    if "torch" in sys.modules or torch_built_for("hip"):
        import torch

        return torch.cuda.device_count()
    return num_cuda_devices() if torch_built_for("cuda") else 0


def torch_built_for(platform: Literal["cuda", "hip"]) -> str | None:
    """The version of CUDA or ROCm that torch is built for, as its `version.py` says it; None: it is built without."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin is not None else None
    if file is None or not exists(file):
        return None
    text = file.read_text(encoding="utf-8")
    found = re.search(rf"^{platform}\b[^=\n]*= *['\"]([^'\"]+)['\"]", text, re.M)
    return found[1] if found else None


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def num_cuda_devices() -> int:
    """GPUs that CUDA's driver lets this process use, by its own count; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


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
