"""Export to timm: the vision tower under timm's own model name, as a local hub folder.

timm reads weights in two ways. `create_model(NAME, checkpoint_path=FILE)` wants exactly the tensors of that name's
model, classifier included; `create_model("local-dir:DIR", pretrained=True)` leaves a classifier out if its number of
classes is not the model's. So the file holds a classifier as that name's model has it, all zeros, and `config.json`
asks for none.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_lcl.config import Vision
from megatron_lcl.convert.attention_pool import attention_pool, read_pool
from megatron_lcl.convert.block_names import TIMM, parameters
from megatron_lcl.convert.card import POOLED, Card, Usage, write_card
from megatron_lcl.convert.certificate import Features, check_images
from megatron_lcl.convert.folder import write_json
from megatron_lcl.convert.pool import POOL, load_encoder, save_pool
from megatron_lcl.convert.weights import save_parts
from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD
from megatron_lcl.model.lcl import LCL
from megatron_lcl.model.reference_format import mlp_ratio

LIBRARY = "timm"
WEIGHTS = "model.safetensors"
"""timm's name of the file"""

_FAMILIES = {  # width, layers, heads, width of the feed-forward part → name, but for the patch size and "_clip_SIZE"
    (256, 10, 4, 1024): "vit_xsmall_patch{}",
    (512, 12, 8, 2048): "vit_medium_patch{}",
    (640, 12, 10, 2560): "vit_betwixt_patch{}",
    (768, 12, 12, 3072): "vit_base_patch{}",
    (896, 12, 14, 3584): "vit_base_patch{}_plus",
    (1024, 24, 16, 4096): "vit_large_patch{}",
    (1280, 32, 16, 5120): "vit_huge_patch{}",
    (1408, 40, 16, 6144): "vit_giant_patch{}",  # ViT-g
    (1664, 48, 16, 8192): "vit_gigantic_patch{}",  # ViT-G, "bigG"
}

USAGE = Usage(
    "timm",
    advice=(
        "Not the class token: LCL never reads its output and so never trains it. `config.json` pools what LCL does "
        "train, the mean of the normed patch tokens (`global_pool='avg', fc_norm=False`; without a classifier). For "
        f"dense tasks use `forward_features`, {POOLED}"
    ),
    # ARGUMENTS: what create_model makes the same model of
    example=f"""\
import timm, torch
from PIL import Image
from lcl.attention_pool import attention_pool, read_pool  # a file of this folder

# also: timm.create_model(ARGUMENTS, checkpoint_path="{WEIGHTS}"), which has a classifier of zeros
model = timm.create_model("local-dir:.", pretrained=True).float().eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = transform(Image.open("image.jpg").convert("RGB"))[None]
with torch.no_grad():
    mean = model(images)  # [1, width]
    patches = model.forward_features(images)[:, model.num_prefix_tokens :]  # [1, patches, width]
    z = attention_pool(patches, *read_pool("{POOL}"))  # [1, latent width]
""",
)


def architecture(vision: Vision) -> tuple[str, dict[str, Any]]:
    """timm's name of this vision tower, and the arguments in which it differs from that name's model.

    A tower that timm has no name for is its nearest CLIP tower (by width) with the differences as arguments.
    """
    from timm import is_model

    candidates = (  # the nearest width first, then its patch size, then its image size
        (f"{family.format(patch)}_clip_{size}", known, patch, size)
        for known, family in sorted(_FAMILIES.items(), key=lambda item: abs(item[0][0] - vision.width))
        for patch in (vision.patch_size, 32, 16, 14)
        for size in (vision.image_size, 224, 240)  # one of the last two is there of every family
    )
    name, (width, layers, heads, mlp_width), patch, size = next(c for c in candidates if is_model(c[0]))
    differences = {
        "embed_dim": (vision.width, width),
        "depth": (vision.layers, layers),
        "num_heads": (vision.heads, heads),
        "mlp_ratio": (mlp_ratio(vision.mlp_width, vision.width), mlp_ratio(mlp_width, width)),
        "patch_size": (vision.patch_size, patch),
        "img_size": (vision.image_size, size),
        "pre_norm": (vision.embedding_norm, True),
        "reg_tokens": (vision.registers, 0),
        "init_values": (vision.layer_scale, None),
        "qk_norm": (vision.qk_norm, False),
        "norm_layer": (_norm_layer(vision), None),
    }
    return name, {key: ours for key, (ours, theirs) in differences.items() if ours != theirs}


_TIMM_EPS = 1e-6
"""of the LayerNorm that timm calls "layernorm"; its CLIP towers have 1e-5"""


def _norm_layer(vision: Vision) -> str | None:
    """timm's name of a LayerNorm with this epsilon; None: that of its CLIP towers. UserError where there is none."""
    if vision.norm_eps not in (1e-5, _TIMM_EPS):
        raise UserError(
            f"format timm: it names LayerNorms with an epsilon of 1e-5 and 1e-6, not model.vision.norm_eps = "
            f"{vision.norm_eps:g}"
        )
    return "layernorm" if vision.norm_eps == _TIMM_EPS else None


def check(model: LCL) -> None:
    """UserError for what timm has no place for."""
    _norm_layer(model.config.vision)


def write(model: LCL, folder: Path, dtype: torch.dtype, card: Card) -> None:
    """All files but the certificate."""
    v = model.config.vision
    positions: dict[str, torch.Tensor] = {}
    name, arguments = architecture(v)
    if v.registers:  # which have positions there: zeros
        ours = model.patches.positions.detach()
        zeros = ours.new_zeros(v.registers, v.width)
        positions = {"pos_embed": torch.cat([ours[:1], zeros, ours[1:]])[None]}
    if not v.embedding_norm:  # the patches then have a bias there
        positions["patch_embed.proj.bias"] = torch.zeros(v.width)
    classifier = {key: torch.zeros(shape) for key, shape in _classifier(name, v.width).items()}
    num_classes = len(classifier["head.bias"])
    save_parts({**_tensors(model), **positions, **classifier}, folder / WEIGHTS, dtype)
    save_pool(model, folder, dtype)
    config = {
        "architecture": name,
        "num_classes": num_classes,  # of the file; `model_args` asks for none
        "num_features": v.width,
        "global_pool": "avg",
        "model_args": {"num_classes": 0, "global_pool": "avg", "fc_norm": False, **arguments},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, v.image_size, v.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": IMAGE_MEAN,
            "std": IMAGE_STD,
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": card.license,
        },
    }
    write_json(folder / "config.json", config)
    call = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in arguments.items())])
    usage = dataclasses.replace(USAGE, example=USAGE.example.replace("ARGUMENTS", call))
    write_card(folder, usage, model.config, card)


def read(folder: Path) -> LCL:
    """The vision encoder and the pool of such a folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arguments, tensors = config["model_args"], load_file(folder / WEIGHTS)
    heads = next(
        heads
        for (_, _, heads, _), family in _FAMILIES.items()
        if re.fullmatch(family.format(r"\d+") + r"_clip_\d+", config["architecture"])
    )
    vision = Vision(
        image_size=config["pretrained_cfg"]["input_size"][1],
        patch_size=tensors["patch_embed.proj.weight"].shape[-1],
        width=config["num_features"],
        layers=sum(name.endswith(".norm1.weight") for name in tensors),
        heads=arguments.get("num_heads", heads),
        mlp_width=len(tensors["blocks.0.mlp.fc1.bias"]),
        norm_eps=_TIMM_EPS if arguments.get("norm_layer") else 1e-5,
        embedding_norm=arguments.get("pre_norm", True),
        registers=arguments.get("reg_tokens", 0),
        layer_scale=arguments.get("init_values"),
        qk_norm=arguments.get("qk_norm", False),
    )
    model = load_encoder(folder, folder / WEIGHTS, vision, _tensors)
    if vision.registers:
        rows = tensors["pos_embed"][0].float()
        with torch.no_grad():
            model.patches.positions.copy_(torch.cat([rows[:1], rows[vision.num_prefix :]]))
    return model


def features(folder: Path, size: int) -> Features:
    """What timm, and the card's example, compute of the check images."""
    import timm

    with torch.device("meta"):  # no memory for initial values
        model: Any = timm.create_model(f"local-dir:{folder}")
    tensors = load_file(folder / WEIGHTS)
    model.load_state_dict({key: t for key, t in tensors.items() if not key.startswith("head.")}, assign=True)
    model = model.float().eval()
    with torch.no_grad():
        patches = model.forward_features(check_images(size))[:, model.num_prefix_tokens :]
        return Features(patches, attention_pool(patches, *read_pool(folder / POOL)))


def _classifier(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the classifier that timm gives the model of that name when none is asked for."""
    import timm

    with torch.device("meta"):
        head: Any = timm.create_model(name, embed_dim=width, depth=1, num_heads=1).head
    return {f"head.{key}": tuple(parameter.shape) for key, parameter in head.named_parameters()}


def _tensors(model: LCL) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Our parameters under timm's names, without a classifier; parts to be concatenated as lists."""
    patches, p = model.patches, model.config.vision.patch_size
    tensors: dict[str, torch.Tensor | list[torch.Tensor]] = {
        "cls_token": patches.class_embedding[None, None],
        "patch_embed.proj.weight": patches.projection.weight.unflatten(1, (3, p, p)),
    }
    if patches.registers is None:
        tensors["pos_embed"] = patches.positions[None]
    else:  # `write` and `read` have the positions
        tensors["reg_token"] = patches.registers[None]
    for i, block in enumerate(model.vision_blocks):
        qkv = [block.attention.q, block.attention.k, block.attention.v]
        tensors[f"blocks.{i}.attn.qkv.weight"] = [layer.weight for layer in qkv]
        tensors[f"blocks.{i}.attn.qkv.bias"] = [layer.bias for layer in qkv]
        for k, scale in ((1, block.scale1), (2, block.scale2)):
            if scale is not None:
                tensors[f"blocks.{i}.ls{k}.gamma"] = scale
    for name, norm in (("norm", model.pool.norm), ("norm_pre", patches.norm)):
        tensors |= {f"{name}.{kind}": p for kind, p in norm.named_parameters()} if norm is not None else {}
    return {**tensors, **parameters(model.vision_blocks, "blocks", TIMM)}
