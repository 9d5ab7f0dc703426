"""The one writer of safetensors files: one tensor after another, so that no copy of the model is in memory.

safetensors' own `save_file` takes all tensors at once, each whole and in its final dtype.

Format: https://huggingface.co/docs/safetensors — the header's length (8 bytes, little-endian), a JSON header, the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_safetensors(
    file: IO[bytes],
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    read: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors of the given dtypes and shapes into an open file, in the mapping's order.

    read: a tensor's elements by its name, called when it is its turn; several parts are one after another in the file,
    which concatenates them along the first dimension. Parts are rounded to the tensor's dtype.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, (dtype, shape) in tensors.items():
        elements = 0
        for part in read(name):
            flat = part.detach().to(dtype).contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
            elements += flat.numel()
        assert elements == torch.Size(shape).numel(), f"{name} is not of the shape that the header says"


def save_parts(
    tensors: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
    path: Path,
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A file of tensors, each whole or as parts to be concatenated along the first dimension, rounded to `dtype`.

    A 0-d tensor (the log scale) stays float32 whatever the others' dtype.
    """
    parts = {name: [t] if isinstance(t, torch.Tensor) else list(t) for name, t in tensors.items()}
    described = {}
    for name, pieces in parts.items():
        shape = list(pieces[0].shape)
        if len(pieces) > 1:
            shape[0] = sum(len(piece) for piece in pieces)
        described[name] = (dtype if shape else torch.float32, shape)
    with path.open("wb") as file:
        write_safetensors(file, described, parts.__getitem__, {"format": "pt", **(metadata or {})})
