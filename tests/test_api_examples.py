"""The examples of docs/api.md, run as they stand."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_lcl import LCL, load_model, open_corpus
from megatron_lcl.config import Config, Corpus, Data, Language, Model, Train, Vision, to_yaml
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.data.corpus import document
from megatron_lcl.data.loading.ledger import open_run_ledger
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

EXAMPLES = re.findall(
    r"^((?: {4}\S.*\n)(?:(?: {4}.*)?\n)*)", (Path(__file__).parents[1] / "docs/api.md").read_text("utf-8"), re.M
)


def run(word: str) -> dict[str, Any]:
    """The names that the example which has this word leaves."""
    (example,) = (example for example in EXAMPLES if word in example)
    found: dict[str, Any] = {"__name__": "example"}
    exec(textwrap.dedent(example), found)
    return found


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the examples run."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("sea", "boat", "cat")):
        levels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(levels).save(f"{name}.jpg")
    return tmp_path


def test_documents_of_python_become_a_corpus(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    albums = run("class Albums")
    assert "corpora/albums: 2 documents" in capsys.readouterr().out
    corpus = open_corpus(photos / "corpora/albums")
    assert corpus.manifest["source"] == {"format": "example.Albums"}
    texts = [[item.text for item in d.items if isinstance(item, document.Text)] for d in corpus]
    assert texts == [["a day at sea", "the end ."], ["my cat", "the end ."]]  # as CLIP's tokenizer keeps them
    assert [[image.data for image in d.images] for d in corpus] == [
        [(photos / f"{name}.jpg").read_bytes() for name in names] for names in (("sea", "boat"), ("cat",))
    ]
    importer, again = albums["Albums"](albums["albums"]), {"tokenizer": "clip"}
    assert preprocess(importer, None, "corpora/albums", **again).reused
    for wrong in ({"input": "photos"}, {"images": "photos"}, {"options": {"kind": "pairs"}}):
        with pytest.raises(UserError, match="an Importer has its own input, images and options; give None"):
            preprocess(importer, **{"input": None, "output": "other", **wrong})
    with pytest.raises(UserError, match="input = None, which is for an Importer; give the files of the format jsonl"):
        preprocess("jsonl", None, "other")


def test_a_document_goes_through_the_model(photos: Path) -> None:
    lines = photos / "documents.jsonl"
    texts = [f"A cat sleeps on the warm roof, {number}." for number in range(20)]
    lines.write_text("\n".join(json.dumps({"items": [{"text": text}]}) for text in texts))
    preprocess("jsonl", lines, photos / "corpus", vocab_size=400)
    corpus = open_corpus(photos / "corpus")
    config = Config(
        model=Model(Vision(16, 8, 32, 1, 2, 64), Language(64, corpus.tokenizer.vocab_size, 32, 1, 2, 64), 2),
        data=Data(corpora=(Corpus(str(photos / "corpus")),)),
    )
    (photos / "runs/mine").mkdir(parents=True)
    save_checkpoint(LCL(config.model), config, photos / "runs/mine")
    found = run("load_encoder")
    out, token_ids = found["out"], found["token_ids"]
    assert out.image_features.shape == out.text_features.shape == (1, 32)
    again = load_model(photos / "runs/mine")(found["images"], torch.nn.functional.pad(token_ids, (0, 3)))
    for a, b in zip(out[:4], again[:4], strict=True):
        torch.testing.assert_close(a, b)
    assert corpus.tokenizer.decode(found["before"]) == "A cat sleeps"


def test_a_step_of_a_run_is_read(photos: Path) -> None:
    run("class Albums")
    model = Model(Vision(16, 8, 32, 1, 2, 64), Language(64, 49411, 32, 1, 2, 64), 2)
    data = Data(corpora=(Corpus("corpora/albums"),), tokens_per_pack=64, cache="cache")
    config = Config(model=model, data=data, train=Train(global_batch=2))
    checkpoint = photos / "runs/mine/checkpoints/step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(to_yaml(config))
    (checkpoint / "progress.json").write_text(json.dumps({"ledger": open_run_ledger(config).to_json()}))
    found = run("read_step")
    assert [pack.packs for pack in found["packs"]] == [(14,), (15,)]
    assert sum(pack.num_images for pack in found["packs"]) > 0
    assert {Path(origin.corpus).name for sequences in found["sources"] for origin in sequences} == {"albums"}
