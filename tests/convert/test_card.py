"""The example of every model card, run as it stands."""

from __future__ import annotations

import json
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


def test_a_runs_card_tells_data_config_and_metrics(model: LCL, tmp_path: Path) -> None:
    from megatron_lcl.config import Config, Corpus, Data
    from megatron_lcl.convert.card import card_of
    from megatron_lcl.convert.export import save_checkpoint

    corpus, checkpoint = tmp_path / "manual", tmp_path / "run" / "checkpoints" / "step-00000010"
    for folder in (corpus, checkpoint):
        folder.mkdir(parents=True)
    manifest = {
        "format_version": 1,
        "source": {"format": "html", "package": "gimp-help-en", "licence": "GFDL"},
        "counts": {"documents": 1234, "images": 99},
        "shards": 0,
        "files": {},
        "tokenizer": {"file": "tokenizer.model"},
    }
    (corpus / "corpus.json").write_text(json.dumps(manifest))
    corpora = (Corpus(path=str(corpus)), Corpus(path=str(tmp_path / "elsewhere")))
    save_checkpoint(model, Config(model=model.config, data=Data(corpora=corpora)), checkpoint)
    (checkpoint / "manifest.json").write_text("{}")
    heldout = {"step": 10, "pairs": 7, "chance_at_10": 0.25, "corpus": "x", "median_rank": None}
    (tmp_path / "run" / "heldout.json").write_text(json.dumps(heldout))
    card = card_of(checkpoint)
    assert card.metrics == {"held out: pairs": 7, "held out: chance at 10": 0.25}
    assert "licence GFDL" in card.datasets[0]
    assert "documents 1,234" in card.datasets[0]
    assert "elsewhere" in card.datasets[1]
    (tmp_path / "run" / "heldout.json").write_text(json.dumps({**heldout, "step": 9}))  # of an earlier checkpoint
    assert card_of(checkpoint).metrics == {}


def test_command_line_fills_the_card(model: LCL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    import yaml

    from megatron_lcl.cli import main
    from megatron_lcl.config import Config
    from megatron_lcl.convert.export import save_checkpoint

    checkpoint, output = tmp_path / "checkpoint", tmp_path / "out"
    checkpoint.mkdir()
    save_checkpoint(model, Config(model=model.config), checkpoint)
    command = ["export", "--checkpoint", str(checkpoint), "--format", "timm", "--output", str(output)]
    assert main([*command, "--license", "Apache 2"]) == 2  # not an identifier: one line, nothing written
    assert main([*command, "--name", "two\nlines"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2
    assert "'Apache 2' is no SPDX identifier" in said
    assert not output.exists()

    given = ["--name", "LCL of manuals", "--license", "cc-by-4.0", "--data", "the GIMP manual", "--data", "a blog"]
    assert main([*command, *given]) == 0
    _, front, body = (output / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert json.loads((output / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-4.0"
    assert "# LCL of manuals\n" in body
    assert "## Data\n\n* the GIMP manual\n* a blog\n" in body
    assert "## Licence\n\ncc-by-4.0\n" in body
