"""Position-embedding interpolation, against timm's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lcl import LCL
from megatron_lcl.convert.export import export_model
from megatron_lcl.convert.resolution import at_image_size


def test_against_timm(model: LCL) -> None:
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    for size in (32, 96, 112):
        grid = size // 16
        theirs = resample(model.patches.positions[None], [grid, grid], num_prefix_tokens=1)[0]
        ours = at_image_size(model, size)
        assert torch.allclose(ours.patches.positions, theirs, rtol=1e-5, atol=1e-7)
        assert ours.encode_image(torch.zeros(1, 3, size, size)).shape == (1, 48)
    assert at_image_size(model, 64) is model


def test_export_at_another_size(model: LCL, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    facts = export_model(model, "hf", tmp_path / "hf", image_size=96)
    assert facts["image_size"] == 96
    assert facts["latents"]["relative_difference"] < 1e-5
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").image_size == 96
    with pytest.raises(ValueError, match="patch_size"):
        export_model(model, "hf", tmp_path / "other", image_size=100)
