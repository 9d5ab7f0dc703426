"""Export to OpenCLIP, two things in one folder.

`lcl.safetensors` with `lcl.json`: every parameter in the reference's format, which `import` takes back. And the
vision tower alone, as `open_clip.create_model("local-dir:…")` loads it: OpenCLIP has neither LCL's attention pool nor a
text tower read at `<soi>`, so its `encode_image` is the mean of the normed patches, and its text tower is a
placeholder: one tiny block of zeros.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_lcl.convert.attention_pool import attention_pool, read_pool
from megatron_lcl.convert.card import POOLED, Card, Usage, write_card
from megatron_lcl.convert.certificate import Features, check_images
from megatron_lcl.convert.find import WHOLE, WHOLE_CONFIG
from megatron_lcl.convert.folder import write_json
from megatron_lcl.convert.libraries import quietly
from megatron_lcl.convert.pool import POOL, save_pool
from megatron_lcl.convert.weights import save_parts
from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD
from megatron_lcl.model.lcl import LCL
from megatron_lcl.model.reference_format import open_clip_config, parts_open_clip

LIBRARY = "open_clip"
TOWER, TOWER_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
"""OpenCLIP's names of a local folder's files"""
_WIDTH = 8
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": _WIDTH, "heads": 1, "layers": 1, "mlp_ratio": 1.0}

USAGE = Usage(
    "open_clip",
    advice=(
        "`encode_image` gives the mean of the normed patch tokens; the text tower is a placeholder, for OpenCLIP does "
        f"not read texts as LCL does (`{WHOLE}` and `{WHOLE_CONFIG}` are the whole model, for megatron_lcl). For "
        f"dense tasks use the tokens, {POOLED}"
    ),
    example=f"""\
import open_clip, torch
from PIL import Image
from lcl.attention_pool import attention_pool, read_pool  # a file of this folder

model, transform = open_clip.create_model_from_pretrained("local-dir:.")
images = transform(Image.open("image.jpg").convert("RGB"))[None]
model.eval().visual.output_tokens = True
with torch.no_grad():
    mean, patches = model.visual(images)  # [1, width], which encode_image gives too; [1, patches, width]
    z = attention_pool(patches, *read_pool("{POOL}"))  # [1, latent width]
""",
)


_PROBABILITY = (
    "Trained by a sigmoid loss: the probability that an image and a text belong together is "
    "sigmoid(logit_scale.exp() · z · t + logit_bias), z and t the unit-norm latent and feature of the text "
    "(megatron_lcl's `encode_image` and `encode_text`)."
)


def check(model: LCL) -> None:
    """UserError for what the format has no place for, and where there is no language model."""
    model.need_language()
    parts_open_clip(model.layers, model.config)


def write(model: LCL, folder: Path, dtype: torch.dtype, card: Card) -> None:
    """All files but the certificate."""
    v = model.config.vision
    tensors = parts_open_clip(model.layers, model.config)
    save_parts(tensors, folder / WHOLE, dtype)
    config = open_clip_config(model.config)
    write_json(folder / WHOLE_CONFIG, config)

    tower = {name: parts for name, parts in tensors.items() if name.startswith("visual.")}
    tower |= {"visual.proj": [torch.eye(v.width)]}
    tower |= {name: tensors[name] for name in ("logit_scale", "logit_bias") if name in tensors}
    tower |= {name: [torch.zeros(shape)] for name, shape in _no_text_shapes(v.width).items()}
    save_parts(tower, folder / TOWER, dtype)
    tower_config = {
        "model_cfg": {
            "embed_dim": v.width,
            "vision_cfg": {**config["vision_cfg"], "pool_type": "avg"},
            "text_cfg": _NO_TEXT,
            **{key: config[key] for key in ("init_logit_bias",) if key in config},
        },
        "preprocess_cfg": {
            "mean": IMAGE_MEAN,
            "std": IMAGE_STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    write_json(folder / TOWER_CONFIG, tower_config)
    save_pool(model, folder, dtype)
    usage = USAGE
    if model.config.logit_bias is not None:
        usage = dataclasses.replace(USAGE, note=_PROBABILITY)
    write_card(folder, usage, model.config, card)


def features(folder: Path, size: int) -> Features:
    """What OpenCLIP, and the card's example, compute of the check images."""
    import open_clip

    with torch.device("meta"), quietly():  # no memory for initial values
        tower: Any = open_clip.create_model(f"local-dir:{folder}", device="meta", load_weights=False).visual
    tensors = load_file(folder / TOWER)
    visual = {name.removeprefix("visual."): tensors[name] for name in tensors if name.startswith("visual.")}
    tower.load_state_dict(visual, assign=True)
    tower.float().eval().output_tokens = True
    with torch.no_grad():
        patches = tower(check_images(size))[1]
        return Features(patches, attention_pool(patches, *read_pool(folder / POOL)))


def _no_text_shapes(embed_dim: int) -> dict[str, tuple[int, ...]]:
    w = _WIDTH
    block = {"attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,)}
    for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
        block |= {f"{name}.weight": (w, w), f"{name}.bias": (w,)}
    for name in ("ln_1", "ln_2"):
        block |= {f"{name}.weight": (w,), f"{name}.bias": (w,)}
    return {
        "positional_embedding": (1, w),
        "token_embedding.weight": (1, w),
        "ln_final.weight": (w,),
        "ln_final.bias": (w,),
        "text_projection": (w, embed_dim),
        **{f"transformer.resblocks.0.{name}": shape for name, shape in block.items()},
    }
