"""The example of every model card, run as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lcl import LCL
from megatron_lcl.convert.export import export_model

LIBRARY = {"hf": "transformers", "timm": "timm", "open_clip": "open_clip"}


@torch.no_grad()
def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("format", LIBRARY)
def test_example_computes_our_features(
    model: LCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photograph: Callable[[Path], Path], format: str
) -> None:
    pytest.importorskip(LIBRARY[format])
    export_model(model, format, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    photograph(Path("image.jpg"))
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    found: dict[str, Any] = {}
    exec(code, found)
    images = found["images"]
    assert images.shape == (1, 3, 64, 64)
    patches = model.pool.patch_features(model.vision_tokens(images))
    assert relative(found["patches"], patches) < 1e-5
    assert relative(found["z"], model.encode_image(images)) < 1e-5
    if "mean" in found:
        assert relative(found["mean"], patches.mean(1)) < 1e-5
