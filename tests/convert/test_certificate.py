"""A wrong export fails and leaves nothing, whichever part is wrong."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lcl import LCL, load_model
from megatron_lcl.convert import export, hf, open_clip, timm
from megatron_lcl.convert.certificate import compare
from megatron_lcl.convert.export import export_model

FORMATS = {"hf": (hf, "transformers"), "timm": (timm, "timm"), "open_clip": (open_clip, "open_clip")}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", ["a weight", "the pool"])
def test_a_wrong_export_fails_and_leaves_nothing(
    model: LCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, part: str
) -> None:
    module, library = FORMATS[format]
    pytest.importorskip(library)
    name = "save_parts" if part == "a weight" else "read_pool"
    right = getattr(module, name)

    def wrong_weight(tensors: Any, path: Path, *rest: Any) -> None:
        if path.name != "lcl.safetensors":  # one value of the last block's value bias
            tensors = dict(tensors)
            key = next(k for k in tensors if "layers.1.self_attn.v_proj.bias" in k or "1.attn.proj.bias" in k
                       or "1.attn.out_proj.bias" in k)  # fmt: skip
            changed = [t.detach().clone() for t in ([tensors[key]] if torch.is_tensor(tensors[key]) else tensors[key])]
            changed[0][0] += 1e-2
            tensors[key] = changed
        right(tensors, path, *rest)

    def wrong_pool(*arguments: Any) -> Any:
        weights, heads = right(*arguments)
        return {**weights, "v.bias": weights["v.bias"] + 1e-2}, heads

    monkeypatch.setattr(module, name, wrong_weight if part == "a weight" else wrong_pool)
    with pytest.raises(ValueError, match="patches differ from ours" if part == "a weight" else "latents differ from"):
        export_model(model, format, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_exported_with_its_own_weights(
    model: LCL, tmp_path: Path, format: str, dtype: torch.dtype
) -> None:
    pytest.importorskip(FORMATS[format][1])
    half = copy.deepcopy(model).to(dtype)
    export_model(half, format, tmp_path / "float32")
    loaded = load_model(tmp_path / "float32")
    for name, parameter in loaded.vision_blocks[1].named_parameters():
        assert torch.equal(parameter, half.vision_blocks[1].get_parameter(name).float())
    facts = export_model(half, format, tmp_path / "bfloat16", dtype="bfloat16")
    changed = facts["latents"]["relative_change_by_rounding"]
    assert (changed == 0) == (dtype == torch.bfloat16)
    assert changed < 0.05
    export_model(half, format, tmp_path / "larger", image_size=96)
    assert {p.dtype for p in half.vision_blocks[0].parameters()} == {dtype}


def test_not_a_number_is_over_the_bound(model: LCL) -> None:
    right = export.our_features(model, export.check_images(64))
    compare(right, right, right)
    with pytest.raises(ValueError, match="patches differ from ours by nan"):
        compare(right._replace(patches=right.patches * float("nan")), right, right)


def test_a_difference_downward_is_one_too(model: LCL) -> None:
    right = export.our_features(model, export.check_images(64))
    little = 5e-6 * float(right.latents.abs().mean())
    facts = compare(right._replace(latents=right.latents - little), right, right)
    assert facts["latents"]["largest_absolute_difference"] == pytest.approx(little, rel=0.2)
    assert facts["patches"]["largest_absolute_difference"] == 0
