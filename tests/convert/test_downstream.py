"""Exports in programs that other people write: compiled, at other sizes, fine-tuned, inside of larger models."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lcl import LCL
from megatron_lcl.convert.certificate import check_images
from megatron_lcl.convert.export import export_model
from megatron_lcl.convert.load import load_model
from megatron_lcl.convert.pool import POOL, save_pool
from megatron_lcl.convert.resolution import at_image_size
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.run import evaluate
from megatron_lcl.evaluate.settings import KnnSettings, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text("utf-8")
DINO = {"embedding_norm": False}
REGISTERS = {"embedding_norm": False, "registers": 3}


@pytest.fixture
def export_with(
    model: LCL, make_model: Callable[..., LCL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., LCL]:
    """Exports a model with these options to DIR, in a folder that becomes the current one."""

    def export(format: str, options: dict[str, Any], dtype: str = "float32") -> LCL:
        pytest.importorskip({"hf": "transformers"}.get(format, format))
        exported = make_model(replace(model.config, vision=replace(model.config.vision, **options)))
        export_model(exported, format, tmp_path / "DIR", dtype=dtype)
        monkeypatch.chdir(tmp_path)
        return exported

    return export


def snippet(line: str) -> str:
    """The code on the page that has this line."""
    (found,) = [code for code in re.findall(r"(?:^(?: {4}.*)?\n)+", PAGE, re.M) if f"    {line}" in code]
    return textwrap.dedent(found)


@torch.no_grad()
def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def shipped(model: LCL, tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.Tensor], torch.Tensor]:
    """The pool, by the files beside an export."""
    folder = tmp_path_factory.mktemp("export")
    save_pool(model, folder, torch.float32)
    spec = importlib.util.spec_from_file_location("shipped_pool", (folder / POOL).with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors, heads = module.read_pool(folder / POOL)
    return lambda patches: module.attention_pool(patches, tensors, heads)


def test_the_pool_takes_any_batch_after_torch_export(shipped: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Pool(nn.Module):
        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            return shipped(patches)

    two, three = torch.randn(2, 16, 64), torch.randn(3, 16, 64)
    sizes = ({0: torch.export.Dim("batch", max=64)},)
    program = torch.export.export(Pool(), (two,), dynamic_shapes=sizes).module()
    for patches in (two, three):
        torch.testing.assert_close(program(patches), shipped(patches))


def test_the_pool_follows_the_patches(shipped: Callable[[torch.Tensor], torch.Tensor]) -> None:
    patches = torch.randn(2, 16, 64)
    z = shipped(patches.bfloat16())
    assert z.dtype == torch.bfloat16
    assert relative(z.float(), shipped(patches)) < 0.02
    assert shipped(patches.to("meta")).device.type == "meta"


@pytest.mark.parametrize("options", [{}, {"registers": 3, "qk_norm": True}])
def test_a_timm_export_in_transformers(options: dict[str, Any], export_with: Callable[..., LCL]) -> None:
    pytest.importorskip("transformers")
    ours, images = export_with("timm", options), check_images(64)
    found: dict[str, Any] = {}
    exec(snippet('model = AutoModel.from_pretrained("DIR", model_args=arguments)'), found)
    with torch.no_grad():
        out, patches = found["model"].eval()(images), ours.patch_features(images)
    assert relative(out.last_hidden_state[:, ours.config.vision.num_prefix :], patches) < 1e-5
    assert relative(out.pooler_output, patches.mean(1)) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("options", [{}, DINO])
def test_the_projector_of_llava_reads_the_trained_features(
    options: dict[str, Any], dtype: str, bound: float, export_with: Callable[..., LCL]
) -> None:
    transformers = pytest.importorskip("transformers")
    ours, images, read = export_with("hf", options, dtype), check_images(64), []
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    )
    found: dict[str, Any] = {"text_config": text}
    code = snippet('model.model.vision_tower = tower = AutoModel.from_pretrained("DIR").float()')
    clips, dinos = re.findall(r"norm = (.*?)  # .*: (tower\.layernorm)", code)[0]
    exec(code.replace(clips, dinos) if options else code, found)
    model = found["model"].eval()
    model.model.multi_modal_projector.linear_1.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        model.model.get_image_features(pixel_values=images)
    assert relative(read[0], ours.patch_features(images)) < bound
    model.save_pretrained("llava")
    _, told = transformers.LlavaForConditionalGeneration.from_pretrained("llava", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


@pytest.mark.parametrize(("options", "differs"), [({}, True), (DINO, True), (REGISTERS, False)])
def test_the_card_says_where_another_size_changes_the_features(
    options: dict[str, Any], differs: bool, export_with: Callable[..., LCL]
) -> None:
    transformers = pytest.importorskip("transformers")
    ours, images = at_image_size(export_with("hf", options), 128), check_images(128)
    model = transformers.AutoModel.from_pretrained("DIR").eval()
    tower = getattr(model, "vision_model", model)  # transformers 4 has one level more
    with torch.no_grad():
        hidden = model(images, **({} if options else {"interpolate_pos_encoding": True})).last_hidden_state
        rows = hidden if options else tower.post_layernorm(hidden)
    difference = relative(rows[:, ours.config.vision.num_prefix :], ours.patch_features(images))
    assert 1e-3 < difference < 0.1 if differs else difference < 1e-5
    assert ("antialiasing" in Path("DIR/README.md").read_text("utf-8")) == differs


@pytest.mark.parametrize("options", [DINO, REGISTERS])
def test_backbones_give_the_patches_as_maps(options: dict[str, Any], export_with: Callable[..., LCL]) -> None:
    transformers = pytest.importorskip("transformers")
    ours, images = export_with("hf", options), check_images(64)
    name = "Dinov2WithRegistersBackbone" if "registers" in options else "Dinov2Backbone"
    assert f"`{name}`" in PAGE
    with torch.no_grad():
        (maps,) = getattr(transformers, name).from_pretrained("DIR").eval()(images).feature_maps
    assert maps.shape == (4, 64, 4, 4)
    assert relative(maps.flatten(2).transpose(1, 2), ours.patch_features(images)) < 1e-5


@pytest.mark.parametrize("options", [{}, DINO])
def test_an_export_that_was_saved_again(
    options: dict[str, Any],
    export_with: Callable[..., LCL],
    photograph: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has lost its pool, which is said where that matters, until it is given back."""
    transformers = pytest.importorskip("transformers")
    export_with("hf", options)
    transformers.AutoModel.from_pretrained("DIR").save_pretrained("tuned")
    shutil.copy("DIR/preprocessor_config.json", "tuned")
    for name in ("data/train/a", "data/train/b", "data/test/a", "data/test/b"):
        Path(name).mkdir(parents=True)
        photograph(Path(name) / f"{name.replace('/', '-')}.png")
    with pytest.raises(UserError, match=r"take a Hugging Face model as hf:tuned$"):
        load_model("tuned")

    def said() -> str:
        evaluate(["hf:tuned"], ["knn"], "data", settings=Settings(knn=KnnSettings(k=1)), cache=Path("cache"))
        return capsys.readouterr().err

    capsys.readouterr()
    line = "hf:tuned has no lcl/attention_pool.safetensors: the class token's output is measured, which LCL does not"
    assert said().count(line) == 1
    config = Path("tuned/config.json")
    ours = config.read_text()
    config.write_text(ours.replace('"gelu"', '"quick_gelu"'))  # OpenAI's CLIP, which no export is
    assert "has no lcl" not in said()
    config.write_text(ours)
    Path("DIR/lcl").rename("tuned/lcl")
    assert "has no lcl" not in said()


def test_a_folder_of_no_library_is_not_taken_for_one(tmp_path: Path) -> None:
    for content in ("{}", "[]", "no JSON"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"no complete checkpoint.*manifest\.json$"):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=f"hf:{re.escape(str(tmp_path))}$"):
        load_model(tmp_path)
