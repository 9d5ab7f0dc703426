"""What a model card says of the corpora that were read, and of the checkpoint and its numbers, in less usual places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.corpora import write_corpus

from megatron_lcl import LCL, open_corpus
from megatron_lcl.config import Config
from megatron_lcl.convert.card import card_of
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.data.corpus.corpus_manifest import filters_of
from megatron_lcl.data.loading.blend import CorpusRead, corpora_read

NOT_HERE = "(the corpus is not here, so its manifest is not quoted)"


def checkpoint_of(model: LCL, folder: Path, corpora: list[dict[str, Any]], from_pack: int = 0, **more: Any) -> Path:
    """A checkpoint whose ledger has one blend."""
    folder.mkdir(parents=True)
    save_checkpoint(model, Config(model=model.config), folder)
    entries = [{"from_pack": from_pack, "blend": corpora}]
    progress = {"step": 10, "packs": 20, "ledger": {"settings": {}, "entries": entries}, **more}
    (folder / "progress.json").write_text(json.dumps(progress))
    return folder


def test_a_corpus_that_was_moved_is_looked_for_wherever_it_was(model: LCL, tmp_path: Path) -> None:
    """And is called what it was called last."""
    write_corpus(tmp_path / "corpus", [[[1]]])
    here = open_corpus(tmp_path / "corpus").fingerprint
    (tmp_path / "loop").symlink_to("loop")  # an error of the system
    moved = {"path": "/gone/new", "weight": 1.0, "moved_from": ["/gone/first", str(tmp_path / "corpus")]}
    other = {"path": str(tmp_path / "loop"), "weight": 1.0, "moved_from": ["/gone/other"], "fingerprint": "e" * 32}
    card = card_of(checkpoint_of(model, tmp_path / "c", [{**moved, "fingerprint": here}, other], from_pack=1))
    first, second = card.datasets
    begins = "from pack 1 on at the earliest"
    assert first.startswith("corpus: format jsonl (documents 1, ")
    assert first.endswith(f"), {begins}, fingerprint {here}")
    assert second == f"loop {NOT_HERE}, {begins}, fingerprint {'e' * 32}"


def test_the_newest_place_of_a_corpus_is_the_first() -> None:
    entries: list[dict[str, Any]] = [
        {"from_pack": 0, "blend": [{"path": "/b", "fingerprint": "f", "weight": 1.0, "moved_from": ["/a"]}]},
        {"from_pack": 7, "skip": 2},
        {"from_pack": 9, "blend": [{"path": "/c", "fingerprint": "f", "weight": 1.0}]},
        {"from_pack": 12, "blend": [{"path": "/a", "fingerprint": "f", "weight": 1.0}]},
    ]
    assert corpora_read(entries) == [CorpusRead("f", ("/a", "/c", "/b"), 0, False)]
    assert corpora_read(entries[1:2]) == []


def test_nothing_is_fetched_for_a_card(model: LCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lcl.convert.card.open_corpus", lambda *_: pytest.fail("it is opened"))
    corpora = [{"path": "s3://bucket/corpus", "fingerprint": "e" * 32, "weight": 1.0}]
    card = card_of(checkpoint_of(model, tmp_path / "c", corpora))
    assert card.datasets == (f"corpus {NOT_HERE}, fingerprint {'e' * 32}",)


def test_the_step_is_known_by_the_folder_or_by_what_is_in_it(model: LCL, tmp_path: Path) -> None:
    code = {"megatron_lcl": "0.3.1", "source": "c0ffee"}
    copied = checkpoint_of(model, tmp_path / "copied", [], code=code)
    assert card_of(copied).origin == "step 10, written by megatron_lcl 0.3.1, source c0ffee"
    old = checkpoint_of(model, tmp_path / "run" / "checkpoints" / "step-00001234", [])
    (old / "progress.json").unlink()
    assert card_of(old).origin == "step 1,234"


def test_numbers_are_those_of_the_average_or_of_the_checkpoint(model: LCL, tmp_path: Path) -> None:
    """Never of another folder that holds the checkpoint."""
    step = checkpoint_of(model, tmp_path / "run" / "checkpoints" / "step-00000010", [])
    average = checkpoint_of(model, step / "averages" / "ema_0.9", [])
    lone = checkpoint_of(model, tmp_path / "run" / "copies" / "mine", [])
    for numbers, expected in (
        ({"step": 10}, [step]),
        ({"step": 10, "average": "ema_0.9"}, [average]),
        ({"step": 10, "average": "ema_0.99"}, []),
        ({"step": 9}, []),
        ({}, []),
    ):
        (tmp_path / "run" / "heldout.json").write_text(json.dumps({"median_rank": 3.0, **numbers}))
        assert [folder for folder in (step, average, lone) if card_of(folder).metrics] == expected


def test_thresholds_of_rules_are_told_where_they_are_numbers() -> None:
    thresholds = {"image.max_aspect": 2.5, "text.min_words": 6, "lists.flagged_words": "/home/me/words.txt"}
    parents = [{"recipe": {"thresholds": {"image.max_aspect": 3.5}}}, {"recipe": {"merged": ["1"]}}]
    manifest = {"recipe": {"thresholds": thresholds}, "parents": parents}
    assert filters_of(manifest) == [
        "image.max_aspect 2.5",
        "text.min_words 6",
        "lists.flagged_words",
        "image.max_aspect 3.5",
    ]
