"""Position-embedding interpolation, against timm's."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_lcl import LCL
from megatron_lcl.convert.export import export_model
from megatron_lcl.convert.resolution import at_image_size
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.load import load_encoder


def test_against_timm(model: LCL) -> None:
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    for size in (32, 96, 112):
        grid = size // 16
        theirs = resample(model.patches.positions[None], [grid, grid], num_prefix_tokens=1)[0]
        ours = at_image_size(model, size)
        assert torch.allclose(ours.patches.positions, theirs, rtol=1e-5, atol=1e-7)
        assert ours.encode_image(torch.zeros(1, 3, size, size)).shape == (1, 48)
    assert at_image_size(model, 64) is model


@pytest.mark.parametrize("format", ["hf", "timm", "open_clip"])
def test_export_at_another_size(model: LCL, tmp_path: Path, format: str) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    facts = export_model(model, format, tmp_path / "out", image_size=96)
    assert facts["image_size"] == 96
    assert facts["latents"]["relative_difference"] < 1e-5
    spec = f"{format}:{'' if format == 'hf' else 'local-dir:'}{tmp_path / 'out'}"
    theirs, image = load_encoder(spec), torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    picture = io.BytesIO()
    Image.new("RGB", (200, 150)).save(picture, "PNG")
    assert theirs.prepare(picture.getvalue()).shape == image[0].shape
    ours = at_image_size(model, 96)
    patches = ours.patch_features(image)
    assert torch.allclose(theirs.encode(image).patches, patches, rtol=1e-4, atol=1e-4)
    for size, remedy in ((100, "96 or 112"), (17, "16 or 32"), (8, "16, say"), (0, "16, say"), (-64, "16, say")):
        with pytest.raises(UserError, match=f"{size} px .* = 16.; give {remedy}$"):
            export_model(model, format, tmp_path / "other", image_size=size)
    assert not (tmp_path / "other").exists()
