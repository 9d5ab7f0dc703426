"""The libraries that only some commands need."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from megatron_lcl.errors import UserError
from megatron_lcl.processes import variables

_PACKAGES = {  # import name → package, what to install
    "transformers": ("transformers", "'megatron-lcl[hf]'"),
    "timm": ("timm", "'megatron-lcl[hf]'"),
    "open_clip": ("open-clip-torch", "'megatron-lcl[clip]' timm"),
    "pycocoevalcap": ("pycocoevalcap", "'megatron-lcl[eval]'"),
    "sacrebleu": ("sacrebleu", "'megatron-lcl[eval]'"),
}

_FORCE, _NEVER = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""torch's own variables, which `torch.load` reads at each call"""

SETTINGS = threading.RLock()
"""held while a setting of the whole process is another for a while: two threads at once would not set it back"""


def require(library: str, what: str) -> dict[str, str]:
    """The library's version, under its name. UserError where it does not import: why, and what to install."""
    package, install = _PACKAGES[library]
    try:
        importlib.import_module(library)
    except Exception as error:  # noqa: BLE001 - whatever importing somebody's library raises
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            raise UserError(f"{what} needs {package}: pip install {install}") from None
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{what} needs {package}, which is installed but does not load ({said}); pip install {install} installs "
            "what it needs"
        ) from None
    return {library: importlib.metadata.version(package)}


@contextlib.contextmanager
def usual_defaults() -> Iterator[None]:
    """Inside, torch makes tensors in float32 on the CPU where nothing else is said, whatever the program's defaults."""
    with SETTINGS, torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def only_weights() -> Iterator[None]:
    """Inside, every `torch.load` of this process builds tensors and plain values alone, and what
    `torch.serialization.safe_globals` allows, whatever its caller asks for. Otherwise: pickle.UnpicklingError."""
    with SETTINGS, variables({_FORCE: "1", _NEVER: None}):
        yield


def foreign_objects(file: Path, error: UnpicklingError) -> list[str]:
    """What a pickle that was refused names and `torch.load` may not build, read without running any of it."""
    found: list[str] = []
    with contextlib.suppress(OSError, RuntimeError, ValueError, EOFError, UnpicklingError):
        found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return sorted(found or set(re.findall(r"GLOBAL (\S+)", str(error))))  # older than the zip format: the first one


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what libraries log and draw while a model is made: of weights that are yet to be loaded, for instance."""
    with SETTINGS:
        disabled = logging.root.manager.disable
        hf = sys.modules.get("transformers.utils.logging")
        bars = hf is not None and hf.is_progress_bar_enabled()
        logging.disable(logging.ERROR)  # errors are raised, too
        if bars:
            hf.disable_progress_bar()  # type: ignore[union-attr]
        try:
            yield
        finally:
            logging.disable(disabled)
            if bars:
                hf.enable_progress_bar()  # type: ignore[union-attr]
