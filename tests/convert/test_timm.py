"""timm export, through the real timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_lcl import LCL
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.convert.certificate import check_images
from megatron_lcl.convert.export import export_model
from megatron_lcl.convert.timm import _classifier, _tensors, architecture

TEXT = Language(128, 1000, 512, 1, 8, 2048)


@pytest.fixture(scope="module")
def timm() -> Any:
    return pytest.importorskip("timm")


def vision_of(theirs: Any) -> Vision:
    """Sizes, as timm's own model of that name has them."""
    size, patch, block = theirs.patch_embed.img_size[0], theirs.patch_embed.patch_size[0], theirs.blocks[0]
    mlp_width = block.mlp.fc1.out_features
    return Vision(size, patch, theirs.embed_dim, len(theirs.blocks), block.attn.num_heads, mlp_width)


def test_every_clip_tower_of_timm_has_our_tensors(timm: Any) -> None:
    towers = [name for name in timm.list_models("vit_*_clip_*") if "quickgelu" not in name]  # LCL's is the exact GELU
    assert {"vit_base_patch32_clip_224", "vit_giant_patch14_clip_224"} < set(towers)
    for name in towers:
        with torch.device("meta"):
            theirs = timm.create_model(name)
            vision = vision_of(theirs)
            ours = _tensors(LCL(Model(vision, TEXT, 8), seed=None))
        assert architecture(vision) == (name, {})
        shapes = {n: t.shape if isinstance(t, torch.Tensor) else torch.cat(t).shape for n, t in ours.items()}
        expected = {n: t.shape for n, t in theirs.state_dict().items()}
        assert {**shapes, **_classifier(name, vision.width)} == expected, name


def test_towers_that_timm_has_no_name_for() -> None:
    assert architecture(Vision(224, 14, 1408, 2, 16, 6144)) == ("vit_giant_patch14_clip_224", {"depth": 2})
    assert architecture(Vision(224, 16, 896, 12, 14, 3584)) == ("vit_base_patch16_plus_clip_240", {"img_size": 224})
    assert architecture(Vision(288, 16, 768, 12, 12, 3072)) == ("vit_base_patch16_clip_224", {"img_size": 288})
    assert architecture(Vision(96, 8, 768, 12, 12, 3072)) == (
        "vit_base_patch32_clip_224",
        {"patch_size": 8, "img_size": 96},
    )


def test_tiny_by_local_dir(timm: Any, model: LCL, tmp_path: Path) -> None:
    facts = export_model(model, "timm", tmp_path / "timm")
    assert facts["patches"]["relative_difference"] < 1e-5
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = check_images(64)
    with torch.no_grad():
        mean = model.patch_features(images).mean(1)
        assert torch.allclose(loaded(images), mean, rtol=1e-4, atol=1e-5)
        probe = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=10).eval()
        assert probe(images).shape == (4, 10)
        assert torch.allclose(probe.forward_head(probe.forward_features(images), pre_logits=True), mean, atol=1e-5)
    assert isinstance(loaded.head, torch.nn.Identity)
    config = timm.data.resolve_model_data_config(loaded)
    assert (tuple(config["input_size"]), config["interpolation"], config["crop_pct"]) == ((3, 64, 64), "bicubic", 1.0)


def test_bfloat16(timm: Any, model: LCL, tmp_path: Path) -> None:
    facts = export_model(model, "timm", tmp_path / "timm", dtype="bfloat16")
    assert facts["patches"]["relative_difference"] < 1e-5 < facts["patches"]["relative_change_by_rounding"] < 0.05
    assert {tensor.dtype for tensor in load_file(tmp_path / "timm" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert torch.equal(loaded.norm.weight, model.pool.norm.weight.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_base_patch32_clip_224", {}),
        ("vit_base_patch16_clip_224", {"depth": 2}),
        ("vit_giant_patch14_clip_224", {"depth": 2}),
    ],
)
def test_real_sizes_by_checkpoint_path(
    timm: Any, make_model: Callable[..., LCL], tmp_path: Path, name: str, changes: dict[str, int]
) -> None:
    with torch.device("meta"):
        named = timm.create_model(name, **changes)
    vision = vision_of(named)
    model = make_model(Model(vision, TEXT, 8))
    export_model(model, "timm", tmp_path / "timm")
    file = tmp_path / "timm" / "model.safetensors"
    images = check_images(224)[:2]
    with torch.no_grad():
        ours = model.patch_features(images)
        peer = timm.create_model(name, checkpoint_path=str(file), **changes).eval()
        assert peer.head.weight.shape == (named.num_classes, vision.width)
        assert float((peer.forward_features(images)[:, 1:] - ours).norm() / ours.norm()) < 1e-5
        assert not peer(images).any()  # a classifier of zeros
        if name != "vit_base_patch32_clip_224":
            return
        hub = timm.create_model(f"local-dir:{file.parent}", pretrained=True).eval()
        assert float((hub(images) - ours.mean(1)).norm() / ours.mean(1).norm()) < 1e-5
        overlay = {"file": str(file), "num_classes": 1}  # timm's way to another classifier, or none
        bare = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **changes).eval()
        assert float((bare.forward_features(images)[:, 1:] - ours).norm() / ours.norm()) < 1e-5
