"""`megatron-lcl --version`, without importing torch: that takes seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
from importlib import metadata
from pathlib import Path

import megatron_lcl
from megatron_lcl.units import counted


def version_text() -> str:
    """Versions of this package, torch and DeepSpeed, and whether CUDA can be used."""
    names = ("torch", "deepspeed")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    return f"megatron-lcl {megatron_lcl.__version__}, Python {platform.python_version()}, {versions}\nCUDA: {_cuda()}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    built = _torch_cuda()
    if built is None:
        return "no, torch is built without it"
    devices = _num_devices()
    if not devices:
        return f"no GPU is visible (torch is built for CUDA {built})"
    return f"yes, {built}, {counted(devices, 'GPU')} visible"


def _torch_cuda() -> str | None:
    """The CUDA version that torch is built for, as its `version.py` says it; None: it is built without."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.M)
    return found[1] if found else None


def _num_devices() -> int:
    """GPUs that the driver lets this process use, by its own count; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
