"""Export to Hugging Face: the vision tower, the attention pool beside it, a model card.

The tower is a `CLIPVisionModel`; without a norm behind the patch embedding one of DINOv2's (`hf_dinov2`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_lcl.config import Model, Vision
from megatron_lcl.convert import hf_dinov2
from megatron_lcl.convert.attention_pool import attention_pool, read_pool
from megatron_lcl.convert.block_names import HF_CLIP, parameters
from megatron_lcl.convert.card import POOLED, Card, Usage, write_card
from megatron_lcl.convert.certificate import Features, check_images
from megatron_lcl.convert.folder import write_json
from megatron_lcl.convert.libraries import quietly
from megatron_lcl.convert.pool import POOL, load_encoder, save_pool
from megatron_lcl.convert.weights import save_parts
from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD
from megatron_lcl.model.lcl import LCL

LIBRARY = "transformers"

USAGE = Usage(
    "transformers",
    advice=(
        "Not `pooler_output`: that is the class token's output, which LCL never reads and so never trains. And not "
        "`last_hidden_state` as it is: it comes before the final norm. Use the normed patch tokens (for dense tasks, "
        f"or their mean), {POOLED}"
    ),
    example=f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from lcl.attention_pool import attention_pool, read_pool  # a file of this folder

model, processor = AutoModel.from_pretrained(".").float(), AutoImageProcessor.from_pretrained(".")
images = processor(Image.open("image.jpg"), return_tensors="pt")["pixel_values"]
norm = getattr(model, "vision_model", model).post_layernorm
with torch.no_grad():
    patches = norm(model(images).last_hidden_state[:, 1:])  # [1, patches, width]
    z = attention_pool(patches, *read_pool("{POOL}"))  # [1, latent width]
""",
    note=(
        '`pipeline("image-feature-extraction")` returns `last_hidden_state` as it is (`pool=True`: `pooler_output`); '
        "use these lines in its place. "
    )
    + hf_dinov2.OTHER_SIZES,
    difference=hf_dinov2.PREPARATION,
)

_SIZES = {
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}


def check(model: LCL) -> None:
    """UserError for what transformers' classes have no place for."""
    if model.config.vision.embedding_norm:
        _clip_config(model.config)
    else:
        hf_dinov2.config_of(model.config.vision)


def write(model: LCL, folder: Path, dtype: torch.dtype, card: Card) -> None:
    """All files but the certificate."""
    v = model.config.vision
    if v.embedding_norm:
        config, tensors, usage = _clip_config(model.config), _tensors(model), USAGE
    else:
        config, usage = hf_dinov2.config_of(v), hf_dinov2.usage(v)
        tensors = hf_dinov2.tensors(model) | hf_dinov2.constants(v)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    save_parts(tensors, folder / "model.safetensors", dtype)
    save_pool(model, folder, dtype)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": v.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": v.image_size, "width": v.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor)
    write_card(folder, usage, model.config, card)


def _clip_config(model: Model) -> dict[str, Any]:
    """CLIPVisionModel's `config.json`, but for the dtype. UserError for an option that it has no place for."""
    v = model.vision
    options: dict[str, Any] = {"registers": 0, "layer_scale": None, "qk_norm": False}
    for name, usual in options.items():
        if (value := getattr(v, name)) != usual:
            other = (
                "" if name == "qk_norm" else " (Dinov2Model has one, and none for model.vision.embedding_norm = True)"
            )
            raise UserError(
                f"format hf: transformers' CLIPVisionModel has no place for model.vision.{name} = {value}{other}"
            )
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **{theirs: getattr(v, ours) for ours, theirs in _SIZES.items()},
        "num_channels": 3,
        "projection_dim": model.language.width,
        "hidden_act": "gelu",
        "layer_norm_eps": v.norm_eps,
        "attention_dropout": 0.0,
    }


def read(folder: Path) -> LCL:
    """The vision encoder and the pool of such a folder."""
    config, weights = json.loads((folder / "config.json").read_text(encoding="utf-8")), folder / "model.safetensors"
    if config["model_type"] != "clip_vision_model":
        return load_encoder(folder, weights, hf_dinov2.vision_of(config), hf_dinov2.tensors)
    sizes = {ours: config[theirs] for ours, theirs in _SIZES.items()}
    return load_encoder(folder, weights, Vision(**sizes, norm_eps=config["layer_norm_eps"]), _tensors)


def features(folder: Path, size: int) -> Features:
    """What transformers, and the card's example, compute of the check images."""
    from transformers import AutoModel

    with quietly():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tower = getattr(model, "vision_model", model)  # transformers 4 has one level more
    with torch.no_grad():
        hidden = model(check_images(size)).last_hidden_state[:, 1 + getattr(model.config, "num_register_tokens", 0) :]
        patches = tower.post_layernorm(hidden) if model.config.model_type == "clip_vision_model" else hidden
        return Features(patches, attention_pool(patches, *read_pool(folder / POOL)))


def _tensors(model: LCL) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names; `vision_model.` in front, which 4 and 5 both read."""
    patches, pool = model.patches, model.pool
    p = model.config.vision.patch_size
    tensors = {
        "embeddings.class_embedding": patches.class_embedding,
        "embeddings.patch_embedding.weight": patches.projection.weight.unflatten(1, (3, p, p)),
        "embeddings.position_embedding.weight": patches.positions,
    }
    assert patches.norm is not None
    for name, norm in (("pre_layrnorm", patches.norm), ("post_layernorm", pool.norm)):
        tensors |= {f"{name}.{kind}": parameter for kind, parameter in norm.named_parameters()}
    tensors |= parameters(model.vision_blocks, "encoder.layers", HF_CLIP)
    return {f"vision_model.{name}": value.detach() for name, value in tensors.items()}
