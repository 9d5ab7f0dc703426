"""Hugging Face export, through the real transformers."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_lcl import LCL
from megatron_lcl.config import Config, Language, Model, Vision
from megatron_lcl.convert import hf, hf_dinov2
from megatron_lcl.convert.card import Card, Measured
from megatron_lcl.convert.export import export, export_model, save_checkpoint
from megatron_lcl.data.loading.images import decode_eval
from megatron_lcl.model.layers import IMAGE_STD, normalize

GIANT = Model(Vision(224, 14, 1408, 2, 16, 6144), Language(128, 1000, 512, 1, 8, 2048), 8)
B32 = Model(Vision(224, 32, 768, 12, 12, 3072), Language(128, 1000, 512, 1, 8, 2048), 8)
B16 = Model(Vision(224, 16, 768, 2, 12, 3072), Language(128, 1000, 512, 1, 8, 2048), 8)


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture
def exported(model: LCL, tmp_path: Path) -> Path:
    export_model(model, "hf", tmp_path / "hf")
    return tmp_path / "hf"


def test_preprocessing(transformers: Any, exported: Path) -> None:
    blobs = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(blobs).resize((150, 100), Image.Resampling.BICUBIC)  # detail that tells filters apart
    processor = transformers.AutoImageProcessor.from_pretrained(exported)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    file = io.BytesIO()
    image.save(file, "PNG")
    ours = normalize(torch.from_numpy(decode_eval(file.getvalue(), 64).copy())[None])[0]
    assert theirs.shape == (3, 64, 64)
    assert (theirs - ours).abs().max() < 2.5 / 255 / min(IMAGE_STD)  # two resizers round differently


def test_constants(transformers: Any, exported: Path, model: LCL) -> None:
    """What the check images are too lively to show."""
    config = transformers.AutoConfig.from_pretrained(exported)
    assert isinstance(model.pool.norm, torch.nn.LayerNorm)
    assert config.layer_norm_eps == model.pool.norm.eps


def test_pipeline(
    transformers: Any, model: LCL, exported: Path, tmp_path: Path, photograph: Callable[[Path], Path]
) -> None:
    """It returns what the card warns of: the rows before the final norm, the class token first."""
    pipe = transformers.pipeline("image-feature-extraction", model=str(exported))
    image = photograph(tmp_path / "image.jpg")
    (features,) = pipe(str(image))
    assert np.shape(features) == (1 + 16, 64)
    with torch.no_grad():
        pixels = transformers.AutoImageProcessor.from_pretrained(exported)(Image.open(image), return_tensors="pt")
        ours = model.patch_features(pixels["pixel_values"])[0]
        rows = torch.tensor(features)[1:]
        torch.testing.assert_close(model.pool.norm(rows), ours, rtol=1e-4, atol=1e-4)
    assert (rows - ours).norm() > 0.1 * ours.norm()
    warning = (
        '`pipeline("image-feature-extraction")` returns `last_hidden_state` as it is (`pool=True`: `pooler_output`)'
    )
    assert warning in (exported / "README.md").read_text("utf-8")


def test_certificate_and_card(model: LCL, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_checkpoint(model, Config(model=model.config), checkpoint)
    export(checkpoint, "hf", tmp_path / "hf")
    certificate = json.loads((tmp_path / "hf" / "certificate.json").read_text())
    for name in ("patches", "latents"):
        assert 0 <= certificate[name]["relative_difference"] < 1e-5
    assert set(certificate["files"]) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "lcl/attention_pool.py",
        "lcl/attention_pool.safetensors",
        "README.md",
    }
    assert "tokens_per_pack" in (tmp_path / "hf" / "README.md").read_text()  # the run's config
    card = Card(
        name="A name",
        license="cc-by-4.0",
        datasets=("Some documents",),
        metrics=(Measured("retrieval", "documents", "recall@10", 0.25),),
    )
    export_model(model, "hf", tmp_path / "hf", card=card)
    text = (tmp_path / "hf" / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-4.0\n")
    assert "* Some documents" in text
    assert "| retrieval | documents | recall@10 | 0.25 |" in text


def test_bfloat16(transformers: Any, make_model: Callable[..., LCL], tmp_path: Path) -> None:
    model = make_model()
    facts = export_model(model, "hf", tmp_path / "hf", dtype="bfloat16")
    assert facts["latents"]["relative_difference"] < 1e-5 < facts["latents"]["relative_change_by_rounding"] < 0.05
    assert transformers.AutoModel.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_model().parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("config", [B32, B16, GIANT], ids=["B/32", "B/16, two blocks", "g/14, two blocks"])
def test_real_sizes(make_model: Callable[..., LCL], tmp_path: Path, config: Model) -> None:
    facts = export_model(make_model(config), "hf", tmp_path / "hf")
    assert facts["patches"]["relative_difference"] < 1e-5
    assert facts["latents"]["relative_difference"] < 1e-5


def test_existing_folders(model: LCL, exported: Path, tmp_path: Path) -> None:
    before = (exported / "model.safetensors").read_bytes()
    export_model(model, "hf", exported)  # an unchanged export is replaced
    assert (exported / "model.safetensors").read_bytes() == before
    (exported / "README.md").write_text("changed by its owner")
    with pytest.raises(ValueError, match="something else"):
        export_model(model, "hf", exported)
    assert (exported / "README.md").read_text() == "changed by its owner"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not a folder"):
        export_model(model, "hf", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export_model(model, "hf", tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "hf"]


def test_the_current_folder_is_refused_before_any_work(
    model: LCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced, it would look empty to the shell that stands in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf, "write", None)
    for output in (".", str(tmp_path)):
        with pytest.raises(ValueError, match="is the current folder"):
            export_model(model, "hf", output)
    assert os.listdir(tmp_path) == []


def test_bad_arguments(model: LCL, tmp_path: Path) -> None:
    for format, dtype, words in (("onnx", "float32", "onnx"), ("hf", "int8", "int8")):
        with pytest.raises(ValueError, match=words):
            export(tmp_path, format, tmp_path / "out", dtype=dtype)
    assert os.listdir(tmp_path) == []


def test_without_transformers(model: LCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r"megatron-lcl\[hf\]"):
        export_model(model, "hf", tmp_path / "hf")


def test_the_processor_differs_as_the_card_says(transformers: Any, exported: Path) -> None:
    """The crop by one pixel, where the resized longer side is longer than it by 3, 7, 11 … pixels; and gray of 16 bits
    is not scaled."""
    assert hf_dinov2.PREPARATION in (exported / "README.md").read_text("utf-8")
    processor = transformers.AutoImageProcessor.from_pretrained(exported)
    for longer in range(8):  # levels rise by 3 a pixel: the mean difference is that of the crops' places
        levels = np.broadcast_to(3 * np.arange(64 + longer, dtype=np.uint8)[None, :, None], (64, 64 + longer, 3))
        image = Image.fromarray(levels)
        theirs = processor(image, return_tensors="pt", do_normalize=False)["pixel_values"][0].numpy() * 255
        assert (decode_eval(image, 64) - theirs).mean() / 3 == pytest.approx(int(longer % 4 == 3), abs=0.01)
    gray = Image.fromarray(np.full((64, 64), 0x4000, np.uint16))
    theirs = processor(gray, return_tensors="pt", do_normalize=False)["pixel_values"][0].numpy() * 255
    assert (decode_eval(gray, 64) == 0x40).all()
    assert theirs.min() == pytest.approx(255)
