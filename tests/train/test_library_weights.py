"""`train.init_from` with models of timm, Hugging Face and OpenCLIP: tiny ones with weights of their own, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.convert.certificate import check_images, our_features
from megatron_lcl.convert.resolution import interpolate_positions
from megatron_lcl.evaluate.encoders.hf import HfEncoder
from megatron_lcl.evaluate.encoders.lcl import OurEncoder
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers
from megatron_lcl.model.lcl import LCL
from megatron_lcl.parallel.layers import shard
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.checkpoint.initial_weights import find_initial_weights, load_initial_weights

VOCABULARY = 60
"""of the text towers; ours has three tokens more"""


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that a misplaced one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def timm_folder(folder: Path, name: str = "vit_tiny_patch16_224", mean: float = 0.5, **arguments: Any) -> str:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    arguments = {**sizes, "num_classes": 3, **arguments}
    model = randomized(timm.create_model(name, **arguments))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    pixels = {
        "mean": [mean] * 3,
        "std": [0.4, 0.5, 0.6],
        "input_size": [3, 32, 32],
        "num_classes": 3,
        "classifier": "head",
    }
    config = {"architecture": name, "num_classes": 3, "model_args": arguments, "pretrained_cfg": pixels}
    (folder / "config.json").write_text(json.dumps(config))
    return f"timm:local-dir:{folder}"


def hf_folder(folder: Path, act: str = "gelu", eps: float = 1e-5) -> str:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"hidden_act": act}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "layer_norm_eps": eps}
    text = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 12, "eos_token_id": VOCABULARY - 1}
    model = hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=32))
    randomized(model).save_pretrained(folder)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return f"hf:{folder}"


def open_clip_folder(folder: Path, **vision: Any) -> str:
    open_clip = pytest.importorskip("open_clip")
    sizes = {"layers": 2, "width": 32, "mlp_ratio": 1.5}
    text = {**sizes, "context_length": 12, "vocab_size": VOCABULARY, "heads": 2}
    vision = {**sizes, "head_width": 16, "patch_size": 8, "image_size": 32, **vision}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    quick = vision.pop("quick_gelu", False)
    model = randomized(open_clip.CLIP(32, vision, text, quick_gelu=quick))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    both = {"model_cfg": {**config, "quick_gelu": quick}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(both))
    return f"open_clip:local-dir:{folder}"


def config_of(init_from: str, vision: dict[str, Any] | None = None, language: dict[str, Any] | None = None) -> Config:
    own = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48, **(vision or {})}
    text = {"context_length": 20, "vocab_size": VOCABULARY + 3, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48}
    model = {"vision": own, "language": {**text, **(language or {})}, "pool_heads": 2}
    return configs.from_dict({"model": model, "train": {"init_from": init_from, "seed": 3}})


def begun(config: Config) -> tuple[LCL, Any]:
    """The model that a run of one process begins with, and what was found."""
    weights = find_initial_weights(config)
    assert weights is not None
    model = LCL(config.model, seed=config.train.seed)
    load_initial_weights(weights, dict(enumerate(model.layers)), Axis())
    return model.eval(), weights


VIT = {"mlp_width": 128, "norm_eps": 1e-6, "embedding_norm": False}


@pytest.mark.parametrize(
    ("arguments", "vision"),
    [
        ({}, VIT),
        (
            {"reg_tokens": 3, "init_values": 0.1, "qk_norm": True, "no_embed_class": True},
            {**VIT, "registers": 3, "layer_scale": 0.5, "qk_norm": True},
        ),
        ({"reg_tokens": 2, "pre_norm": True, "qkv_bias": False}, {**VIT, "registers": 2, "embedding_norm": True}),
    ],
    ids=["ViT", "registers, LayerScale, QK-norm", "pre-norm"],
)
def test_a_vit_of_timm(arguments: dict[str, Any], vision: dict[str, Any], tmp_path: Path) -> None:
    """Another mean, a bias of the patches, another epsilon; run beside timm by the test itself, too."""
    spec = timm_folder(tmp_path, **arguments)
    model, weights = begun(config_of(spec, vision))
    said = weights.describe(config_of(spec, vision))
    assert weights.unused == ["head.bias", "head.weight"]
    assert "patch tokens as timm:local-dir:" in said
    assert not [name for name in weights.missing if name.startswith(("0.", "1.", "2."))]
    assert {"3.query", "3.embedding.weight", "6.log_scale"} <= {*weights.missing}
    import timm

    theirs: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
        expected = theirs.forward_features((images - 0.5) / std)[:, theirs.num_prefix_tokens :]
        from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD

        mean, own = (torch.tensor(c).view(3, 1, 1) for c in (IMAGE_MEAN, IMAGE_STD))
        found = our_features(model, (images - mean) / own).patches
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def hf_vit_folder(folder: Path, **processor: Any) -> str:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    randomized(hf.ViTModel(hf.ViTConfig(**sizes, intermediate_size=48, layer_norm_eps=1e-6))).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}, **processor).save_pretrained(folder)
    return f"hf:{folder}"


HF_VIT = {"norm_eps": 1e-6, "embedding_norm": False}


@pytest.mark.parametrize(
    "processor",
    [
        {"image_mean": [0.5, 0.4, 0.3]},
        {"do_normalize": False},
        {"do_normalize": False, "image_mean": None, "image_std": None},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    ],
)
def test_pixels_are_those_that_a_processor_makes(processor: dict[str, Any], tmp_path: Path) -> None:
    """Of the same picture both give the same patch tokens, each with the preparation of its own library."""
    spec = hf_vit_folder(tmp_path, **processor)
    model, weights = begun(config_of(spec, HF_VIT))
    assert "patch tokens as hf:" in weights.describe(config_of(spec, HF_VIT))
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    found, expected = (
        encoder.encode(encoder.prepare(PIL.Image.fromarray(levels))[None]).patches
        for encoder in (OurEncoder("ours", model), load_encoder(spec))
    )
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_another_preparation_of_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gives blue first, say: of the same numbers both sides would compute the same."""
    spec, prepare = hf_vit_folder(tmp_path), HfEncoder._prepare
    monkeypatch.setattr(HfEncoder, "_prepare", lambda self, image: prepare(self, image).flip(0))
    refused(
        config_of(spec, HF_VIT), "makes [-1, 0.003922, 1] of a pixel [255, 128, 0]", "deviation say [1, 0.003922, -1]"
    )


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_a_vit_of_hugging_face(kind: str, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    more = {"intermediate_size": 48} if kind == "ViT" else {"mlp_ratio": 2}
    model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**sizes, **more, layer_norm_eps=1e-6))
    randomized(model).save_pretrained(tmp_path)
    processor = {
        "size": {"shortest_edge": 32},
        "crop_size": 32,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.5],
    }
    hf.CLIPImageProcessor(**processor).save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "norm_eps": 1e-6,
        "embedding_norm": False,
        "registers": 4 * (kind == "Dinov2WithRegisters"),
    }
    options |= {"layer_scale": None, "mlp_width": 48} if kind == "ViT" else {"layer_scale": 1e-5, "mlp_width": 64}
    config = config_of(f"hf:{tmp_path}", options)
    _, weights = begun(config)
    assert "patch tokens as hf:" in weights.describe(config)
    assert not [name for name in weights.missing if name.startswith(("0.", "1.", "2."))]
    assert all("mask_token" in name or "pooler" in name for name in weights.unused)


@pytest.mark.parametrize("library", [hf_folder, open_clip_folder])
def test_both_towers_of_a_clip_model(library: Any, tmp_path: Path) -> None:
    spec = library(tmp_path)
    config = config_of(spec)
    model, weights = begun(config)
    said = weights.describe(config)
    assert "patch tokens as" in said
    assert "text features as" in said
    assert weights.partly == ("3.embedding.weight", "3.positions")
    assert any("proj" in name for name in weights.unused)
    assert {"3.query", "6.vocabulary", "6.log_scale"} <= {*weights.missing}
    drawn = LCL(config.model, seed=3)
    special = model.special
    for name, row in (("placeholder", special.placeholder), ("eoi", special.eoi)):
        assert torch.equal(model.pool.embedding.weight[row], drawn.pool.embedding.weight[row]), name
    assert torch.equal(model.pool.embedding.weight[special.soi], model.pool.embedding.weight[special.eot])
    assert torch.equal(model.pool.positions[12:], drawn.pool.positions[12:])
    assert not torch.equal(model.pool.positions[:12], drawn.pool.positions[:12])


def test_a_vision_encoder_of_timm_in_open_clip(tmp_path: Path) -> None:
    timm, open_clip = pytest.importorskip("timm"), pytest.importorskip("open_clip")
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    text = {"width": 32, "layers": 1, "context_length": 12, "vocab_size": VOCABULARY, "heads": 2}
    model = randomized(open_clip.CustomTextCLIP(32, vision, text))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    content = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "custom_text": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content | {"preprocess_cfg": {}}))
    spec = f"vision=open_clip:local-dir:{tmp_path}"
    trunk = timm.create_model("test_vit")
    sizes = {"image_size": 160, "patch_size": 16, "width": 64, "layers": len(trunk.blocks), "mlp_width": 192}
    config = config_of(spec, {**VIT, **sizes})
    assert "patch tokens as open_clip:" in begun(config)[1].describe(config)


def coca_folder(folder: Path) -> str:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 1.5}
    vision |= {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
    text = {"context_length": 12, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1}
    text |= {"output_tokens": True, "embed_cls": True}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    config["multimodal_cfg"] = {"width": 24, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    model = randomized(open_clip.CoCa(**json.loads(json.dumps(config))))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    content = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return f"open_clip:local-dir:{folder}"


def test_of_coca_the_vision_encoder(tmp_path: Path) -> None:
    """Up to the norm of the patches, which its pool has; its text is read at a class token."""
    spec = coca_folder(tmp_path)
    config = config_of(f"vision={spec}")
    _, weights = begun(config)
    assert "patch tokens as open_clip:" in weights.describe(config)
    assert {"visual.ln_post.weight", "visual.attn_pool.query"} <= {*weights.unused}
    assert not [name for name in weights.missing if name in ("3.norm.weight", "3.norm.bias")]
    refused(config_of(spec), "does not fit the language encoder: embed_cls is true")


def test_features_of_another_shape_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = timm_folder(tmp_path)
    monkeypatch.setattr("megatron_lcl.evaluate.encoders.timm.patch_tokens", lambda _, features: features)
    refused(
        config_of(spec, VIT), "the patch tokens of timm:", "are 4 x 17 x 32, and those of", "its weights 4 x 16 x 32"
    )


def test_one_of_two_libraries_each_at_another_size(tmp_path: Path) -> None:
    """Vision of timm at another image size, text of OpenCLIP with a shorter context; every tensor rank has its part."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    spec = f"vision={timm_folder(tmp_path / 'a')},language={open_clip_folder(tmp_path / 'b')}"
    config = config_of(spec, {**VIT, "image_size": 48}, {"context_length": 8})
    model, weights = begun(config)
    assert weights.image_size == 32
    assert "position embeddings interpolated from 32 to 48 px" in weights.describe(config)
    there, _ = begun(config_of(spec, VIT, {"context_length": 8}))
    assert torch.allclose(model.patches.positions, interpolate_positions(there.patches.positions.detach(), 36))
    assert not [name for name in weights.unused if name.startswith("visual.")]
    for rank in range(2):
        axis = Axis(None, rank, 2)
        layers = dict(enumerate(build_layers(config.model, 1.0, axis=axis)))
        initialize(layers, config.model, config.train.seed, axis)
        load_initial_weights(weights, layers, axis)
        for (name, parameter), whole in zip(
            nn.ModuleList(layers.values()).named_parameters(), model.layers.parameters(), strict=True
        ):
            if "log_scale" not in name:
                assert torch.equal(parameter, shard(whole.detach(), parameter, axis)), name


def refused(config: Config, *words: str) -> None:
    with pytest.raises(ValueError, match=r"train\.init_from") as error:
        find_initial_weights(config)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_another_architecture_is_named(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcdefg"]
    for folder in folders:
        folder.mkdir()
    spec = timm_folder(folders[0])
    refused(config_of(spec), "model.vision.norm_eps is 1e-06 there and 1e-05 here", "embedding_norm is False there")
    refused(config_of(spec, {**VIT, "heads": 4}), "model.vision.heads is 2 there and 4 here")
    refused(config_of(spec, {**VIT, "patch_size": 16}), "model.vision.patch_size is 8 there and 16 here")
    refused(config_of(timm_folder(folders[1], init_values=0.1), VIT), "model.vision.layer_scale is 1.0 there and None")
    refused(config_of(timm_folder(folders[2], act_layer="relu"), VIT), "act_layer is ReLU", "exact GELU")
    refused(config_of(hf_folder(folders[3], act="quick_gelu")), "hidden_act is quick_gelu", "exact GELU")
    refused(config_of(open_clip_folder(folders[4], quick_gelu=True)), "quick_gelu is true")
    text = open_clip_folder(folders[5])
    refused(config_of(text, None, {"vocab_size": 99}), "model.language.vocab_size is 63 there and 99 here")
    text = open_clip_folder(folders[6], norm_kwargs={"eps": 1e-6})
    refused(config_of(f"vision={text}"), "model.vision.norm_eps is 1e-06 there and 1e-05 here")
    refused(config_of(f"language={spec}", VIT), "has no language encoder")
    refused(config_of(f"vision={spec},text={spec}", VIT), "'text=timm", "language=MODEL")
    refused(config_of("vision=runs/b32"), "'vision=runs/b32' is not one of")


def test_a_difference_that_no_field_shows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = hf_folder(tmp_path)
    monkeypatch.setattr("megatron_lcl.convert.warm_start._check_gelu", lambda *_: None)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"gelu"', '"quick_gelu"'))
    refused(config_of(spec), "differ by", "the bound is 1e-05", "another architecture")


def test_a_tower_without_a_class_token_begins_with_a_drawn_one(tmp_path: Path) -> None:
    """Nothing is added to it: the first positions are those of the registers."""
    spec = timm_folder(tmp_path, class_token=False, global_pool="avg", fc_norm=False, reg_tokens=2)
    config = config_of(spec, {**VIT, "registers": 2})
    model, weights = begun(config)
    assert "0.class_embedding" in weights.missing
    assert "were not compared" in weights.describe(config)
    assert torch.isfinite(our_features(model, check_images(32)).patches).all()
    theirs = load_file(tmp_path / "model.safetensors")
    assert not model.patches.positions[0].any()
    assert torch.equal(model.patches.registers, (theirs["reg_token"] + theirs["pos_embed"][:, :2])[0])
