"""DeepSpeed's checkpoint engine as we need it: it keeps what DeepSpeed would write, and writes nothing itself.

DeepSpeed's `save_checkpoint` is full of barriers. A process whose disk is full would leave them and strand the others;
one that only collects cannot fail. What was collected is then written by `Checkpointer`, at once or in a thread.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine


class Snapshot(TorchCheckpointEngine):
    """Collects files; `take` hands them over. Reading is DeepSpeed's own."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.copies = copies
        """whether training goes on before the files are written: tensors are copied to host memory"""
        self._files: list[tuple[Path, Any]] = []
        self._fault: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a file's content."""
        try:
            self._files.append((Path(path), to_host(state_dict) if self.copies else state_dict))
        except Exception as error:  # noqa: BLE001 raised here, the other processes would wait for this one for ever
            self._fault = error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: whoever writes the files makes their folders."""

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed must clone views so that they do not drag whole buffers along; a copy never does."""
        return not self.copies

    def take(self) -> list[tuple[Path, Any]]:
        """The files (path, content) collected since the last call. Raises what went wrong while collecting."""
        files, fault, self._files, self._fault = self._files, self._fault, [], None
        if fault is not None:
            raise fault
        return files


def to_host(value: Any) -> Any:
    """A copy in host memory that shares nothing with its source: tensors, containers of them, and whatever else."""
    match value:
        case torch.Tensor():
            return value.detach().to("cpu", copy=True)
        case dict():
            pairs = ((key, to_host(item)) for key, item in value.items())
            return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)
        case list():
            return [to_host(item) for item in value]
        case tuple() if type(value) is tuple:
            return tuple(to_host(item) for item in value)
    return copy.deepcopy(value)
