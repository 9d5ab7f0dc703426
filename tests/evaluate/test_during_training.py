"""Held-out evaluation during a run, through the command line: numbers, files, report, card; what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from data.corpora import Piece, random_documents, write_corpus
from train.resilience import fleet

from megatron_lcl import load_model, open_corpus
from megatron_lcl.cli import main
from megatron_lcl.config import Data
from megatron_lcl.convert.card import card_of
from megatron_lcl.convert.find import find_checkpoint, read_config
from megatron_lcl.evaluate.heldout import evaluate_heldout
from megatron_lcl.report.page import write_report

CONFIG = """
model:
  vision: {{image_size: 16, patch_size: 8, width: 32, layers: 2, heads: 2, mlp_width: 64, drop_path: 0.5}}
  language: {{context_length: 48, vocab_size: 517, width: 32, layers: 2, heads: 2, mlp_width: 64, drop_path: 0.5}}
  pool_heads: 2
data: {{corpora: {folder}/corpus, cache: {folder}/cache, tokens_per_pack: 64, workers: 1}}
optimizer: {{lr: 1.0e-2, warmup: 1}}
train: {{steps: 3, global_batch: 4, micro_batch: 2, log_every: 1, progress: false, evaluate_every: 2}}
evaluate: {{corpus: {folder}/heldout}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("during")
    undecodable: list[list[Piece]] = [[[d], (b"\xff\xd8 was picture %d" % d, None, None)] for d in range(6)]
    write_corpus(folder / "corpus", [*random_documents(20, seed=1, mean_text=12.0), *undecodable])
    write_corpus(folder / "heldout", [*random_documents(15, seed=2, mean_text=12.0), *undecodable[:2]])
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("--zero.stage", "3", "--contrast.strategy", "recompute", "--data.tokens_per_pack", "128"),
        ("--parallel.pipeline", "2", "--data.images_per_pack", "1", "--data.image_first", "1"),
    ],
)
def test_a_run_measures_what_evaluate_measures_on_its_checkpoint(folder: Path, layout: tuple[str, ...]) -> None:
    run = folder / f"run-{layout[1]}"
    said = fleet.train(run, "--config", str(folder / "config.yaml"), *layout)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "heldout/bits_per_token" in line]
    assert [line["step"] for line in measured] == [2, 3]  # every second step, and at the end
    config = replace(read_config(find_checkpoint(run)), data=Data(cache=str(folder / "cache")))  # no longer its own
    result, examples = evaluate_heldout(load_model(run), config, folder / "heldout", progress=False)
    for name, value in result.numbers().items():
        assert measured[-1][f"heldout/{name}"] == pytest.approx(value, rel=1e-5), name
    assert [line["heldout/rules"] for line in measured] == [result.rules["version"]] * 2
    bad = [name for line in lines for name in line.get("bad_images", ())]
    assert f"an image is skipped, {bad[0]} (" in said
    assert said.count("2 held-out images do not decode, first ") == 2
    assert re.findall(r"^held out, after step (\d): .*bits_per_token [\d.]+", said, re.MULTILINE) == ["2", "3"]
    assert measured[0]["heldout/bits_per_token"] != measured[1]["heldout/bits_per_token"]
    assert next((run / "tensorboard").iterdir())

    recorded = json.loads((run / "heldout.json").read_text())
    assert (recorded["step"], recorded["corpus"]) == (3, str(folder / "heldout"))
    assert recorded["rules"] == result.rules
    assert recorded["fingerprint"] == result.fingerprint == open_corpus(folder / "heldout").fingerprint
    assert (recorded["pairs"], recorded["images"]) == (result.pairs, result.images)
    assert recorded["bad_images"] == list(result.bad_images)
    assert recorded["dtype"] == result.dtype == "float32"
    page = write_report(run).read_text(encoding="utf-8")  # nobody tells it the corpus
    assert "Rules of evaluation, version 3." in page
    assert "2 images did not decode and were skipped" in page
    assert page.count('alt="held-out image of document') == len(examples)
    old = {name: value for name, value in recorded.items() if name not in ("rules", "images", "bad_images")}
    (run / "heldout.json").write_text(json.dumps(old))  # as an earlier version wrote it
    assert "as an earlier version did" in write_report(run).read_text(encoding="utf-8")
    told = {m.metric: m.value for m in card_of(find_checkpoint(run)).metrics}
    assert told["bits per token"] == pytest.approx(result.bits_per_token)
    (folder / "heldout").rename(folder / "away")
    try:
        assert "(the corpus is not here)" in write_report(run).read_text(encoding="utf-8")
    finally:
        (folder / "away").rename(folder / "heldout")


@pytest.mark.slow
def test_what_cannot_be_carried_out_is_said_before_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (("--evaluate.corpus", "null"), "train.evaluate_every = 2 needs held-out documents: --evaluate.corpus DIR"),
        (("--evaluate.corpus", str(folder / "nowhere")), "nowhere"),
        (("--evaluate.tasks", "[generation]", "--objective.name", "clip"), "clip does not train what generation"),
    ):
        words = ["--config", str(folder / "config.yaml"), "--train.output", str(folder / "refused")]
        assert main(["train", *words, "--processes", "1", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-lcl")]
        assert said in line
        assert not (folder / "refused").exists()
