"""A safetensors file written one tensor at a time, so that a conversion needs no copy of the model.

Format: https://huggingface.co/docs/safetensors — the header's length (8 bytes, little-endian), a JSON header, the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def save_parts(
    tensors: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
    path: Path,
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, each whole or as parts to be concatenated along the first dimension, rounded to `dtype`.

    A 0-d tensor (the log scale) stays float32 whatever the others' dtype.
    """
    parts = {name: [t] if isinstance(t, torch.Tensor) else list(t) for name, t in tensors.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, pieces in parts.items():
        shape = list(pieces[0].shape)
        if len(pieces) > 1:
            shape[0] = sum(len(piece) for piece in pieces)
        kind = _kind(pieces[0], dtype)
        end = start + sum(piece.numel() for piece in pieces) * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for pieces in parts.values():
            for piece in pieces:
                flat = piece.detach().to(_kind(piece, dtype)).contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)


def _kind(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.dim() else torch.float32
