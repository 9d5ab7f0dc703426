"""The same model for images of another size."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lcl.model.lcl import LCL


def at_image_size(model: LCL, image_size: int) -> LCL:
    """The model for images of `image_size` px: its position embedding interpolated, all else shared with `model`.

    Bicubic with antialiasing on the grid of patches, the class token's position kept, as timm and open_clip do.
    ValueError where the size is not a multiple of the patch size. The language model then needs room for more, or
    fewer, placeholders: sequences of the other size's documents no longer fit as they are.
    """
    if image_size == model.config.vision.image_size:
        return model
    vision = dataclasses.replace(model.config.vision, image_size=image_size)  # checks the patch size
    config = dataclasses.replace(model.config, vision=vision)
    with torch.device("meta"):
        other = LCL(config, seed=None, whole=model.whole)
    parameters = {name: p.detach() for name, p in model.layers.named_parameters()}
    other.layers.load_state_dict(parameters | {"0.positions": other.patches.positions}, assign=True)
    other.patches.positions = nn.Parameter(interpolate_positions(model.patches.positions.detach(), vision.num_patches))
    return other


def interpolate_positions(positions: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Position embeddings of another number of patches, the class token's first: [1+P, V] → [1+num_patches, V]."""
    old, new = math.isqrt(len(positions) - 1), math.isqrt(num_patches)
    grid = positions[1:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1].float(), grid[0].flatten(1).t()])
