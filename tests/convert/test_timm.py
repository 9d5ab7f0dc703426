"""timm export, through the real timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_lcl import LCL
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.convert.certificate import check_images
from megatron_lcl.convert.export import export_model
from megatron_lcl.convert.timm import _classifier, _tensors, architecture

timm = pytest.importorskip("timm")
TEXT = Language(128, 1000, 512, 1, 8, 2048)

NAMED = {
    "vit_xsmall_patch16_clip_224": Vision(224, 16, 256, 10, 4, 1024),
    "vit_medium_patch32_clip_224": Vision(224, 32, 512, 12, 8, 2048),
    "vit_medium_patch16_clip_224": Vision(224, 16, 512, 12, 8, 2048),
    "vit_betwixt_patch32_clip_224": Vision(224, 32, 640, 12, 10, 2560),
    "vit_base_patch32_clip_224": Vision(224, 32, 768, 12, 12, 3072),
    "vit_base_patch32_clip_256": Vision(256, 32, 768, 12, 12, 3072),
    "vit_base_patch32_clip_384": Vision(384, 32, 768, 12, 12, 3072),
    "vit_base_patch32_clip_448": Vision(448, 32, 768, 12, 12, 3072),
    "vit_base_patch16_clip_224": Vision(224, 16, 768, 12, 12, 3072),
    "vit_base_patch16_clip_384": Vision(384, 16, 768, 12, 12, 3072),
    "vit_large_patch14_clip_224": Vision(224, 14, 1024, 24, 16, 4096),
    "vit_large_patch14_clip_336": Vision(336, 14, 1024, 24, 16, 4096),
    "vit_huge_patch14_clip_224": Vision(224, 14, 1280, 32, 16, 5120),
    "vit_huge_patch14_clip_336": Vision(336, 14, 1280, 32, 16, 5120),
    "vit_huge_patch14_clip_378": Vision(378, 14, 1280, 32, 16, 5120),
    "vit_giant_patch14_clip_224": Vision(224, 14, 1408, 40, 16, 6144),
    "vit_gigantic_patch14_clip_224": Vision(224, 14, 1664, 48, 16, 8192),
    "vit_gigantic_patch14_clip_378": Vision(378, 14, 1664, 48, 16, 8192),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_clip_tower_of_timm_has_our_tensors(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    assert architecture(NAMED[name]) == (name, {})
    with torch.device("meta"):
        ours = _tensors(LCL(Model(NAMED[name], TEXT, 8), seed=None))
        theirs = timm.create_model(name)
    shapes = {n: t.shape if isinstance(t, torch.Tensor) else torch.cat(t).shape for n, t in ours.items()}
    assert {**shapes, **_classifier(name, NAMED[name].width)} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert theirs.blocks[0].attn.num_heads == NAMED[name].heads


def test_towers_that_timm_has_no_name_for() -> None:
    assert architecture(Vision(224, 14, 1408, 2, 16, 6144)) == ("vit_giant_patch14_clip_224", {"depth": 2})
    assert architecture(Vision(288, 16, 768, 12, 12, 3072)) == ("vit_base_patch16_clip_224", {"img_size": 288})
    assert architecture(Vision(96, 8, 768, 12, 12, 3072)) == (
        "vit_base_patch32_clip_224",
        {"patch_size": 8, "img_size": 96},
    )


def test_tiny_by_local_dir(model: LCL, tmp_path: Path) -> None:
    facts = export_model(model, "timm", tmp_path / "timm")
    assert facts["patches"]["relative_difference"] < 1e-5
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = check_images(64)
    with torch.no_grad():
        mean = model.pool.patch_features(model.vision_tokens(images)).mean(1)
        assert torch.allclose(loaded(images), mean, rtol=1e-4, atol=1e-5)
        probe = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=10).eval()
        assert probe(images).shape == (4, 10)
        assert torch.allclose(probe.forward_head(probe.forward_features(images), pre_logits=True), mean, atol=1e-5)
    assert isinstance(loaded.head, torch.nn.Identity)
    config = timm.data.resolve_model_data_config(loaded)
    assert (tuple(config["input_size"]), config["interpolation"], config["crop_pct"]) == ((3, 64, 64), "bicubic", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_base_patch32_clip_224", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_giant_patch14_clip_224", {"depth": 2}),
    ],
)
def test_real_sizes_by_checkpoint_path(
    make_model: Callable[..., LCL], tmp_path: Path, name: str, changes: dict[str, int]
) -> None:
    v = NAMED[name]
    vision = Vision(v.image_size, v.patch_size, v.width, changes.get("depth", v.layers), v.heads, v.mlp_width)
    model = make_model(Model(vision, TEXT, 8))
    export_model(model, "timm", tmp_path / "timm")
    file = tmp_path / "timm" / "model.safetensors"
    images = check_images(224)[:2]
    with torch.no_grad():
        ours = model.pool.patch_features(model.vision_tokens(images))
        peer = timm.create_model(name, checkpoint_path=str(file), **changes).eval()
        assert peer.head.weight.shape == (timm.create_model(name, depth=1).num_classes, v.width)
        assert float((peer.forward_features(images)[:, 1:] - ours).norm() / ours.norm()) < 1e-5
        assert not peer(images).any()  # a classifier of zeros
        if name != "vit_base_patch32_clip_224":
            return
        hub = timm.create_model(f"local-dir:{file.parent}", pretrained=True).eval()
        assert float((hub(images) - ours.mean(1)).norm() / ours.mean(1).norm()) < 1e-5
        overlay = {"file": str(file), "num_classes": 1}  # timm's way to another classifier, or none
        bare = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **changes).eval()
        assert float((bare.forward_features(images)[:, 1:] - ours).norm() / ours.norm()) < 1e-5
