"""The same model for images of another size, or in another precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from megatron_lcl.config import Model
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
    positions = interpolate_positions(model.patches.positions.detach(), vision.num_patches)
    return _sharing(model, config, {"0.positions": positions.to(model.patches.positions.dtype)})


def on_cpu_in_float32(model: LCL) -> LCL:
    """The same model as `load_model` gives it; parameters that are on the CPU in float32 already are shared."""
    parameters = {name: p.detach().to("cpu", torch.float32) for name, p in model.layers.named_parameters()}
    return _sharing(model, model.config, parameters)


def _sharing(model: LCL, config: Model, others: Mapping[str, torch.Tensor]) -> LCL:
    """A model of this config that has the other one's parameters, but for the given ones."""
    with torch.device("meta"):
        made = LCL(config, seed=None, whole=model.whole)
    parameters = {name: p.detach() for name, p in model.layers.named_parameters()}
    made.layers.load_state_dict({**parameters, **others}, assign=True)
    return made
