"""Position embeddings of patches for images of another size."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F


def interpolate_positions(positions: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Position embeddings of another number of patches, the class token's first: [1+P, V] → [1+num_patches, V] float32.

    Bicubic with antialiasing on the grid of patches, the class token's position kept, as timm and open_clip do.
    """
    old, new = math.isqrt(len(positions) - 1), math.isqrt(num_patches)
    grid = positions[1:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1].float(), grid[0].flatten(1).t()])


def positions_for(positions: torch.Tensor, num_patches: int) -> torch.Tensor:
    """The same inside the model, in the positions' own dtype: as they are where they are as many, else interpolated.

    As a product with a matrix, `interpolate_positions` being linear: its gradient has the same bits in every run on
    CUDA too, where that of torch's interpolation has not.
    """
    if len(positions) == 1 + num_patches:
        return positions
    matrix = _matrix(len(positions) - 1, num_patches, positions.device)
    return (matrix @ positions.float()).to(positions.dtype)


@functools.lru_cache(maxsize=8)
def _matrix(old: int, new: int, device: torch.device) -> torch.Tensor:
    """[1+new, 1+old] float32."""
    with torch.inference_mode(False), torch.device("cpu"):  # kept for later calls, whatever mode this one is in
        return interpolate_positions(torch.eye(1 + old), new).to(device)
