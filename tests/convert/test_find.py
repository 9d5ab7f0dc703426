"""One rule for paths: a run is its newest complete checkpoint, a checkpoint itself; exports open as what they hold."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert.conftest import TINY

from megatron_lcl import LCL, load_model
from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.config import Config
from megatron_lcl.convert.export import export, export_model, import_checkpoint, save_checkpoint
from megatron_lcl.convert.find import checkpoints_in, find_checkpoint, read_config, run_of
from megatron_lcl.errors import UserError
from megatron_lcl.train.checkpoint.folder import resumable
from megatron_lcl.train.checkpoint.initial_weights import find_initial_weights

LIBRARY = {"hf": "transformers", "timm": "timm", "open_clip": "open_clip"}


@pytest.fixture
def run(model: LCL, tmp_path: Path) -> Path:
    """A run with two complete checkpoints and one that is not."""
    folder = tmp_path / "run"
    for step in (5, 10, 15):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        save_checkpoint(model, Config(model=model.config), checkpoint)
        if step < 15:
            (checkpoint / "manifest.json").write_text("{}")
    shutil.copy(checkpoint / "config.yaml", folder / "config.yaml")
    return folder


def test_what_a_path_means(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifth, tenth, fifteenth = checkpoints_in(run)
    for path in (run, run / "checkpoints", tenth):
        assert find_checkpoint(path) == tenth
        assert run_of(path).resolve() == run
    assert find_checkpoint(fifth) == fifth
    assert checkpoints_in(fifth) == [fifth]
    assert checkpoints_in(run / "checkpoints") == [fifth, tenth, fifteenth]
    monkeypatch.chdir(tenth)
    assert run_of(Path(".")).resolve() == run
    file = tmp_path / "lcl.pt"
    file.touch()
    assert find_checkpoint(file) == file
    with pytest.raises(UserError, match=f"{file} .* run `megatron-lcl import {file} --output DIR` first"):
        read_config(file)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{path}.* is not a run folder"):
            run_of(path)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """Names have eight digits, and from 100,000,000 on more."""
    names = ["step-00000005", "step-99999999", "step-100000000"]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [folder.name for folder in checkpoints_in(tmp_path)] == names


def test_an_argument_and_the_flag_of_before_say_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, words in enumerate((["run"], ["--input", "run"], ["run/checkpoints/step-00000010"])):
        monkeypatch.chdir(tmp_path)
        assert main(["import", *words, "--output", f"imported {number}"]) == 0
        assert capsys.readouterr().out == f"imported {number}: the weights of {words[-1]}\n"
        assert find_checkpoint(tmp_path / f"imported {number}") == tmp_path / f"imported {number}"
    for command, flag, rest in (
        ("report", "--run", []),
        ("replay", "--config", ["--step", "0"]),
        ("export", "--checkpoint", ["--format", "hf", "--output", "out"]),
        ("evaluate", "--model", ["--corpus", "nothing"]),
        ("evaluate", "--checkpoint", ["--corpus", "nothing"]),
        ("import", "--input", ["--output", "out"]),
    ):
        said = []
        for words in (["nowhere"], [flag, "nowhere"], []):
            assert main([command, *words, *rest]) == main([command, *rest, *words]) == 2
            once, again = capsys.readouterr().err.splitlines()
            assert once == again
            said.append(once)
        assert said[0] == said[1]
        assert "nowhere" in said[0]
        assert f"is missing; see `megatron-lcl {command} --help`" in said[2]
    assert main(["export", "run", "imported 0", "--format", "hf", "--output", "out"]) == 2
    assert "takes one MODEL, not also 'imported 0'" in capsys.readouterr().err


@pytest.mark.parametrize("format", LIBRARY)
@torch.no_grad()
def test_our_exports_open(model: LCL, run: Path, tmp_path: Path, format: str) -> None:
    pytest.importorskip(LIBRARY[format])
    export(run, format, tmp_path / "out")
    opened, images = load_model(tmp_path / "out"), torch.rand(2, 3, 64, 64)
    # weights that are mapped from a file lie at other places, by which products may round otherwise
    torch.testing.assert_close(opened.encode_image(images), model.encode_image(images), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"is an export to .*: weights alone"):
        resumable(str(tmp_path / "out"))
    tokens = torch.tensor([[1, 2, 3]])
    if format == "open_clip":
        torch.testing.assert_close(opened.encode_text(tokens), model.encode_text(tokens), rtol=0, atol=1e-6)
        import_checkpoint("open_clip", tmp_path / "out", tmp_path / "imported")
        return
    for reads_text in (
        lambda: opened.encode_text(tokens),
        lambda: opened(images, tokens),
        opened.state_dict_open_clip,
        lambda: import_checkpoint("open_clip", tmp_path / "out", tmp_path / "imported"),
    ):
        with pytest.raises(UserError, match="the vision encoder alone"):
            reads_text()
    export(tmp_path / "out", format, tmp_path / "again")
    same = ("model.safetensors", "lcl/attention_pool.safetensors")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in same)
    for name in (*same, "config.json"):
        whole = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} is not what `export` wrote"):
            load_model(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(whole)


@torch.no_grad()
def test_what_timm_has_a_name_for_opens_too(make_model: Callable[..., LCL], tmp_path: Path) -> None:
    """Its `config.json` says the sizes by the name alone."""
    pytest.importorskip("timm")
    vision = dataclasses.replace(TINY.vision, image_size=32, width=256, layers=10, heads=4, mlp_width=1024)
    model = make_model(dataclasses.replace(TINY, vision=vision))
    export_model(model, "timm", tmp_path / "out", dtype="bfloat16")
    opened = load_model(tmp_path / "out")
    assert opened.config.vision == vision
    images = torch.rand(1, 3, 32, 32)
    assert torch.nn.functional.cosine_similarity(opened.encode_image(images), model.encode_image(images)) > 0.99


def test_a_run_begins_with_an_export(model: LCL, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export_model(model, "hf", tmp_path / "hf")
    another = {"model__language__layers": 3, "model__language__heads": 2}  # than the export's run had
    config = configs.replace(Config(model=TINY), **another, train__init_from=str(tmp_path / "hf"))
    weights = find_initial_weights(config)
    assert weights is not None
    held = {name for name, _ in model.layers[:3].named_parameters()} | {
        f"3.{name}" for name, _ in model.pool.named_parameters() if not name.startswith(("embedding", "positions"))
    }
    assert set(weights.names) == held
    assert not weights.unused
    assert "3.embedding.weight" in weights.missing
    for width, heads in ((60, 4), (50, 5)):  # the pool's heads divide the one, not the other
        other = {"model__language__width": width, "model__language__heads": heads, "model__pool_heads": heads}
        with pytest.raises(UserError, match=f"does not fit .* model.language.width is 48 there and {width} here"):
            find_initial_weights(configs.replace(config, **other))
