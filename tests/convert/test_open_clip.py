"""OpenCLIP export, through the real open_clip, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lcl import LCL, load_model
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.convert.certificate import check_images
from megatron_lcl.convert.export import export_model, import_checkpoint

B32 = Model(Vision(224, 32, 768, 12, 12, 3072), Language(128, 1000, 768, 1, 12, 3072), 12)
B16 = Model(Vision(224, 16, 768, 2, 12, 3072), Language(128, 1000, 768, 1, 12, 3072), 12)
GIANT = Model(Vision(224, 14, 1408, 2, 16, 6144), Language(128, 1000, 512, 1, 8, 2048), 8)


@pytest.fixture(autouse=True, scope="module")
def open_clip() -> Any:
    """Imported here, and not by every process of the tests."""
    return pytest.importorskip("open_clip")


def test_there_and_back(model: LCL, tmp_path: Path) -> None:
    export_model(model, "open_clip", tmp_path / "out")
    import_checkpoint("open_clip", tmp_path / "out" / "lcl.safetensors", tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert back.config == model.config
    theirs = dict(back.layers.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.layers.named_parameters())


def test_create_model(open_clip: Any, model: LCL, tmp_path: Path) -> None:
    export_model(model, "open_clip", tmp_path / "out")
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    images = check_images(64)
    with torch.no_grad():
        mean = model.pool.patch_features(model.vision_tokens(images)).mean(1)
        assert torch.allclose(loaded.eval().encode_image(images), mean, rtol=1e-4, atol=1e-5)
    assert [type(step).__name__ for step in transform.transforms[:2]] == ["Resize", "CenterCrop"]


def test_bfloat16(model: LCL, tmp_path: Path) -> None:
    export_model(model, "open_clip", tmp_path / "out", dtype="bfloat16")
    back = load_model(tmp_path / "out" / "lcl.safetensors")
    assert all(p.dtype == torch.float32 for p in back.parameters())
    assert torch.equal(back.head.log_scale, model.head.log_scale)
    assert torch.equal(back.pool.query, model.pool.query.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize("config", [B32, B16, GIANT], ids=["B/32", "B/16, two blocks", "g/14, two blocks"])
def test_real_sizes(make_model: Callable[..., LCL], tmp_path: Path, config: Model) -> None:
    facts = export_model(make_model(config), "open_clip", tmp_path / "out")
    assert facts["patches"]["relative_difference"] < 1e-5
    assert facts["latents"]["relative_difference"] < 1e-5
