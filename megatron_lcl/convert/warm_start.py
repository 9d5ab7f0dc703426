"""Encoders of timm, Hugging Face and OpenCLIP under our names: what `train.init_from` lets a run begin with.

What the architectures write differently and compute alike is moved where we have it: the bias of a patch embedding, and
another mean and standard deviation of the pixels, into the patch projection and the patches' positions; positions of
registers into these; a text tower's `<end_of_text>`, at which CLIP reads a text, into `<soi>`, at which we do. What
computes something else is refused by its name. May import config and model, and of libraries what they were made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lcl.config import Language, Vision
from megatron_lcl.convert.block_names import HF_CLIP, HF_DINOV2, TIMM
from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD

Place = tuple[str, int, str]
"""of a parameter: its layer's kind (patches, vision, pool, language, head), the number among those, its name there"""


@dataclass(frozen=True)
class Tower:
    """A vision encoder, or a text tower, of another library."""

    config: Vision | Language
    tensors: dict[Place, torch.Tensor]
    """float32; rows that the tower has nothing for are NaN"""
    unused: list[str]
    """its parameters that the model has no place for, by their names"""
    faithful: bool = True
    """whether what it is made of computes what the library's tower does"""


class _Parameters:
    """A module's parameters, which are taken one by one."""

    def __init__(self, module: nn.Module, prefix: str = "") -> None:
        self.left = {prefix + name: parameter.detach().float() for name, parameter in module.named_parameters()}
        self.prefix = prefix

    def take(self, name: str) -> torch.Tensor:
        return self.left.pop(self.prefix + name)

    def has(self, name: str) -> bool:
        return self.prefix + name in self.left

    def take_or_zeros(self, name: str, size: int) -> torch.Tensor:
        """A bias, or zeros where there is none."""
        return self.take(name) if self.has(name) else torch.zeros(size)


def vision_tower(module: Any, mean: Sequence[float], std: Sequence[float]) -> Tower | None:
    """The vision encoder of a timm, Hugging Face or OpenCLIP model; None where it has none.

    mean, std: of the pixels that the model takes. UserError, naming the field, for what computes something else.
    """
    visual = getattr(module, "visual", module)
    trunk = getattr(visual, "trunk", visual)
    if _is(trunk, "timm.models.vision_transformer", "VisionTransformer"):
        return _timm(trunk, mean, std)
    if _is(visual, "open_clip.transformer", "VisionTransformer"):
        return _open_clip(visual, mean, std)
    vision = getattr(module, "vision_model", module)
    if getattr(getattr(vision, "config", None), "model_type", "") == "clip_vision_model":
        tower = _hf(vision, mean, std)
        projection = [name for name, _ in module.named_parameters() if name.startswith("visual_projection.")]
        return replace(tower, unused=[*tower.unused, *projection])
    if getattr(getattr(module, "config", None), "model_type", "") in _HF_VITS:
        return _hf_vit(module, mean, std)
    if visual is not module or vision is not module or not _is_text(module):
        found = type(vision if vision is not module else trunk).__name__
        raise UserError(
            f"its vision encoder is a {found}; VisionTransformer (timm, OpenCLIP), CLIPVisionModel, ViTModel and "
            "Dinov2Model (Hugging Face) are what the model is like"
        )
    return None


def text_tower(module: Any) -> Tower | None:
    """The text tower of a CLIP model of OpenCLIP or Hugging Face; None where it has none. UserError as `vision_tower`.

    Its vocabulary is CLIP's, with `<start_of_text>` and `<end_of_text>` last; ours has three more tokens behind them.
    """
    if hasattr(module, "text_model"):
        return _hf_text(module)
    text = getattr(module, "text", module)
    if hasattr(text, "token_embedding") and hasattr(text, "transformer"):
        return _open_clip_text(text, "text." if text is not module else "")
    if text is not module:
        raise UserError(f"its text tower is a {type(text).__name__}, not CLIP's")
    return None


def _is(module: Any, package: str, name: str) -> bool:
    return any(f"{c.__module__}.{c.__name__}" == f"{package}.{name}" for c in type(module).__mro__)


def _is_text(module: Any) -> bool:
    return hasattr(module, "text_model") or hasattr(module, "token_embedding")


# --- vision ------------------------------------------------------------------------------------------------------


def _timm(trunk: Any, mean: Sequence[float], std: Sequence[float]) -> Tower:
    own, first = _Parameters(trunk), trunk.blocks[0]
    for name, module, expected in (
        ("block_fn", first, "Block"),
        ("attn_layer", first.attn, "Attention"),
        ("mlp_layer", first.mlp, "Mlp"),
        ("embed_layer", trunk.patch_embed, "PatchEmbed"),
    ):
        if type(module).__name__ != expected:
            raise UserError(f"{name} is {type(module).__name__}; the model's is like timm's {expected}")
    for name, module in (
        ("scale_attn_norm", getattr(first.attn, "norm", None)),
        ("scale_mlp_norm", getattr(first.mlp, "norm", None)),
        ("embed_norm_layer", getattr(trunk.patch_embed, "norm", None)),
    ):
        if module is not None and not isinstance(module, nn.Identity):
            raise UserError(f"{name} is {type(module).__name__}; the model has no such norm")
    if trunk.pos_embed is None:
        raise UserError("pos_embed is none; the model's positions are learned")
    _check_gelu("act_layer", first.mlp.act)
    vision = Vision(
        image_size=_square("img_size", trunk.patch_embed.img_size),
        patch_size=_square("patch_size", trunk.patch_embed.patch_size),
        width=trunk.embed_dim,
        layers=len(trunk.blocks),
        heads=first.attn.num_heads,
        mlp_width=first.mlp.fc1.out_features,
        norm_eps=_epsilon(trunk),
        embedding_norm=not isinstance(trunk.norm_pre, nn.Identity),
        registers=trunk.num_reg_tokens,
        layer_scale=None if isinstance(first.ls1, nn.Identity) else 1.0,
        qk_norm=not isinstance(getattr(first.attn, "q_norm", nn.Identity()), nn.Identity),
    )
    width, prefix = vision.width, trunk.num_prefix_tokens
    weight = own.take("patch_embed.proj.weight")
    bias = own.take_or_zeros("patch_embed.proj.bias", width)
    rows = own.take("pos_embed")[0]
    prefixed = len(rows) == prefix + vision.num_patches
    nothing = torch.zeros(1, width)
    classes = rows[:1] if trunk.cls_token is not None and prefixed else nothing
    tensors = _patches(weight, bias, torch.cat([classes, rows[prefix * prefixed :]]), mean, std)
    if trunk.cls_token is not None:
        tensors["patches", 0, "class_embedding"] = own.take("cls_token")[0, 0]
    if vision.registers:
        places = rows[prefix - vision.registers : prefix] if prefixed else 0
        tensors["patches", 0, "registers"] = own.take("reg_token")[0] + places
    for i in range(vision.layers):
        tensors |= _block(own, f"blocks.{i}", ("vision", i), TIMM, width)
        qkv = own.take(f"blocks.{i}.attn.qkv.weight"), own.take_or_zeros(f"blocks.{i}.attn.qkv.bias", 3 * width)
        tensors |= _qkv("vision", i, *qkv)
        for k in (1, 2) if vision.layer_scale is not None else ():
            tensors["vision", i, f"scale{k}"] = own.take(f"blocks.{i}.ls{k}.gamma")
    tensors |= _norm(own, "norm_pre", ("patches", 0, "norm")) if vision.embedding_norm else {}
    normed = own.has("norm.weight")
    tensors |= _norm(own, "norm", ("pool", 0, "norm")) if normed else {}
    return Tower(vision, tensors, sorted(own.left), normed and trunk.cls_token is not None)


def _open_clip(visual: Any, mean: Sequence[float], std: Sequence[float]) -> Tower:
    own, first = _Parameters(visual, "visual."), visual.transformer.resblocks[0]
    _check_open_clip_block(first)
    pooled = getattr(visual, "attn_pool", None) is not None  # as CoCa's, whose last norm is of that pool's queries
    if visual.final_ln_after_pool and not pooled:
        raise UserError("final_ln_after_pool is true; the model's final norm is of the patches")
    vision = Vision(
        image_size=_square("image_size", visual.image_size),
        patch_size=_square("patch_size", visual.patch_size),
        width=visual.conv1.out_channels,
        layers=len(visual.transformer.resblocks),
        heads=first.attn.num_heads,
        mlp_width=first.mlp.c_fc.out_features,
        norm_eps=_epsilon(visual),
        embedding_norm=not isinstance(visual.ln_pre, nn.Identity),
        layer_scale=None if isinstance(first.ls_1, nn.Identity) else 1.0,
    )
    positions, weight = own.take("positional_embedding"), own.take("conv1.weight")
    tensors = _patches(weight, torch.zeros(vision.width), positions, mean, std)
    tensors["patches", 0, "class_embedding"] = own.take("class_embedding")
    tensors |= _open_clip_blocks(own, "vision", vision)
    tensors |= _norm(own, "ln_pre", ("patches", 0, "norm")) if vision.embedding_norm else {}
    tensors |= _norm(own, "attn_pool.ln_k" if pooled else "ln_post", ("pool", 0, "norm"))
    return Tower(vision, tensors, sorted(own.left))


def _hf(model: Any, mean: Sequence[float], std: Sequence[float]) -> Tower:
    own, config = _Parameters(model), model.config
    _check_gelu("hidden_act", model.encoder.layers[0].mlp.activation_fn, config.hidden_act)
    vision = Vision(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.intermediate_size,
        norm_eps=config.layer_norm_eps,
    )
    positions, weight = own.take("embeddings.position_embedding.weight"), own.take("embeddings.patch_embedding.weight")
    tensors = _patches(weight, torch.zeros(vision.width), positions, mean, std)
    tensors["patches", 0, "class_embedding"] = own.take("embeddings.class_embedding")
    tensors |= _hf_blocks(own, "vision", vision)
    tensors |= _norm(own, "pre_layrnorm", ("patches", 0, "norm"))
    tensors |= _norm(own, "post_layernorm", ("pool", 0, "norm"))
    return Tower(vision, tensors, sorted(own.left))


_HF_VITS = ("vit", "dinov2", "dinov2_with_registers")
_HF_VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    **{f"attention.{x}": f"attention.{x}_proj" for x in "qkv"},
    "attention.out": "attention.o_proj",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
"""names that HF_DINOV2 does not have: ViTModel's own, and those that transformers 5 gave; a block is read by both"""


def _hf_vit(model: Any, mean: Sequence[float], std: Sequence[float]) -> Tower:
    from transformers.activations import ACT2FN

    own, config = _Parameters(model), model.config
    if getattr(config, "use_swiglu_ffn", False):
        raise UserError("use_swiglu_ffn is true; the model's feed-forward network has a GELU between two layers")
    _check_gelu("hidden_act", ACT2FN[config.hidden_act], config.hidden_act)
    width, dino = config.hidden_size, config.model_type != "vit"
    vision = Vision(
        image_size=_square("image_size", config.image_size),
        patch_size=_square("patch_size", config.patch_size),
        width=width,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=int(width * config.mlp_ratio) if dino else config.intermediate_size,
        norm_eps=config.layer_norm_eps,
        embedding_norm=False,
        registers=getattr(config, "num_register_tokens", 0),
        layer_scale=1.0 if dino else None,
    )
    patches, positions = "embeddings.patch_embeddings.projection", own.take("embeddings.position_embeddings")[0]
    tensors = _patches(own.take(f"{patches}.weight"), own.take(f"{patches}.bias"), positions, mean, std)
    tensors["patches", 0, "class_embedding"] = own.take("embeddings.cls_token")[0, 0]
    if vision.registers:
        tensors["patches", 0, "registers"] = own.take("embeddings.register_tokens")[0]
    blocks = (
        "layers" if own.has("layers.0.norm1.weight") or own.has("layers.0.layernorm_before.weight") else "encoder.layer"
    )
    for i in range(vision.layers):
        for names in (HF_DINOV2, _HF_VIT):
            tensors |= _block(own, f"{blocks}.{i}", ("vision", i), names, width)
        for k in (1, 2) if dino else ():
            tensors["vision", i, f"scale{k}"] = own.take(f"{blocks}.{i}.layer_scale{k}.lambda1")
    tensors |= _norm(own, "layernorm", ("pool", 0, "norm"))
    return Tower(vision, tensors, sorted(own.left))


def _patches(
    weight: torch.Tensor, bias: torch.Tensor, positions: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> dict[Place, torch.Tensor]:
    """The projection, without a bias and for our pixels, and the positions [1+P, V] with what the bias was.

    Theirs see (p - mean) / std of a pixel p, ours (p - m) / s. So W' = W s / std, and W (m - mean) / std is a bias.
    """
    ours = [torch.tensor(c, dtype=torch.float64).view(1, 3, 1, 1) for c in (IMAGE_MEAN, IMAGE_STD)]
    theirs = [torch.tensor(c, dtype=torch.float64).view(1, 3, 1, 1) for c in (tuple(mean), tuple(std))]
    exact, moved = weight.double() / theirs[1], bias.double()
    moved = moved + (exact * (ours[0] - theirs[0])).sum((1, 2, 3))
    if not torch.equal(ours[1], theirs[1]):
        weight = (exact * ours[1]).float()
    if moved.any():
        positions = positions.clone()
        positions[1:] = (positions[1:].double() + moved).float()
    return {("patches", 0, "projection.weight"): weight.flatten(1), ("patches", 0, "positions"): positions}


# --- text --------------------------------------------------------------------------------------------------------


def _open_clip_text(text: Any, prefix: str) -> Tower:
    own, first = _Parameters(text, prefix), text.transformer.resblocks[0]
    _check_open_clip_block(first)
    if text.attn_mask is None:
        raise UserError("no_causal_mask is true; the model's text is read from left to right")
    if getattr(text, "cls_emb", None) is not None:
        raise UserError("embed_cls is true; the model reads a text at its end, not at a class token")
    if (pool := getattr(text, "pool_type", None) or text.text_pool_type) != "argmax":
        raise UserError(f"text pool_type is {pool}; the model reads a text at its end")
    vocabulary, width = text.token_embedding.weight.shape
    language = Language(
        context_length=len(text.positional_embedding),
        vocab_size=vocabulary + 3,
        width=width,
        layers=len(text.transformer.resblocks),
        heads=first.attn.num_heads,
        mlp_width=first.mlp.c_fc.out_features,
        layer_scale=None if isinstance(first.ls_1, nn.Identity) else 1.0,
    )
    _check_text_epsilon(text.ln_final)
    tensors = _embeddings(own.take("token_embedding.weight"), own.take("positional_embedding"))
    tensors |= _open_clip_blocks(own, "language", language)
    tensors |= _norm(own, "ln_final", ("head", 0, "norm"))
    projected = own.has("text_projection") and text.text_projection.shape == (width, width)
    if projected:
        tensors["head", 0, "projection.weight"] = own.take("text_projection").t().contiguous()
    unused = [name for name in own.left if not name.startswith("visual.")]
    return Tower(language, tensors, sorted(unused), projected)


def _hf_text(module: Any) -> Tower:
    own, config = _Parameters(module.text_model, "text_model."), module.text_model.config
    if config.model_type != "clip_text_model":
        raise UserError(f"its text tower is {config.model_type}, not CLIP's")
    _check_gelu("hidden_act", module.text_model.encoder.layers[0].mlp.activation_fn, config.hidden_act)
    language = Language(
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size + 3,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.intermediate_size,
    )
    _check_text_epsilon(module.text_model.final_layer_norm)
    names = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    tensors = _embeddings(*(own.take(name) for name in names))
    tensors |= _hf_blocks(own, "language", language)
    tensors |= _norm(own, "final_layer_norm", ("head", 0, "norm"))
    projection = module.text_projection.weight.detach().float()
    projected = projection.shape == (language.width, language.width)
    if projected:
        tensors["head", 0, "projection.weight"] = projection
    unused = [*own.left, *(() if projected else ("text_projection.weight",))]
    return Tower(language, tensors, sorted(unused), projected)


def _embeddings(tokens: torch.Tensor, positions: torch.Tensor) -> dict[Place, torch.Tensor]:
    """Those of CLIP's vocabulary with ours behind it: a placeholder and `<eoi>` as they are drawn, `<soi>`, at which we
    read a text, as `<end_of_text>`, at which CLIP does."""
    drawn = tokens.new_full((1, tokens.shape[1]), torch.nan)
    tokens = torch.cat([tokens, drawn, tokens[-1:], drawn])
    return {("pool", 0, "embedding.weight"): tokens, ("pool", 0, "positions"): positions}


# --- what they share ---------------------------------------------------------------------------------------------


def _open_clip_blocks(own: _Parameters, kind: str, encoder: Vision | Language) -> dict[Place, torch.Tensor]:
    tensors: dict[Place, torch.Tensor] = {}
    for i in range(encoder.layers):
        block = f"transformer.resblocks.{i}"
        names = {"norm1": "ln_1", "norm2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
        tensors |= _block(own, block, (kind, i), names | {"attention.out": "attn.out_proj"}, encoder.width)
        tensors |= _qkv(kind, i, own.take(f"{block}.attn.in_proj_weight"), own.take(f"{block}.attn.in_proj_bias"))
        for k in (1, 2) if encoder.layer_scale is not None else ():
            tensors[kind, i, f"scale{k}"] = own.take(f"{block}.ls_{k}.gamma")
    return tensors


def _hf_blocks(own: _Parameters, kind: str, encoder: Vision | Language) -> dict[Place, torch.Tensor]:
    tensors: dict[Place, torch.Tensor] = {}
    for i in range(encoder.layers):
        tensors |= _block(own, f"encoder.layers.{i}", (kind, i), HF_CLIP, encoder.width)
    return tensors


def _block(
    own: _Parameters, prefix: str, place: tuple[str, int], names: dict[str, str], width: int
) -> dict[Place, torch.Tensor]:
    """Weights and biases of a block's modules, by our names; a bias that is not there is zeros."""
    tensors: dict[Place, torch.Tensor] = {}
    for ours, theirs in names.items():
        if own.has(f"{prefix}.{theirs}.weight"):
            weight = own.take(f"{prefix}.{theirs}.weight")
            tensors[*place, f"{ours}.weight"] = weight
            tensors[*place, f"{ours}.bias"] = own.take_or_zeros(f"{prefix}.{theirs}.bias", len(weight))
    return tensors


def _qkv(kind: str, i: int, weight: torch.Tensor, bias: torch.Tensor) -> dict[Place, torch.Tensor]:
    parts = zip("qkv", weight.chunk(3), bias.chunk(3), strict=True)
    return {(kind, i, f"attention.{x}.{name}"): t for x, w, b in parts for name, t in (("weight", w), ("bias", b))}


def _norm(own: _Parameters, theirs: str, place: Place) -> dict[Place, torch.Tensor]:
    kind, i, ours = place
    return {(kind, i, f"{ours}.{name}"): own.take(f"{theirs}.{name}") for name in ("weight", "bias")}


def _check_gelu(field: str, activation: Any, name: str = "") -> None:
    """Of whatever library: it must be the exact GELU, whatever it is called."""
    x = torch.linspace(-6, 6, 97)
    if not torch.allclose(activation(x.clone()), F.gelu(x), atol=1e-6):
        raise UserError(f"{field} is {name or type(activation).__name__}; the model computes the exact GELU")


def _check_open_clip_block(block: Any) -> None:
    if type(block).__name__ != "ResidualAttentionBlock":
        raise UserError(f"block_type is {type(block).__name__}; the model's blocks are like ResidualAttentionBlock")
    _check_gelu("quick_gelu", block.mlp.gelu, "true" if type(block.mlp.gelu).__name__ == "QuickGELU" else "")


def _check_text_epsilon(norm: Any) -> None:
    if norm.eps != 1e-5:
        raise UserError(f"the epsilon of the text tower's norms is {norm.eps:g}; the language model's is 1e-05")


def _epsilon(tower: nn.Module) -> float:
    """Of all LayerNorms."""
    found = {module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)}
    if len(found) != 1:
        raise UserError(f"its LayerNorms have the epsilons {', '.join(map(str, sorted(found)))}; the model has one")
    return found.pop()


def _square(name: str, sides: Any) -> int:
    a, b = sides if isinstance(sides, tuple | list) else (sides, sides)
    if a != b:
        raise UserError(f"{name} is {a} x {b}; the model's images are square")
    return a
