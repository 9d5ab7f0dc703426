"""DeepSpeed's checkpoint engine as we need it: it keeps what DeepSpeed would write, and writes nothing itself.

DeepSpeed's `save_checkpoint` is full of barriers, in which the other processes would hang if one failed (its disk is
full, say); one that only collects cannot fail. What was collected is then written by `Checkpointer`, at once or in a
thread.
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
        """copies: training goes on before the files are written, so what is collected must share no memory with it."""
        super().__init__()
        self._buffers = HostBuffers() if copies else None
        self._files: list[tuple[Path, Any]] = []
        self._fault: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a file's content."""
        try:
            content = state_dict if self._buffers is None else self._buffers.copy(state_dict)
            self._files.append((Path(path), content))
        except Exception as error:  # noqa: BLE001 raised here, the other processes would wait for this one forever
            self._fault = error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: `Checkpointer` makes the folders of the files that it writes."""

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed must clone views so that they do not drag whole buffers along; a copy never does."""
        return self._buffers is None

    def take(self) -> list[tuple[Path, Any]]:
        """The files (path, content) collected since the last call. Raises what went wrong while collecting.

        Copies are overwritten by the next `save`: they must have been written by then.
        """
        files, fault, self._files, self._fault = self._files, self._fault, [], None
        if self._buffers is not None:
            self._buffers.rewind()
        if fault is not None:
            raise fault
        return files


class HostBuffers:
    """Copies in host memory that is kept from one save to the next: fresh pages cost as much as the copying.

    With CUDA it is page-locked, and torch takes the next power of two for each tensor. Blocks of such sizes that
    tensors share could still be half as large again as what they hold: most of it are three flat partitions of
    DeepSpeed's, equally large, and each must lie in one block.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def rewind(self) -> None:
        """From here on the buffers are used again, in the same order."""
        self._used = 0

    def copy(self, value: Any) -> Any:
        """A copy that shares no memory with its source: of tensors, of containers of them, and of whatever else."""
        match value:
            case torch.Tensor():
                return self._buffer(value).copy_(value.detach())
            case dict():
                pairs = ((key, self.copy(item)) for key, item in value.items())
                return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)
            case list():
                return [self.copy(item) for item in value]
            case tuple() if type(value) is tuple:
                return tuple(self.copy(item) for item in value)
        return copy.deepcopy(value)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        known = self._buffers[self._used] if self._used < len(self._buffers) else None
        if known is None or (known.shape, known.dtype) != (like.shape, like.dtype):
            fresh = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=torch.cuda.is_available())
            self._buffers[self._used : self._used + 1] = [fresh]
        self._used += 1
        return self._buffers[self._used - 1]
