"""`megatron-lcl --version`, without importing torch: that takes seconds."""

from __future__ import annotations

import platform

import megatron_lcl
from megatron_lcl.machine import installed, num_cuda_devices, torch_built_for
from megatron_lcl.units import counted


def version_text() -> str:
    """Versions of this package, torch and DeepSpeed, and whether CUDA can be used."""
    names = ("torch", "deepspeed")
    versions = ", ".join(f"{name} {installed(name) or 'not installed'}" for name in names)
    return f"megatron-lcl {megatron_lcl.__version__}, Python {platform.python_version()}, {versions}\nCUDA: {_cuda()}"


def _cuda() -> str:
    built = torch_built_for("cuda")
    if built is None:
        return "no, torch is built without it"
    devices = num_cuda_devices()
    if not devices:
        return f"no GPU is visible (torch is built for CUDA {built})"
    return f"yes, {built}, {counted(devices, 'GPU')} visible"
