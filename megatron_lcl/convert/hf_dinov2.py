"""What `hf` writes of an encoder without a norm behind the patch embedding: transformers' `Dinov2Model`, with registers
`Dinov2WithRegistersModel`.

Both compute what the encoder does: class token and patches with learned positions, registers behind the class token
without, pre-norm blocks with biases, the exact GELU and LayerScale, a final norm. What they have beside it changes
nothing: a bias of the patches and a mask token of zeros; where the encoder has no LayerScale, one of ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from megatron_lcl.config import Vision
from megatron_lcl.convert.block_names import HF_DINOV2, parameters
from megatron_lcl.convert.card import POOLED, Usage
from megatron_lcl.convert.pool import POOL
from megatron_lcl.errors import UserError
from megatron_lcl.model.lcl import LCL

PREPARATION = (
    "It is measured on images of the model's size. Of other ones transformers' processor, which has no setting for it, "
    "rounds the place of the center crop down; megatron_lcl, as torchvision, timm and OpenCLIP, rounds a half to the "
    "even number: where the resized longer side is longer than the crop by 3, 7, 11 … pixels, the crops differ by one "
    "pixel. Gray images of 16 or 32 bits, or of floats, lose what lies above 255 there, as in Pillow's `convert`, and "
    "are scaled to 8 bits in megatron_lcl."
)
"""said of an export whose images transformers' CLIPImageProcessor prepares"""

OTHER_SIZES = (
    "For another image size export again with `--image-size`: transformers' class interpolates the positions without "
    "antialiasing, which changes the features by some percent."
)
"""said of `CLIPVisionModel` and `Dinov2Model`; `Dinov2WithRegistersModel` interpolates as megatron_lcl does"""

_USAGE = Usage(
    "transformers",
    advice=(
        "Not `pooler_output`: that is the class token's output, which LCL never reads and so never trains. Use the "
        "patch tokens of `last_hidden_state`, which comes after the final norm (for dense tasks, or their mean), "
        f"{POOLED}"
    ),
    # PREFIX: rows of an image before its patches
    example=f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from lcl.attention_pool import attention_pool, read_pool  # a file of this folder

model, processor = AutoModel.from_pretrained(".").float(), AutoImageProcessor.from_pretrained(".")
images = processor(Image.open("image.jpg"), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    patches = model(images).last_hidden_state[:, PREFIX:]  # [1, patches, width]
    z = attention_pool(patches, *read_pool("{POOL}"))  # [1, latent width]
""",
    note=(
        '`pipeline("image-feature-extraction")` returns `last_hidden_state` with the rows before the patches '
        "(`pool=True`: `pooler_output`); use these lines in its place."
    ),
    difference=PREPARATION,
)


def usage(vision: Vision) -> Usage:
    """What the model card says of it."""
    note = _USAGE.note if vision.registers else f"{_USAGE.note} {OTHER_SIZES}"
    return dataclasses.replace(_USAGE, example=_USAGE.example.replace("PREFIX", str(vision.num_prefix)), note=note)


def config_of(vision: Vision) -> dict[str, Any]:
    """The `config.json`, but for the dtype. UserError for what neither class has a place for."""
    name = "Dinov2WithRegistersModel" if vision.registers else "Dinov2Model"
    if vision.qk_norm:
        raise UserError(f"format hf: transformers' {name} has no place for model.vision.qk_norm = True")
    if vision.mlp_width % vision.width:
        raise UserError(
            f"format hf: transformers' {name} has no place for model.vision.mlp_width = {vision.mlp_width}, which is "
            f"no multiple of the width, {vision.width}"
        )
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": "dinov2_with_registers" if vision.registers else "dinov2",
        "hidden_size": vision.width,
        "mlp_ratio": vision.mlp_width // vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": vision.norm_eps,
        "qkv_bias": True,
        "layerscale_value": 1.0 if vision.layer_scale is None else vision.layer_scale,
        "use_swiglu_ffn": False,
    }
    return config | ({"num_register_tokens": vision.registers} if vision.registers else {})


def vision_of(config: Mapping[str, Any]) -> Vision:
    """The encoder of such a `config.json`."""
    return Vision(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["hidden_size"] * config["mlp_ratio"],
        norm_eps=config["layer_norm_eps"],
        embedding_norm=False,
        registers=config.get("num_register_tokens", 0),
        layer_scale=config["layerscale_value"],
    )


def constants(vision: Vision) -> dict[str, torch.Tensor]:
    """What the class has and the encoder has not, such that it changes nothing."""
    ones = {
        f"encoder.layer.{i}.layer_scale{k}.lambda1": torch.ones(vision.width)
        for i in range(vision.layers * (vision.layer_scale is None))
        for k in (1, 2)
    }
    return {
        "embeddings.mask_token": torch.zeros(1, vision.width),
        "embeddings.patch_embeddings.projection.bias": torch.zeros(vision.width),
        **ones,
    }


def tensors(model: LCL) -> dict[str, torch.Tensor]:
    """Our parameters under the names of the published DINOv2 checkpoints, which transformers 4 and 5 both read."""
    patches, p = model.patches, model.config.vision.patch_size
    found = {
        "embeddings.cls_token": patches.class_embedding[None, None],
        "embeddings.position_embeddings": patches.positions[None],
        "embeddings.patch_embeddings.projection.weight": patches.projection.weight.unflatten(1, (3, p, p)),
    }
    if patches.registers is not None:
        found["embeddings.register_tokens"] = patches.registers[None]
    for i, block in enumerate(model.vision_blocks):
        for k, scale in ((1, block.scale1), (2, block.scale2)):
            if scale is not None:
                found[f"encoder.layer.{i}.layer_scale{k}.lambda1"] = scale
    found |= {f"layernorm.{kind}": parameter for kind, parameter in model.pool.norm.named_parameters()}
    found |= parameters(model.vision_blocks, "encoder.layer", HF_DINOV2)
    return {name: value.detach() for name, value in found.items()}
