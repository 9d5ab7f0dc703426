"""Model options in exports: where a library has a place for one, its certificate holds; else it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lcl import LCL
from megatron_lcl.convert.certificate import check_images, our_features
from megatron_lcl.convert.export import export_model
from megatron_lcl.convert.load import load_model

ALL = {"registers": 3, "layer_scale": 0.5, "qk_norm": True, "embedding_norm": False, "norm_eps": 1e-6, "drop_path": 0.3}
PLACES: dict[str, tuple[str, ...]] = {
    "timm": tuple(ALL),
    "open_clip": ("layer_scale", "embedding_norm", "norm_eps", "drop_path"),
    "hf": ("norm_eps", "drop_path"),
}


def with_options(model: LCL, make_model: Callable[..., LCL], options: dict[str, Any]) -> LCL:
    config = model.config
    return make_model(replace(config, vision=replace(config.vision, **options)))


@pytest.mark.parametrize("format", PLACES)
def test_an_export_with_options(format: str, model: LCL, make_model: Callable[..., LCL], tmp_path: Path) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    ours = with_options(model, make_model, {name: ALL[name] for name in PLACES[format]})
    facts = export_model(ours, format, tmp_path / "out")
    assert facts["patches"]["relative_difference"] < 1e-5
    assert facts["latents"]["relative_difference"] < 1e-5
    back, images = load_model(tmp_path / "out"), check_images(64)
    for a, b in zip(our_features(back, images), our_features(ours, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert replace(back.config.vision, layer_scale=None, drop_path=0.0) == replace(
        ours.config.vision, layer_scale=None, drop_path=0.0
    )


@pytest.mark.parametrize(("format", "option"), [(f, o) for f in PLACES for o in ALL if o not in PLACES[f]])
def test_an_option_without_a_place_is_refused_by_its_name(
    format: str, option: str, model: LCL, make_model: Callable[..., LCL], tmp_path: Path
) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    with pytest.raises(ValueError, match=rf"no place for model\.vision\.{option} = ") as error:
        export_model(with_options(model, make_model, {option: ALL[option]}), format, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_epsilon_that_timm_has_no_name_for(model: LCL, make_model: Callable[..., LCL], tmp_path: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"not model\.vision\.norm_eps = 0\.001"):
        export_model(with_options(model, make_model, {"norm_eps": 1e-3}), "timm", tmp_path / "out")
