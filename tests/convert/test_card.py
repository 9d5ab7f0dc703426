"""The example of every model card, run as it stands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lcl import LCL
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.convert import hf
from megatron_lcl.convert.card import Card, Measured, write_card
from megatron_lcl.convert.export import export_model

ModelCard = pytest.importorskip("huggingface_hub").ModelCard
TINY = Model(Vision(64, 16, 64, 2, 4, 128), Language(64, 211, 48, 2, 4, 96), 4)
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
    monkeypatch.syspath_prepend(".")  # as a script or a notebook in this folder has it
    for name in ("lcl", "lcl.attention_pool"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    photograph(Path("image.jpg"))
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(code.splitlines()) <= 13
    assert Path(sys.modules["lcl.attention_pool"].__file__ or "").resolve().is_relative_to(tmp_path)
    images = found["images"]
    assert images.shape == (1, 3, 64, 64)
    patches = model.pool.patch_features(model.vision_tokens(images))
    assert relative(found["patches"], patches) < 1e-5
    assert relative(torch.nn.functional.normalize(found["z"], dim=-1), model.encode_image(images)) < 1e-5
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
    heldout = {"step": 10, "pairs": 7, "chance_at_10": 0.25, "corpus": str(corpus), "median_rank": None}
    (tmp_path / "run" / "heldout.json").write_text(json.dumps(heldout))
    card = card_of(checkpoint)
    task = "held-out documents"
    assert card.metrics == (Measured(task, "manual", "pairs", 7), Measured(task, "manual", "chance at 10", 0.25))
    assert "license GFDL" in card.datasets[0]
    assert "documents 1,234" in card.datasets[0]
    assert "elsewhere" in card.datasets[1]
    (tmp_path / "run" / "heldout.json").write_text(json.dumps({**heldout, "step": 9}))  # of an earlier checkpoint
    assert card_of(checkpoint).metrics == ()
    text = to_text(card, tmp_path)
    assert str(tmp_path) not in text  # the config's folders are nobody's business
    assert "path: manual" in text
    assert ModelCard(text).data.datasets == ["manual", "elsewhere"]


def to_text(card: Card, folder: Path) -> str:
    write_card(folder, hf.USAGE, TINY, card)
    return (folder / "README.md").read_text()


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    metrics = (
        Measured("k-NN", "digits/test", "accuracy", 0.5),
        Measured("k-NN", "digits/test", "mean per-class recall", 0.25),
        Measured("captioning", "coco.json (test)", "CIDEr", 1.5),
    )
    card = Card("A name", "apache-2.0", ("org/some-data: with words", "mmc4 (not here)", "words alone"), metrics)
    read = ModelCard(to_text(card, tmp_path)).data  # checks the model-index too
    assert (read.license, read.license_name, read.model_name) == ("apache-2.0", None, "A name")
    assert read.datasets == ["org/some-data", "mmc4"]
    assert read.metrics == ["accuracy", "cider", "recall"]
    found = [(r.task_type, r.task_name, r.dataset_name, r.metric_name, r.metric_value) for r in read.eval_results]
    assert found == [
        ("image-classification", "k-NN", "digits/test", "accuracy", 0.5),
        ("image-classification", "k-NN", "digits/test", "mean per-class recall", 0.25),
        ("image-to-text", "captioning", "coco.json (test)", "CIDEr", 1.5),
    ]
    assert "| k-NN | digits/test | accuracy | 0.5 |" in (tmp_path / "README.md").read_text()
    for license, expected in (("gpl-3.0", ("gpl-3.0", None)), ("gpl-3.0-only", ("other", "gpl-3.0-only"))):
        read = ModelCard(to_text(Card(license=license), tmp_path)).data
        assert (read.license, read.license_name) == expected
        assert read.eval_results is read.datasets is None


def test_results_of_an_evaluation_reach_the_card(
    model: LCL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    from megatron_lcl.cli import main
    from megatron_lcl.config import Config
    from megatron_lcl.convert.export import save_checkpoint
    from megatron_lcl.evaluate.encoders.load import load_encoder
    from megatron_lcl.evaluate.results import Metric, Result, write_json

    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    for folder, shift in ((checkpoint, 0), (other, 1)):
        folder.mkdir()
        with torch.no_grad():
            model.pool.query.add_(shift)
        save_checkpoint(model, Config(model=model.config), folder)
        with torch.no_grad():
            model.pool.query.sub_(shift)
    numbers = {"accuracy": Metric(0.75, 0.7, 0.8)}
    results = [
        Result("k-NN", str(folder), "/data/digits/test", 9, numbers, {}, load_encoder(folder).fingerprint)
        for folder in (checkpoint, other)
    ]
    write_json(results, tmp_path / "both.json")
    write_json(results[1:], tmp_path / "other.json")
    (tmp_path / "none.json").write_text('{"a": 1}')
    command = ["export", "--checkpoint", str(checkpoint), "--format", "timm", "--output", str(tmp_path / "out")]
    for name, words in (("other.json", "no results of these weights"), ("none.json", "not a results.json")):
        assert main([*command, "--results", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    assert main([*command, "--results", str(tmp_path / "both.json")]) == 0
    (found,) = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert (found.task_name, found.dataset_name, found.metric_value) == ("k-NN", "digits/test", 0.75)


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
