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
from megatron_lcl.errors import UserError

ALL = {"registers": 3, "layer_scale": 0.5, "qk_norm": True, "embedding_norm": False, "norm_eps": 1e-6, "drop_path": 0.3}
PLACES: dict[str, tuple[str, ...]] = {
    "timm": tuple(ALL),
    "open_clip": ("layer_scale", "embedding_norm", "norm_eps", "drop_path"),
    "hf": ("norm_eps", "drop_path"),  # CLIP's class
}
DINO = {name: ALL[name] for name in ("embedding_norm", "registers", "layer_scale", "norm_eps", "drop_path")}
WITH_PLACES = [(format, {name: ALL[name] for name in names}) for format, names in PLACES.items()]
WITH_PLACES += [("hf", DINO), ("hf", {"embedding_norm": False})]
WITHOUT = [(format, name, ALL[name], {}) for format in PLACES for name in ALL if name not in PLACES[format]]
WITHOUT.remove(("hf", "embedding_norm", False, {}))
WITHOUT += [("hf", "qk_norm", True, DINO), ("hf", "mlp_width", 100, DINO)]
"""format, option, value, and what else the model has"""


def with_options(model: LCL, make_model: Callable[..., LCL], options: dict[str, Any]) -> LCL:
    config = model.config
    return make_model(replace(config, vision=replace(config.vision, **options)))


@pytest.mark.parametrize(("format", "options"), WITH_PLACES)
def test_an_export_with_options(
    format: str, options: dict[str, Any], model: LCL, make_model: Callable[..., LCL], tmp_path: Path
) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    ours = with_options(model, make_model, options)
    facts = export_model(ours, format, tmp_path / "out")
    assert facts["patches"]["relative_difference"] < 1e-5
    assert facts["latents"]["relative_difference"] < 1e-5
    back, images = load_model(tmp_path / "out"), check_images(64)
    for a, b in zip(our_features(back, images), our_features(ours, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert replace(back.config.vision, layer_scale=None, drop_path=0.0) == replace(
        ours.config.vision, layer_scale=None, drop_path=0.0
    )


@pytest.mark.parametrize("registers", [0, 3])
def test_every_row_is_what_dinov2s_classes_compute(
    registers: int, model: LCL, make_model: Callable[..., LCL], tmp_path: Path
) -> None:
    """The class token and the registers too; all tensors of theirs are in the file, and no other."""
    transformers = pytest.importorskip("transformers")
    ours, images = with_options(model, make_model, DINO | {"registers": registers}), check_images(64)
    export_model(ours, "hf", tmp_path / "out")
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    theirs, told = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with torch.no_grad():
        rows = theirs.eval()(images).last_hidden_state
        expected = ours.pool.norm(ours.vision_tokens(images))
    assert load_model(tmp_path / "out").config.vision == replace(ours.config.vision, drop_path=0.0)
    assert rows.shape == (4, 1 + registers + 16, 64)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("format", "option", "value", "others"), WITHOUT)
def test_an_option_without_a_place_is_refused_by_its_name(
    format: str,
    option: str,
    value: Any,
    others: dict[str, Any],
    model: LCL,
    make_model: Callable[..., LCL],
    tmp_path: Path,
) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    with pytest.raises(ValueError, match=rf"no place for model\.vision\.{option} = {value}\b") as error:
        export_model(with_options(model, make_model, others | {option: value}), format, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert "; export to timm" in str(error.value)


def test_an_epsilon_that_timm_has_no_name_for(model: LCL, make_model: Callable[..., LCL], tmp_path: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"not model\.vision\.norm_eps = 0\.001; export to hf or open_clip$"):
        export_model(with_options(model, make_model, {"norm_eps": 1e-3}), "timm", tmp_path / "out")


@pytest.mark.parametrize("format", PLACES)
def test_options_that_no_format_has_a_place_for(
    format: str, model: LCL, make_model: Callable[..., LCL], tmp_path: Path
) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    neither = with_options(model, make_model, {"norm_eps": 1e-3, "qk_norm": True})
    with pytest.raises(UserError, match=r"; nor has another format$"):
        export_model(neither, format, tmp_path / "out")
