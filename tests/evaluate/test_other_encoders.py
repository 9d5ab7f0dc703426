"""Other libraries' models are run as they were trained, and all of them give the same kinds of features."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.load import load_encoder

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def open_clip_config(**others: Any) -> dict[str, Any]:
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **others}


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
@pytest.mark.parametrize("of_name", [False, True])
@pytest.mark.parametrize("of_weights", [False, True])
def test_open_clip_models_have_the_activation_that_their_weights_were_trained_with(
    of_name: bool, of_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a config that has QuickGELU OpenCLIP does not say of all weights that they want it (roberta-ViT-B-32)."""
    open_clip = pytest.importorskip("open_clip")
    config = open_clip_config(**({"quick_gelu": True} if of_name else {}))
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**{**config, "quick_gelu": of_name or of_weights}).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    weights: dict[str, Any] = {"file": str(tmp_path / "weights.safetensors")}
    weights |= {"quick_gelu": True} if of_weights else {}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-B-8", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-B-8", {"openai": weights})
    for name in ("Tiny-B-8", "Tiny-B/8"):
        encoder = load_encoder(f"open_clip:{name}@openai")
        with torch.no_grad():
            assert torch.equal(encoder.encode(IMAGES).pooled, theirs.encode_image(IMAGES))
            texts = torch.nn.functional.normalize(
                theirs.encode_text(open_clip.get_tokenizer("Tiny-B-8")(["a cat"])), dim=-1
            )
        assert torch.allclose(encoder.encode_texts(["a cat"]), texts, atol=1e-6)


def test_the_patch_tokens_of_coca_are_not_its_pools_queries(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = open_clip_config(multimodal_cfg={"width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2})
    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2}
    config["vision_cfg"]["output_tokens"] = config["text_cfg"]["output_tokens"] = config["text_cfg"]["embed_cls"] = True
    torch.manual_seed(0)
    theirs = open_clip.CoCa(**json.loads(json.dumps(config))).eval()
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    content = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    found = load_encoder(f"open_clip:local-dir:{tmp_path}").encode(IMAGES)
    with torch.no_grad():
        hidden = theirs.visual.transformer(theirs.visual._embeds(IMAGES))
        assert torch.allclose(found.pooled, theirs.encode_image(IMAGES), atol=1e-5)
        assert torch.allclose(found.patches, theirs.visual.attn_pool.ln_k(hidden)[:, 1:], atol=1e-5)
    assert found.patches.shape == (2, 16, 64)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_the_patch_tokens_of_timms_models_in_open_clip(name: str, tmp_path: Path) -> None:
    """SigLIP's are such. Of a ViT without the class token, of a convolutional network its map."""
    open_clip = pytest.importorskip("open_clip")
    config = open_clip_config(custom_text=True)
    config["vision_cfg"] = {"timm_model_name": name, "timm_pool": "avg", "image_size": 160}
    torch.manual_seed(0)
    theirs = open_clip.CustomTextCLIP(32, config["vision_cfg"], config["text_cfg"]).eval()
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    found = load_encoder(f"open_clip:local-dir:{tmp_path}").encode(images)
    with torch.no_grad():
        features = theirs.visual.trunk.forward_features(images)
        assert torch.equal(found.pooled, theirs.encode_image(images))
    expected = features[:, 1:] if name == "test_vit" else features.flatten(2).transpose(1, 2)
    assert found.patches.shape[1] == {"test_vit": 100, "test_convnext": 25}[name]
    assert torch.equal(found.patches, expected)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def saved(hf: Any, model: Any, folder: Path) -> str:
    """A transformers model with random weights, far from their initial values, and the name that loads it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return f"hf:{folder}"


def test_a_masked_autoencoder_sees_all_patches(tmp_path: Path) -> None:
    """And in their order: they are those of the same blocks in a plain ViT."""
    hf = pytest.importorskip("transformers")
    config = hf.ViTMAEConfig(**SIZES, intermediate_size=64, decoder_hidden_size=16, decoder_num_attention_heads=2)
    theirs = hf.ViTMAEForPreTraining(config)
    found = load_encoder(saved(hf, theirs, tmp_path)).encode(IMAGES)
    plain = hf.ViTModel(hf.ViTConfig(**SIZES, intermediate_size=64), add_pooling_layer=False).eval()
    plain.load_state_dict(theirs.vit.state_dict())
    with torch.no_grad():
        hidden = plain(IMAGES).last_hidden_state
    assert torch.allclose(found.pooled, hidden[:, 0], atol=1e-5)
    assert torch.allclose(found.patches, hidden[:, 1:], atol=1e-5)


@pytest.mark.parametrize("kind", ["IJepa", "Aimv2Vision", "SiglipVision", "Segformer"])
def test_without_class_token_and_pooler_the_patches_mean_is_the_feature(kind: str, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    own: dict[str, Any] = {"SiglipVision": {"vision_use_head": False}, "Aimv2Vision": {"use_head": False}}.get(kind, {})
    if kind == "Segformer":
        sizes = {
            "depths": [1] * 4,
            "hidden_sizes": [8, 16, 16, 32],
            "num_attention_heads": [1, 1, 2, 2],
            "strides": [2, 2, 2, 1],
        }
    else:
        sizes = {**SIZES, "intermediate_size": 64}
    theirs = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**sizes, **own))
    found = load_encoder(saved(hf, theirs, tmp_path)).encode(IMAGES)
    with torch.no_grad():
        hidden = theirs(IMAGES).last_hidden_state
    if kind == "Segformer":  # a map
        hidden = hidden.flatten(2).transpose(1, 2)
    assert found.patches.shape == hidden.shape == (2, 16, 32)
    assert torch.allclose(found.patches, hidden, atol=1e-5)
    assert torch.allclose(found.pooled, hidden.mean(1), atol=1e-5)


def test_patches_that_cannot_be_counted_are_refused(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 1, 2, 2]}
    encoder = load_encoder(
        saved(hf, hf.SegformerModel(hf.SegformerConfig(**sizes, reshape_last_stage=False)), tmp_path)
    )
    with pytest.raises(UserError, match="the config of segformer has no patch_size"):
        encoder.encode(IMAGES)


def test_a_network_that_merges_patches_has_its_own_pooler(tmp_path: Path) -> None:
    """And fewer hidden states than patches, all of which are patch tokens."""
    hf = pytest.importorskip("transformers")
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    theirs = hf.SwinModel(config)
    found = load_encoder(saved(hf, theirs, tmp_path)).encode(IMAGES)
    with torch.no_grad():
        out = theirs(IMAGES)
    assert found.patches.shape == (2, 16, 32)
    assert torch.allclose(found.patches, out.last_hidden_state, atol=1e-5)
    assert torch.allclose(found.pooled, out.pooler_output, atol=1e-5)


@pytest.mark.parametrize("kind", ["MetaClip2", "ChineseCLIPVision", "SiglipVision", "Blip"])
def test_patch_tokens_come_after_the_final_norm_once(kind: str, tmp_path: Path) -> None:
    """Which CLIP and its like apply to the class token alone, SigLIP to all tokens, BLIP to all and then once more to
    the class token."""
    hf = pytest.importorskip("transformers")
    vision = {**SIZES, "intermediate_size": 64}
    if kind.endswith("Vision"):
        config = getattr(hf, f"{kind}Config")(**vision)
    else:
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config = getattr(hf, f"{kind}Config")(vision_config=vision, text_config={**text, "vocab_size": 50})
    theirs = getattr(hf, f"{kind}Model")(config)
    found = load_encoder(saved(hf, theirs, tmp_path)).encode(IMAGES)
    tower = getattr(theirs, "vision_model", theirs)
    with torch.no_grad():
        out = tower(IMAGES, output_hidden_states=True)
        expected = tower.post_layernorm(out.hidden_states[-1])
        first = tower.post_layernorm(expected[:, 0]) if kind == "Blip" else expected[:, 0]
    assert torch.allclose(found.patches, expected[:, -16:], atol=1e-5)
    if kind != "SiglipVision":  # whose pooler attends to the patches
        assert torch.allclose(out.pooler_output, first, atol=1e-5)  # the norm is the one that the model applies


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("library", ["timm", "open_clip", "hf"])
def test_a_pickle_beside_a_config_runs_nothing(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the library asks torch for an unrestricted read, as timm 1.0.22 does."""
    module, plain, mark = (
        pytest.importorskip("transformers" if library == "hf" else library),
        torch.load,
        tmp_path / "ran",
    )
    if library == "timm":
        name, spec, weights = "test_vit", f"timm:local-dir:{tmp_path}", "pytorch_model.bin"
        theirs = module.create_model(name)
        config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": {"num_classes": 1000}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    elif library == "open_clip":
        spec, weights = f"open_clip:local-dir:{tmp_path}", "open_clip_pytorch_model.bin"
        theirs = module.CLIP(**open_clip_config())
        content = {"model_cfg": open_clip_config(), "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    else:
        theirs, weights = module.ViTModel(module.ViTConfig(**SIZES, intermediate_size=64)), "pytorch_model.bin"
        spec = saved(module, theirs, tmp_path)
        (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / weights)
    monkeypatch.setattr(torch, "load", lambda *args, **options: plain(*args, **{**options, "weights_only": False}))
    for never in (None, "1"):
        if never:
            monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", never)
        load_encoder(spec)
        torch.save({**theirs.state_dict(), "more": Evil(mark)}, tmp_path / weights)
        with pytest.raises(UserError, match=f"{spec} is refused: .* this pickle wants to build posix.mkdir") as error:
            load_encoder(spec)
        assert "weights_only" not in str(error.value)
        assert not mark.exists()
        assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == never
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
        torch.save(theirs.state_dict(), tmp_path / weights)
