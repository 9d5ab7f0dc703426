"""OpenCLIP export, through the real open_clip, and the way back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_lcl import LCL, load_model
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.convert.certificate import check_images
from megatron_lcl.convert.export import export_model, import_checkpoint
from megatron_lcl.data.loading.images import square
from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD, normalize

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


def test_create_model(open_clip: Any, model: LCL, tmp_path: Path, photograph: Callable[[Path], Path]) -> None:
    """And its transform makes of a picture what ours does."""
    export_model(model, "open_clip", tmp_path / "out")
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    images = check_images(64)
    with torch.no_grad():
        mean = model.patch_features(images).mean(1)
        assert torch.allclose(loaded.eval().encode_image(images), mean, rtol=1e-4, atol=1e-5)
    with Image.open(photograph(tmp_path / "picture.png")) as picture:
        ours = normalize(torch.from_numpy(square(picture, 64).copy())[None])[0]
        assert torch.allclose(transform(picture), ours, atol=1e-5)


def test_images_are_normalized_as_open_clip_does(open_clip: Any) -> None:
    assert (IMAGE_MEAN, IMAGE_STD) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def test_the_card_of_a_sigmoid_loss(make_model: Callable[..., LCL], model: LCL, tmp_path: Path) -> None:
    """A paragraph of its own, behind the example to which the advice leads."""
    for name, ours in (("without", model), ("with", make_model(replace(model.config, logit_bias=-10.0)))):
        export_model(ours, "open_clip", tmp_path / name)
    without, within = ((tmp_path / name / "README.md").read_text("utf-8") for name in ("without", "with"))
    assert "which the attention pool makes of them:\n\nRun in this folder:\n\n```python\n" in within
    before, paragraph, behind = re.split(r"```\n\n(Trained by a sigmoid loss: the probability .*\.)\n\n", within)
    assert f"{before}```\n\n{behind}" == without
    assert "\n" not in paragraph


@pytest.mark.parametrize("bias", [None, -10.0])
def test_the_whole_models_config_is_what_the_reference_makes_a_model_of(
    open_clip: Any, make_model: Callable[..., LCL], tmp_path: Path, bias: float | None
) -> None:
    """By what its factory and its constructor want; the encoders and the tokenizer are those of open_clip."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower

    model = make_model(Model(Vision(64, 16, 64, 2, 4, 128), Language(64, 49411, 48, 1, 4, 96), 4, logit_bias=bias))
    export_model(model, "open_clip", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "lcl.json").read_text())
    assert config.pop("custom_text") is True  # else it makes a CLIP
    takes = {"embed_dim", "vision_cfg", "text_cfg", "pool_project_cfg", "special_token_ids", "init_logit_bias"}
    assert takes - config.keys() <= {"init_logit_bias"}
    assert config.keys() <= takes
    assert config["pool_project_cfg"].keys() == {"pool_proj_type", "input_dim", "output_dim", "attn_num_heads"}
    names = ("<start_of_text>", "<end_of_text>", "<img_placehold>", "<start_of_img>", "<end_of_img>")
    assert [config["special_token_ids"][name] for name in names] == list(model.special)
    tokenizer = open_clip.SimpleTokenizer(**config["text_cfg"]["tokenizer_kwargs"])
    assert {name: tokenizer.encoder[name] for name in names} == config["special_token_ids"]
    visual = _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]))
    visual.proj = None  # which the reference does, too
    text = _build_text_tower(config["embed_dim"], CLIPTextCfg(**config["text_cfg"]))
    torch.save(load_file(tmp_path / "out" / "lcl.safetensors"), tmp_path / "lcl.pt")  # as the documentation says
    state = torch.load(tmp_path / "lcl.pt")
    for part, tower in (("visual.", visual), ("text.", text)):
        own = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        tower.load_state_dict(own)


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
