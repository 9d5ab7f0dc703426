"""load_model: our folders, run folders, the reference's files, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_lcl import LCL, load_model
from megatron_lcl.config import Config, Language, Model, Vision
from megatron_lcl.convert.export import export_model, import_checkpoint, save_checkpoint
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.model.reference_format import model_config, open_clip_config, published_config


@pytest.fixture
def ours(model: LCL, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_checkpoint(model, Config(model=model.config), folder)
    return folder


def same(a: LCL, b: LCL) -> bool:
    theirs = dict(b.layers.named_parameters())
    pairs = [(value, theirs.pop(name)) for name, value in a.layers.named_parameters()]
    return not theirs and a.config == b.config and all(torch.equal(x, y) and y.requires_grad for x, y in pairs)


def test_our_folder(model: LCL, ours: Path) -> None:
    loaded = load_model(ours)
    assert same(model, loaded)
    assert set(loaded.state_dict()) == set(model.state_dict())
    with torch.no_grad():  # weights mapped from the file may be changed without changing the file
        loaded.pool.query.add_(1)
    assert same(model, load_model(ours))


def test_run_folder_gives_the_newest_complete_checkpoint(make_model: Callable[..., LCL], tmp_path: Path) -> None:
    for step in (9, 10, 11):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        made = make_model(seed=step)
        save_checkpoint(made, Config(model=made.config), folder)
        if step < 11:  # 11 is incomplete
            (folder / "manifest.json").write_text("{}")
    assert same(make_model(seed=10), load_model(tmp_path))
    assert same(make_model(seed=11), load_model(tmp_path / "checkpoints" / "step-00000011"))


@pytest.mark.usefixtures("other_torch_defaults")
@pytest.mark.parametrize("format", ["hf", "timm", "open_clip"])
def test_torchs_defaults_change_nothing_of_an_export(model: LCL, tmp_path: Path, format: str) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    facts = export_model(model, format, tmp_path)
    assert facts["latents"]["relative_difference"] < 1e-5
    original, loaded = dict(model.named_parameters()), load_model(tmp_path)
    assert loaded.whole == (format == "open_clip")
    for name, parameter in loaded.named_parameters():
        assert (parameter.device.type, parameter.dtype) == ("cpu", torch.float32), name
        if "embedding.weight" not in name and not name.endswith(f"{1 + model.config.vision.layers}.positions"):
            assert torch.equal(parameter, original[name]), name
    encoder = load_encoder(f"{format}:{'' if format == 'hf' else 'local-dir:'}{tmp_path}")
    assert {(p.device.type, p.dtype) for p in encoder.module.parameters()} == {("cpu", torch.float32)}


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "module", "half", "safetensors", "legacy"])
def test_open_clip_files(model: LCL, tmp_path: Path, wrap: str) -> None:
    state: dict[str, Any] = model.state_dict_open_clip()
    config, file = open_clip_config(model.config), tmp_path / "epoch_32.pt"
    if wrap == "half":
        state = {name: value.bfloat16() for name, value in state.items()}
    if wrap == "safetensors":
        file = file.with_suffix(".safetensors")
        save_file(state, file)
    elif wrap in ("state_dict", "module"):
        prefix = "module." if wrap == "module" else ""
        wrapped = {f"{prefix}{name}": value for name, value in state.items()}
        torch.save({"epoch": 32, "name": "run", "state_dict": wrapped, "optimizer": {"state": {}}}, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=wrap != "legacy")
    loaded = load_model(file, config)
    if wrap == "half":
        assert all(p.dtype == torch.float32 for p in loaded.parameters())
        assert all(torch.equal(v.bfloat16(), state[n]) for n, v in loaded.state_dict_open_clip().items())
    else:
        assert same(model, loaded)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(file, tmp_path / "config.json").config == model.config


def test_reference_file(shared: Path, tmp_path: Path) -> None:
    file = shared / "reference" / "lcl_tiny.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    tensors = load_file(file)
    torch.save({f"module.{n[6:]}": v for n, v in tensors.items() if n.startswith("param/")}, tmp_path / "tiny.pt")
    import_checkpoint("open_clip", tmp_path / "tiny.pt", tmp_path / "out", config)
    import_checkpoint("open_clip", tmp_path / "tiny.pt", tmp_path / "out", config)  # twice is fine
    model = load_model(tmp_path / "out")
    pooled = model.pool.pool(model.vision_tokens(tensors["batch0/images"]))[0]
    assert torch.allclose(pooled, tensors["out/pooled"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "heads"), [("LCL_ViT-B-16_laion", 12), ("LCL_ViT-B-32_mmc4", 8)])
def test_published_checkpoints_need_no_config(shared: Path, tmp_path: Path, name: str, heads: int) -> None:
    shapes = json.loads((shared / "reference" / f"{name}.shapes.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = model_config(published_config(tmp_path / "x.pt", state))
    patch = 16 if "16" in name else 32
    context = shapes["text.positional_embedding"][0]
    text = Language(context, 49411, 64 * heads, 12, heads, 256 * heads)
    assert config == Model(Vision(224, patch, 768, 12, 12, 3072), text, pool_heads=heads)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"visual.conv1.weight": (768, 3, 14, 14)}, "patches of 14 pixels"),
        ({"visual.positional_embedding": (577, 768)}, "577 image positions"),
        ({"text.positional_embedding": (77, 768)}, "a context of 77"),
        ({"text.token_embedding.weight": (32000, 768)}, "32000 token ids"),
        ({"visual.positional_embedding": (197, 1024)}, "widths 1024 and 768"),
        ({"visual.transformer.resblocks.12.ln_1.weight": (768,)}, "13 and 12 layers"),
        ({"text.transformer.resblocks.12.ln_1.weight": (768,)}, "12 and 13 layers"),
    ],
)
def test_heads_are_not_guessed_for_other_sizes(
    shared: Path, tmp_path: Path, changed: dict[str, tuple[int, ...]], said: str
) -> None:
    shapes = json.loads((shared / "reference" / "LCL_ViT-B-16_laion.shapes.json").read_text()) | changed
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with pytest.raises(UserError, match=f"{said}.* beside it, as x.json, or .*import` with --model-config"):
        published_config(tmp_path / "x.pt", state)


TINY = Model(Vision(224, 14, 1408, 1, 16, 6144), Language(64, 211, 48, 2, 4, 209), 4)
"""its widths do not divide those of its feed-forward networks"""


def test_config_round_trip() -> None:
    assert model_config(open_clip_config(TINY)) == TINY


def test_a_config_that_says_what_the_model_computes_is_read() -> None:
    config = open_clip_config(TINY)
    config["quick_gelu"] = config["text_cfg"]["no_causal_mask"] = False
    config["text_cfg"]["norm_kwargs"], config["text_cfg"]["act_kwargs"] = {"eps": 1e-5}, None
    config["vision_cfg"]["norm_kwargs"], config["vision_cfg"]["act_kwargs"] = None, {"approximate": "none"}
    assert model_config(config) == TINY


ABSENT = "absent"


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refused(path: Path, *words: str, config: Any = None) -> None:
    with pytest.raises(ValueError) as error:
        load_model(path, config)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


class Arguments:
    """What training scripts put beside a state dict. (Other libraries allow torch to read `argparse.Namespace`.)"""


def test_hostile_pickles(model: LCL, tmp_path: Path) -> None:
    for zipped in (True, False):
        evil = {"state_dict": {}, "x": Evil(tmp_path / "ran")}
        torch.save(evil, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "a.pt", "refused", "mkdir")
        assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": model.state_dict_open_clip(), "args": Arguments()}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "Arguments", "safetensors")


def test_bad_files(model: LCL, ours: Path, tmp_path: Path) -> None:
    config = open_clip_config(model.config)
    refused(tmp_path / "nowhere", "no checkpoint")
    refused(tmp_path, "no complete checkpoint")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    refused(tmp_path / "text.pt", "text.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "empty.pt")
    (tmp_path / "cut.safetensors").write_bytes((ours / "model.safetensors").read_bytes()[:-100])
    refused(tmp_path / "cut.safetensors", "safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "list")
    torch.save({"a": 1}, tmp_path / "number.pt")
    refused(tmp_path / "number.pt", "'a'", "int")

    state = model.state_dict_open_clip()
    torch.save(state, tmp_path / "tiny.pt")
    refused(tmp_path / "tiny.pt", "put its model config", "beside it, as tiny.json", "`megatron-lcl import`")
    refused(tmp_path / "tiny.pt", "cannot be read", config=tmp_path / "none.json")
    state["visual.extra"] = state.pop("visual.ln_post.bias")
    torch.save(state, tmp_path / "names.pt")
    refused(tmp_path / "names.pt", "lacks visual.ln_post.bias", "unknown visual.extra", config=config)
    state["visual.ln_post.bias"] = state.pop("visual.extra")[:-1]
    torch.save(state, tmp_path / "shapes.pt")
    refused(tmp_path / "shapes.pt", "visual.ln_post.bias of shape (63,), not (64,)", config=config)
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "not an LCL checkpoint")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("vision_cfg", "x", "vision_cfg is 'x'"),
        ("vision_cfg", ABSENT, "has no vision_cfg"),
        ("vision_cfg.layers", [3, 4, 6, 3], "vision_cfg.layers is [3, 4, 6, 3]"),
        ("vision_cfg.image_size", [64, 64], "vision_cfg.image_size is [64, 64]"),
        ("vision_cfg.image_size", 65, "does not divide"),
        ("vision_cfg.patch_size", ABSENT, "has no vision_cfg.patch_size"),
        ("vision_cfg.head_width", 0, "vision_cfg.head_width is 0"),
        ("vision_cfg.head_width", 100, "100 does not divide vision_cfg.width 64"),
        ("vision_cfg.mlp_ratio", None, "vision_cfg.mlp_ratio is None"),
        ("vision_cfg.mlp_ratio", float("nan"), "vision_cfg.mlp_ratio is nan"),
        ("text_cfg.width", "a", "text_cfg.width is 'a'"),
        ("text_cfg.heads", 5, "does not divide"),
        ("text_cfg.vocab_size", 2, "vocab_size 2"),
        ("text_cfg.layers", True, "text_cfg.layers is True"),
        ("pool_project_cfg", None, "pool_project_cfg is None"),
        ("pool_project_cfg.attn_num_heads", -1, "attn_num_heads is -1"),
        ("embed_dim", 3, "embed_dim 3"),
        ("quick_gelu", True, "quick_gelu is True; the model computes the exact GELU"),
        (
            "vision_cfg.act_kwargs",
            {"approximate": "tanh"},
            "vision_cfg.act_kwargs is {'approximate': 'tanh'}; the model",
        ),
        ("text_cfg.act_kwargs", {"approximate": "tanh"}, "text_cfg.act_kwargs is {'approximate': 'tanh'}; the model"),
        (
            "text_cfg.norm_kwargs",
            {"eps": 1e-6},
            "text_cfg.norm_kwargs is {'eps': 1e-06}; the language model's norms",
        ),
        ("text_cfg.no_causal_mask", True, "text_cfg.no_causal_mask is True; the model's text"),
        ("vision_cfg.norm_kwargs", [1], "vision_cfg.norm_kwargs is [1]; it must be a mapping"),
        ("special_token_ids", [1], "special_token_ids is [1]"),
        ("special_token_ids", {"<start_of_img>": "x"}, "<start_of_img> at 'x'; it must be 209"),
    ],
)
def test_a_bad_model_config_is_one_line_and_nothing_is_written(
    model: LCL, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, value: Any, words: str
) -> None:
    from megatron_lcl.cli import main

    torch.save(model.state_dict_open_clip(), tmp_path / "m.pt")
    config = open_clip_config(model.config)
    *outer, last = place.split(".")
    inner = config[outer[0]] if outer else config
    inner[last] = value
    if value == ABSENT:
        del inner[last]
    (tmp_path / "m.json").write_text(json.dumps(config))
    before = sorted(os.listdir(tmp_path))
    command = ["import", "--format", "open_clip", "--input", str(tmp_path / "m.pt"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
    assert "http" not in said
    assert sorted(os.listdir(tmp_path)) == before


def test_tensors_that_are_no_weights(model: LCL, tmp_path: Path) -> None:
    config, state = open_clip_config(model.config), model.state_dict_open_clip()
    name = "visual.conv1.weight"
    for kind, tensor in {
        "torch.int32": state[name].to(torch.int32),
        "torch.sparse_coo": state[name].to_sparse(),
        "torch.complex64": state[name].to(torch.complex64),
    }.items():
        torch.save({**state, name: tensor}, tmp_path / "strange.pt")
        refused(tmp_path / "strange.pt", name, kind, "not dense floating point", config=config)
    torch.save({1: torch.ones(1)}, tmp_path / "number.pt")
    refused(tmp_path / "number.pt", "under 1", config=config)
    for shape in ((), (3,), (2, 2, 2)):
        wrong = {**state, "visual.positional_embedding": torch.ones(shape)}
        torch.save(wrong, tmp_path / "shape.pt")
        refused(tmp_path / "shape.pt", "its tensors have other shapes")
    torch.save({**state, name: torch.tensor(1.0)}, tmp_path / "scalar.pt")
    refused(tmp_path / "scalar.pt", "its tensors have other shapes")


def test_our_folder_with_the_wrong_tensors(model: LCL, ours: Path, tmp_path: Path) -> None:
    state = load_file(ours / "model.safetensors")
    state["9.extra"] = state.pop("0.positions")
    save_file(state, ours / "model.safetensors")
    refused(ours, "lacks 0.positions", "unknown 9.extra")
    state["0.positions"] = state.pop("9.extra")[:-1]
    save_file(state, ours / "model.safetensors")
    refused(ours, "0.positions of shape (16, 64), not (17, 64)")
    shutil.copy(ours / "config.yaml", tmp_path / "config.yaml")
    (ours / "config.yaml").write_text("model: [1, 2")
    refused(ours, "config.yaml is not YAML")
    for nothing in ("", "# nothing\n"):
        (ours / "config.yaml").write_text(nothing)
        refused(ours, "config.yaml is empty")
    (ours / "config.yaml").write_text("[]")
    refused(ours, "config.yaml holds a list")
