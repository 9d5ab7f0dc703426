"""Reading the pickles of a checkpoint without letting them run anything.

A pickle may name any function of any module to be called while it is read. Here only tensors, Python's plain values and
the few classes of DeepSpeed's own files are built, by torch's restricted reader (`torch.load(weights_only=True)`). It
imports and calls nothing that is not on its list.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from megatron_lcl.convert.libraries import foreign_objects, only_weights

_REMEDY = "go on only from a checkpoint that a run of megatron_lcl wrote; train.init_from takes weights from elsewhere"


def deepspeed_types() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The classes in DeepSpeed's checkpoints beside tensors and plain values; none does more than keep values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _deepspeed_allowed() -> contextlib.AbstractContextManager[None]:
    return torch.serialization.safe_globals(deepspeed_types())


@contextlib.contextmanager
def restricted() -> Iterator[None]:
    """Inside, every `torch.load` of this process builds only what is allowed, whatever its caller asks for.

    For DeepSpeed's own reading, which asks for `weights_only=False` in many places; on the main thread, with no save in
    the background, for it sets variables of the environment. Otherwise: pickle.UnpicklingError.
    """
    with only_weights(), _deepspeed_allowed():
        yield


def load_mapped(file: Path) -> Any:
    """The content of a file that `torch.save` wrote; tensors are mapped, not read. UnpicklingError as `restricted`.

    It leaves the environment alone: saves in the background call it while other threads work.
    """
    with _deepspeed_allowed():
        return torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)


def refused(files: Iterable[Path]) -> str | None:
    """Why the first of these files that is refused is; None: all can be read. Nothing of them is run."""
    for file in files:
        try:
            load_mapped(file)
        except UnpicklingError as error:
            with _deepspeed_allowed():
                wanted = foreign_objects(file, error)
            what = f"wants to build {', '.join(wanted[:3])}" if wanted else "is no checkpoint of DeepSpeed's"
            return f"{file} is refused: a checkpoint is data, and this pickle {what}; {_REMEDY}"
    return None
