"""The same model for images of another size."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from megatron_lcl.errors import UserError
from megatron_lcl.model.lcl import LCL
from megatron_lcl.model.positions import interpolate_positions


def at_image_size(model: LCL, image_size: int) -> LCL:
    """The model for images of `image_size` px: its position embedding interpolated, all else shared with `model`.

    Bicubic with antialiasing on the grid of patches, the class token's position kept, as timm and open_clip do.
    UserError where the size is not a multiple of the patch size. The language model then needs room for more, or
    fewer, placeholders: sequences of the other size's documents no longer fit as they are.
    """
    if image_size == model.config.vision.image_size:
        return model
    patch = model.config.vision.patch_size
    if image_size < patch or image_size % patch:
        below = max(image_size // patch, 1) * patch
        nearest = f"{below} or {below + patch}" if image_size > patch else f"{patch}, say"
        raise UserError(
            f"images of {image_size} px have no whole number of patches (model.vision.patch_size = {patch}); give "
            f"{nearest}"
        )
    vision = dataclasses.replace(model.config.vision, image_size=image_size)
    config = dataclasses.replace(model.config, vision=vision)
    with torch.device("meta"):
        other = LCL(config, seed=None, whole=model.whole)
    parameters = {name: p.detach() for name, p in model.layers.named_parameters()}
    other.layers.load_state_dict(parameters | {"0.positions": other.patches.positions}, assign=True)
    other.patches.positions = nn.Parameter(interpolate_positions(model.patches.positions.detach(), vision.num_patches))
    return other
