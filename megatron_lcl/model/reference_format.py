"""The reference's checkpoint format (open_clip with LCL's additions), both ways.

Names and shapes are those of the published LCL checkpoints. Values are moved, never changed: a fused [q; k; v] is split
into its three parameters, the patch convolution [V, 3, p, p] is flattened to [V, 3·p·p], a 0-d log scale becomes [1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import layer_kinds
from megatron_lcl.model.special import SpecialTokens

_SPECIAL_NAMES = {
    "sot": "<start_of_text>",
    "eot": "<end_of_text>",
    "placeholder": "<img_placehold>",
    "soi": "<start_of_img>",
    "eoi": "<end_of_img>",
}


def model_config(config: Mapping[str, Any]) -> Model:
    """Sizes from a dict as in the reference's `model_configs/*.json`. UserError names what is missing or not LCL's."""
    vision, text, pool = (_section(config, name) for name in ("vision_cfg", "text_cfg", "pool_project_cfg"))
    if pool.get("pool_proj_type", "attn") != "attn":
        raise UserError(f"pool_project_cfg.pool_proj_type is {pool['pool_proj_type']!r}; only 'attn' is LCL's pool")
    _check_function(config, vision, text)
    norm = _section(vision, "norm_kwargs", "vision_cfg.") if vision.get("norm_kwargs") else {}
    width, head_width = _whole(vision, "vision_cfg.width"), _whole(vision, "vision_cfg.head_width", 64)
    if width % head_width:
        raise UserError(f"vision_cfg.head_width {head_width} does not divide vision_cfg.width {width}")
    try:
        v = Vision(
            image_size=_whole(vision, "vision_cfg.image_size"),
            patch_size=_whole(vision, "vision_cfg.patch_size"),
            width=width,
            layers=_whole(vision, "vision_cfg.layers"),
            heads=width // head_width,
            mlp_width=_mlp_width(vision, "vision_cfg"),
            norm_eps=norm.get("eps", 1e-5),
            embedding_norm=not vision.get("no_ln_pre", False),
            layer_scale=vision.get("ls_init_value"),
        )
        t = Language(
            context_length=_whole(text, "text_cfg.context_length"),
            vocab_size=_whole(text, "text_cfg.vocab_size"),
            width=_whole(text, "text_cfg.width"),
            layers=_whole(text, "text_cfg.layers"),
            heads=_whole(text, "text_cfg.heads"),
            mlp_width=_mlp_width(text, "text_cfg"),
            layer_scale=text.get("ls_init_value"),
        )
        heads, bias = _whole(pool, "pool_project_cfg.attn_num_heads"), config.get("init_logit_bias")
        model = Model(vision=v, language=t, pool_heads=heads, logit_bias=bias)
    except ValidationError as error:  # sizes that do not fit each other; the first of their faults
        fault = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"the model config's sizes do not fit: {fault}") from None
    embed_dim = _whole(config, "embed_dim")
    if embed_dim != t.width:
        raise UserError(f"embed_dim {embed_dim} and text_cfg.width {t.width} differ; LCL's are the same")
    special = SpecialTokens.of(t.vocab_size)
    if special.sot < 1:
        raise UserError(f"text_cfg.vocab_size {t.vocab_size} leaves no room for five special tokens and any other")
    given = _section(config, "special_token_ids") if "special_token_ids" in config else {}
    for field, name in _SPECIAL_NAMES.items():
        if given.get(name, getattr(special, field)) != getattr(special, field):
            raise UserError(
                f"special_token_ids puts {name} at {given[name]!r}; it must be {getattr(special, field)}: "
                "the special tokens are the vocabulary's last five ids"
            )
    return model


def open_clip_config(model: Model) -> dict[str, Any]:
    """What the reference's `model_configs/*.json` say; the inverse of `model_config`.

    The reference makes a file's LCL model where the file's name has "lcl" in it.
    """
    v, t = model.vision, model.language
    special = SpecialTokens.of(t.vocab_size)
    return {
        "embed_dim": t.width,
        "vision_cfg": {
            "image_size": v.image_size,
            "layers": v.layers,
            "width": v.width,
            "head_width": v.width // v.heads,
            "patch_size": v.patch_size,
            "mlp_ratio": mlp_ratio(v.mlp_width, v.width),
            **({} if v.norm_eps == 1e-5 else {"norm_kwargs": {"eps": v.norm_eps}}),
            **({} if v.embedding_norm else {"no_ln_pre": True}),
            **({} if v.layer_scale is None else {"ls_init_value": v.layer_scale}),
        },
        "text_cfg": {
            "context_length": t.context_length,
            "vocab_size": t.vocab_size,
            "width": t.width,
            "heads": t.heads,
            "layers": t.layers,
            "mlp_ratio": mlp_ratio(t.mlp_width, t.width),
            **({} if t.layer_scale is None else {"ls_init_value": t.layer_scale}),
            # CLIP's tokenizer has the first two of itself
            "tokenizer_kwargs": {"additional_special_tokens": list(_SPECIAL_NAMES.values())[2:]},
        },
        "pool_project_cfg": {
            "pool_proj_type": "attn",
            "input_dim": v.width,
            "output_dim": t.width,
            "attn_num_heads": model.pool_heads,
        },
        "special_token_ids": {name: getattr(special, field) for field, name in _SPECIAL_NAMES.items()},
        "custom_text": True,
        **({} if model.logit_bias is None else {"init_logit_bias": model.logit_bias}),
    }


_PUBLISHED = (
    {"patch": 32, "positions": 50, "layers": (12, 12), "widths": (768, 512), "context": 2048, "vocabulary": 49411},
    {"patch": 16, "positions": 197, "layers": (12, 12), "widths": (768, 768), "context": 280, "vocabulary": 49411},
)
"""what shapes tell of the published models, LCL_ViT-B-32_mmc4 and LCL_ViT-B-16_laion; pairs are of vision and text"""


def published_config(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Sizes of a published LCL ViT-B checkpoint, from its shapes.

    Shapes do not tell the numbers of heads; the published models (ViT-B/32 and B/16, CLIP's vocabulary) have heads of
    64 features throughout, the pool's included. UserError for shapes of any other model.
    """
    towers = ("visual.transformer.resblocks.", "text.transformer.resblocks.")
    try:
        positions, vision_width = state["visual.positional_embedding"].shape
        patch = state["visual.conv1.weight"].shape[-1]
        context, width = state["text.positional_embedding"].shape
        vocabulary = state["text.token_embedding.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"{path} is not an LCL checkpoint in open_clip's format: it lacks {error}") from None
    except (ValueError, IndexError):  # of other dimensions
        raise UserError(
            f"{path} is not an LCL checkpoint in open_clip's format: its tensors have other shapes"
        ) from None
    layers = tuple(_count_blocks(state, tower) for tower in towers)
    sizes = {"patch": patch, "positions": positions, "layers": layers, "widths": (vision_width, width)}
    sizes |= {"context": context, "vocabulary": vocabulary}
    if sizes not in _PUBLISHED:
        raise UserError(
            f"{path} has other sizes than the published ViT-B/32 and B/16: patches of {patch} pixels, {positions} "
            f"image positions, {layers[0]} and {layers[1]} layers of widths {vision_width} and {width}, a context of "
            f"{context}, {vocabulary} token ids; shapes do not tell the numbers of heads, so put its model config (one "
            f"of the reference's model_configs) beside it, as {path.with_suffix('.json').name}, or run `megatron-lcl "
            "import` with --model-config FILE.json"
        )
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": math.isqrt(positions - 1) * patch,
            "layers": layers[0],
            "width": vision_width,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": vocabulary,
            "width": width,
            "heads": width // 64,
            "layers": layers[1],
        },
        "pool_project_cfg": {"pool_proj_type": "attn", "attn_num_heads": width // 64},
    }


def _count_blocks(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio that gives `hidden` back by open_clip's and timm's int(width * ratio)."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def _check_function(config: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """UserError where the reference computes something else than the model, which no tensor's name or shape tells."""
    off: tuple[Any, ...] = (None, False)
    exact: tuple[Any, ...] = (None, {}, {"approximate": "none"})
    default: tuple[Any, ...] = (None, {}, {"eps": 1e-5})
    gelu = "the model computes the exact GELU"
    for name, value, ours, words in (
        ("quick_gelu", config.get("quick_gelu"), off, gelu),
        ("vision_cfg.act_kwargs", vision.get("act_kwargs"), exact, gelu),
        ("text_cfg.act_kwargs", text.get("act_kwargs"), exact, gelu),
        (
            "text_cfg.norm_kwargs",
            text.get("norm_kwargs"),
            default,
            "the language model's norms have an epsilon of 1e-05",
        ),
        ("text_cfg.no_causal_mask", text.get("no_causal_mask"), off, "the model's text is read from left to right"),
    ):
        if value not in ours:
            raise UserError(f"the model config's {name} is {value!r}; {words}")


def _section(config: Mapping[str, Any], name: str, outer: str = "") -> Mapping[str, Any]:
    if name not in config:
        raise UserError(f"the model config has no {name}; it must be one of the reference's model_configs")
    if not isinstance(config[name], Mapping):
        raise UserError(f"the model config's {outer}{name} is {config[name]!r}; it must be a mapping")
    return config[name]


def _whole(section: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size; `name` with its section in front."""
    key = name.rpartition(".")[2]
    if key not in section and default is None:
        raise UserError(f"the model config has no {name}; it must be one of the reference's model_configs")
    value = section.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"the model config's {name} is {value!r}; it must be a whole number from 1")
    return value


def _mlp_width(section: Mapping[str, Any], name: str) -> int:
    ratio, width = section.get("mlp_ratio", 4.0), _whole(section, f"{name}.width")
    if not isinstance(ratio, int | float) or not math.isfinite(ratio) or int(width * ratio) < 1:
        raise UserError(f"the model config's {name}.mlp_ratio is {ratio!r}; it must be a number above 0")
    return int(width * ratio)


def load_open_clip(
    layers: nn.Module, config: Model, state_dict: Mapping[str, torch.Tensor], assign: bool = False
) -> None:
    """Copy a state dict in the reference's format into the layers of a model of the same sizes (`LCL.layers`).

    `assign`: parameters become views of the given tensors where they can, for a model made on the meta device; else
    values are copied. Raises UserError naming tensors that are missing, unknown, or of the wrong shape.
    """
    expected = {name: tensor.shape for name, tensor in state_dict_open_clip(layers, config).items()}
    if faults := name_faults(expected, state_dict):
        raise UserError(f"the checkpoint {faults}; is it for another model config?")
    ours = dict(layers.named_parameters())
    with torch.no_grad():
        for name, value in under_our_names(layers, config, state_dict):
            if assign:
                owner, _, leaf = name.rpartition(".")
                setattr(layers.get_submodule(owner), leaf, torch.nn.Parameter(value.float().contiguous()))
            else:
                ours[name].copy_(value)


def under_our_names(
    layers: nn.Module, config: Model, state_dict: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state dict in the reference's format has of a model's parameters, by our names; views. Shapes must fit."""
    shapes = {name: parameter.shape for name, parameter in layers.named_parameters()}
    for theirs, names in _names(config).items():
        if theirs in state_dict:
            parts = state_dict[theirs].reshape(len(names), -1)
            for name, part in zip(names, parts, strict=True):
                shape = shapes[name]
                yield name, part.view(shape[::-1]).t() if theirs in _TRANSPOSED else part.view(shape)


def state_dict_open_clip(layers: nn.Module, config: Model) -> dict[str, torch.Tensor]:
    """The parameters of a model's layers under the reference's names and in its shapes (detached, the same values)."""
    tensors = {
        name: parts[0] if len(parts) == 1 else torch.cat(parts)
        for name, parts in parts_open_clip(layers, config).items()
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def parts_open_clip(layers: nn.Module, config: Model) -> dict[str, list[torch.Tensor]]:
    """`state_dict_open_clip` before concatenation: views of the model's parameters."""
    ours = {name: p.detach() for name, p in layers.named_parameters()}
    v, p = config.vision, config.vision.patch_size
    shapes = {
        "logit_scale": (),
        "logit_bias": (),
        "visual.conv1.weight": (v.width, 3, p, p),
        "pool_project.query_token": (1, 1, v.width),
    }
    result = {}
    for theirs, names in _names(config).items():
        tensors = [ours[name].t() if theirs in _TRANSPOSED else ours[name] for name in names]
        result[theirs] = [tensors[0].reshape(shapes[theirs])] if theirs in shapes else tensors
    assert sum(map(len, _names(config).values())) == len(ours), "a parameter of ours has no name in the format"
    return result


_TRANSPOSED = {"text.text_projection"}
"""stored [in, out] there, as a linear layer's [out, in] here"""


def _names(config: Model) -> dict[str, list[str]]:
    """Their name → our names, in the order in which ours are concatenated. UserError for what has no name there."""
    v, t = config.vision, config.language
    options = {"vision.registers": v.registers, "vision.qk_norm": v.qk_norm, "language.qk_norm": t.qk_norm}
    if homeless := [name for name, value in options.items() if value]:
        raise UserError(f"open_clip's format has no place for model.{homeless[0]} = {options[homeless[0]]}")
    index = {layer: index for index, layer in enumerate(layer_kinds(config))}
    patches, pool, head = (index[kind, 0] for kind in ("patches", "pool", "head"))
    names = {
        "logit_scale": [f"{head}.log_scale"],
        **({} if config.logit_bias is None else {"logit_bias": [f"{head}.logit_bias"]}),
        "visual.class_embedding": [f"{patches}.class_embedding"],
        "visual.positional_embedding": [f"{patches}.positions"],
        "visual.conv1.weight": [f"{patches}.projection.weight"],
        **(_pairs("visual.ln_pre", f"{patches}.norm") if v.embedding_norm else {}),
    }
    towers: list[tuple[str, str, Vision | Language]] = [("visual", "vision", v), ("text", "language", t)]
    for tower, encoder, sizes in towers:
        for i in range(sizes.layers):
            theirs, ours = f"{tower}.transformer.resblocks.{i}", index[encoder, i]
            names |= _pairs(f"{theirs}.ln_1", f"{ours}.norm1") | _pairs(f"{theirs}.ln_2", f"{ours}.norm2")
            names |= _pairs(f"{theirs}.attn.out_proj", f"{ours}.attention.out")
            names |= _pairs(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up") | _pairs(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down")
            if sizes.layer_scale is not None:
                names |= {f"{theirs}.ls_{k}.gamma": [f"{ours}.scale{k}"] for k in (1, 2)}
            for kind in ("weight", "bias"):
                names[f"{theirs}.attn.in_proj_{kind}"] = [f"{ours}.attention.{x}.{kind}" for x in "qkv"]
        if tower == "visual":
            names |= _pairs("visual.ln_post", f"{pool}.norm")
    names |= {
        "text.token_embedding.weight": [f"{pool}.embedding.weight"],
        "text.positional_embedding": [f"{pool}.positions"],
        "text.text_projection": [f"{head}.projection.weight"],
        **_pairs("text.ln_final", f"{head}.norm"),
        "pool_project.query_token": [f"{pool}.query"],
        "pool_project.pooler.cross_attn.proj.weight": [f"{pool}.out.weight"],
        **_pairs("lm_head.0", f"{head}.vocabulary_norm"),
        "lm_head.1.weight": [f"{head}.vocabulary"],
    }
    for x in "qkv":
        names |= _pairs(f"pool_project.pooler.norm1_{x}", f"{pool}.norm_{x}")
        names[f"pool_project.pooler.cross_attn.{x}.weight"] = [f"{pool}.{x}.weight"]
        names[f"pool_project.pooler.cross_attn.{x}_bias"] = [f"{pool}.{x}.bias"]
    return names


def _pairs(theirs: str, ours: str) -> dict[str, list[str]]:
    return {f"{theirs}.{kind}": [f"{ours}.{kind}"] for kind in ("weight", "bias")}


def name_faults(expected: Mapping[str, torch.Size], given: Mapping[str, torch.Tensor]) -> str:
    """What is wrong with a state dict's names and shapes, in words; empty if nothing is."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    wrong = [name for name in expected if name in given and given[name].shape != expected[name]]
    faults = [f"lacks {some(missing)}"] if missing else []
    faults += [f"has the unknown {some(unknown)}"] if unknown else []
    faults += [f"has {n} of shape {tuple(given[n].shape)}, not {tuple(expected[n])}" for n in wrong[:3]]
    strange = [n for n in expected if n in given and not _is_plain(given[n])]
    faults += [f"has {n} as {given[n].dtype} ({given[n].layout}), not dense floating point" for n in strange[:3]]
    return " and ".join(faults)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_floating_point()


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
