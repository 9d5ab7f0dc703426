"""Encoders of every library, through real exports; features by several processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_lcl import LCL
from megatron_lcl.config import Config, Language, Model, Vision
from megatron_lcl.convert.export import export_model, save_checkpoint
from megatron_lcl.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from megatron_lcl.evaluate.encoders import EncoderSource, OurEncoder, load_encoder
from megatron_lcl.evaluate.features import image_features
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.evaluate.zero_shot import zero_shot


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    words = ["a photo of a", "red", "green", "blue", "square", "circle", "the quick brown fox jumps over the lazy dog"]
    return train_sentencepiece([f"{a} {b}." for a in words for b in words], 400)


@pytest.fixture(scope="module")
def model(tokenizer: SentencePieceTokenizer) -> LCL:
    config = Model(Vision(32, 8, 64, 2, 4, 128), Language(64, tokenizer.vocab_size, 48, 2, 4, 96), 4)
    model = LCL(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for c, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(6):
            pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., 2 - c] += 120
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(model: LCL, tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(model, Config(model=model.config), folder)
    tokenizer.save(folder / "words.model")
    return folder


@pytest.mark.parametrize("format", ["hf", "timm", "open_clip"])
def test_an_export_is_the_same_encoder(
    model: LCL, checkpoint: Path, colours: Path, tmp_path: Path, format: str
) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    export_model(model, format, tmp_path / "out")
    spec = f"{format}:{'' if format == 'hf' else 'local-dir:'}{tmp_path / 'out'}"
    theirs, ours = load_encoder(spec), load_encoder(checkpoint)
    blobs = open_images(colours).images
    a = theirs.encode(torch.stack([theirs.prepare(b.read()) for b in blobs]))
    b = ours.encode(torch.stack([ours.prepare(b.read()) for b in blobs]))
    assert torch.allclose(a.patches, b.patches, rtol=1e-4, atol=1e-4)
    assert torch.allclose(a.pooled, b.pooled if format == "hf" else b.patches.mean(1), rtol=1e-4, atol=1e-4)
    if format != "open_clip":  # whose text tower is a placeholder
        with pytest.raises(ValueError, match="no text encoder"):
            theirs.encode_texts(["red"])
    assert theirs.fingerprint == load_encoder(spec).fingerprint != ours.fingerprint


def test_our_texts_are_read_at_soi(model: LCL, checkpoint: Path, tokenizer: SentencePieceTokenizer) -> None:
    encoder = load_encoder(checkpoint, checkpoint / "words.model")
    texts = ["a red square", "circle", "the quick brown fox " * 40]
    features = encoder.encode_texts(texts)
    for text, feature in zip(texts, features, strict=True):
        ids = [tokenizer.sot, *tokenizer.encode(text)[:62], tokenizer.eot]
        assert torch.allclose(model.encode_text(torch.tensor([ids]))[0], feature, atol=1e-5)


def test_zero_shot_from_checkpoint_to_result(checkpoint: Path, colours: Path, tmp_path: Path) -> None:
    encoder = load_encoder(checkpoint, checkpoint / "words.model")
    data = open_images(colours)
    result = zero_shot(encoder, data, image_features(encoder, data.images, cache=tmp_path, progress=False))
    assert result.num_items == 18
    assert result.metrics["accuracy, top 5"].value == 1  # of three
    with pytest.raises(ValueError, match="--tokenizer"):
        load_encoder(checkpoint).encode_texts(["red"])


def test_the_tokenizer_must_fit(model: LCL) -> None:
    other = train_sentencepiece(["other words entirely, and a few more of them"] * 5, 390)
    assert other.vocab_size != model.config.language.vocab_size
    with pytest.raises(ValueError, match="tokenizer has"):
        OurEncoder("x", model, other)


@pytest.mark.slow
def test_several_processes_give_the_same_features(checkpoint: Path, colours: Path, tmp_path: Path) -> None:
    source = EncoderSource(str(checkpoint))
    images = open_images(colours).images
    one = image_features(source, images, cache=tmp_path / "1", batch_size=4, progress=False)
    two = image_features(source, images, cache=tmp_path / "2", batch_size=4, processes=2, progress=False)
    assert np.allclose(one, two, rtol=1e-4, atol=1e-5)
    assert [p.name for p in (tmp_path / "1").iterdir()] == [p.name for p in (tmp_path / "2").iterdir()]


def test_what_does_not_load(tmp_path: Path) -> None:
    for spec in ("timm:no_such_model", f"hf:{tmp_path}", "open_clip:no-such-model", str(tmp_path / "none")):
        with pytest.raises(ValueError) as error:
            load_encoder(spec)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_other_hugging_face_models(kind: str, tmp_path: Path, colours: Path) -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vision = sizes | {"intermediate_size": 64}
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
    }
    if kind == "clip":
        theirs = hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))
    elif kind == "siglip":
        theirs = hf.SiglipVisionModel(hf.SiglipVisionConfig(**vision))
    else:
        theirs = hf.Dinov2Model(hf.Dinov2Config(**sizes, mlp_ratio=2))
    theirs.eval().save_pretrained(tmp_path)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    images = torch.stack([encoder.prepare(b.read()) for b in open_images(colours).images[:3]])
    pooled, patches = encoder.encode(images)
    with torch.no_grad():
        if kind == "clip":
            out = theirs.vision_model(images)
            expected = theirs.vision_model.post_layernorm(out.last_hidden_state)[:, 1:]
            latent = theirs.visual_projection(out.pooler_output)
        else:
            out = theirs(images)
            expected, latent = out.last_hidden_state[:, -16:], out.pooler_output
    assert patches.shape == (3, 16, 32)
    assert torch.allclose(patches, expected, atol=1e-5)
    assert torch.allclose(pooled, latent, atol=1e-5)
