"""Whether Triton can compile here: the kernels of the losses, in whose place plain torch does the same, and others'."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

from megatron_lcl.filesystem import exists


@functools.cache
def triton_fault() -> str | None:
    """Why Triton kernels cannot be built for this machine's GPUs, in one line; None if they can."""
    if fault := import_fault():
        return fault
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler, and there is no gcc or clang on the PATH; install one, or name it in CC"
    if not exists(_headers() / "Python.h"):  # its launchers are compiled with them
        return f"triton needs Python's headers, and there is no Python.h in {_headers()}; install python3-dev"
    if fault := _cache_fault():
        return f"triton cannot write what it compiles: {fault}; name a folder in TRITON_CACHE_DIR"
    return None


def _cache_fault() -> str | None:
    """Why Triton cannot make a folder for a kernel in its cache, as it does for each (triton/runtime/cache.py)."""
    from triton import knobs

    try:
        os.makedirs(knobs.cache.dir, exist_ok=True)
        tempfile.TemporaryDirectory(dir=knobs.cache.dir).cleanup()
    except OSError as error:
        return f"{knobs.cache.dir}: {error.strerror}"
    return None


def _headers() -> Path:
    """Where Triton looks for them (triton/runtime/build.py)."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])


def import_fault() -> str | None:
    """Why Triton cannot be imported; None if it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # noqa: BLE001 - whatever importing somebody's library raises
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "triton is not installed"
        return f"triton is installed but does not load ({type(error).__name__}: {' '.join(str(error).split())})"
    return None
