"""What a run goes on from, and what it refuses to go on with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fleet import losses, train
from small_corpus import make_corpus

from megatron_lcl.train.checkpoint import folder as checkpoint


@pytest.mark.slow
def test_from_a_named_checkpoint_into_a_new_folder(
    config_file: str, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    train(first, "--config", config_file)
    named = checkpoint.list_checkpoints(first)[0]
    assert checkpoint.step_of(named) == 4
    said = train(tmp_path / "second", "--config", config_file, "--resume", str(named))
    assert f"going on from {named}" in said
    assert losses(tmp_path / "second") == undisturbed[4:]
    said = train(tmp_path / "third", "--config", config_file, "--resume", str(tmp_path / "nothing"), code=2)
    assert "nothing" in said
    fields = {"language.layers": 1, "language.mlp_width": 32, "vision.layers": 1, "vision.mlp_width": 32}
    other = [word for name, value in fields.items() for word in (f"--model.{name}", str(2 * value))]
    said = train(tmp_path / "third", "--config", config_file, *other, "--resume", str(named), code=2)
    assert "(" + ", ".join(f"model.{name} {value} → {2 * value}" for name, value in fields.items()) + ")" in said


@pytest.mark.slow
def test_a_changed_corpus_is_refused_unless_allowed(config_file: str, tmp_path: Path) -> None:
    """The corpus that the run has read is rewritten at its place, and another one is added."""
    mine = tmp_path / "corpus"
    shutil.copytree(Path(config_file).parent / "documents" / "corpus", mine)
    run, words = tmp_path / "run", ["--config", config_file, "--data.corpora", str(mine)]
    train(run, *words, "--train.steps", "4")
    before = losses(run)
    added = make_corpus(tmp_path / "other", seed=1, tokenizer=mine)
    both = ["--config", config_file, "--data.corpora", f"[{{path: {mine}}}, {{path: {added}}}]"]
    said = train(run, *both, code=2)
    assert f"nothing is missing, {added} is new" in said
    assert "--data.allow-change" in said
    shutil.move(added, tmp_path / "added")
    shutil.move(mine, added)
    shutil.move(tmp_path / "added", mine)  # now they have changed places
    said = train(run, *words, code=2)
    assert f"{mine} is missing, {mine} is new or has changed" in said
    assert losses(run) == before
    weights = ["--data.corpora", f"[{{path: {added}, weight: 2}}]"]
    train(run, "--config", config_file, *weights, "--train.steps", "6")
    assert losses(run)[:4] == before
    train(run, *both, "--data.allow-change")
    assert losses(run)[:4] == before
    assert len(losses(run)) == 12
    ledger = checkpoint.read_progress(checkpoint.list_checkpoints(run)[-1]).ledger
    assert [len(entry["blend"]) for entry in ledger["entries"]] == [1, 1, 2]
