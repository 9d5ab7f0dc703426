"""A run that goes on with an empty cache builds what it reads from then on; its start says what its packs hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fleet import lines, losses, train

from megatron_lcl.train.checkpoint import folder as checkpoint


def short_chunks(rank: int) -> None:
    from megatron_lcl.data.loading import pack_index as index

    index.MIN_CHUNK, index.CHUNK = 8, 10


@pytest.mark.slow
def test_a_run_goes_on_without_what_it_has_read(config_file: str, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    arguments = ["--config", config_file, "--data.workers", "2"]
    said = train(run, *arguments, "--data.cache", str(tmp_path / "one"), plant=short_chunks)
    assert "3 image slots a pack (given); in 64 packs " in said
    (start,) = [line for line in lines(run) if "contrast_share" in line]
    assert start["images_per_pack"] == 3
    assert 0 < start["contrast_share"] < 1
    shutil.copytree(run, again)
    for step in (8, 12):
        shutil.rmtree(checkpoint.step_folder(again, step))
    states = checkpoint.read_progress(checkpoint.step_folder(run, 12)).ledger["states"]
    before = checkpoint.read_progress(checkpoint.step_folder(again, 4)).ledger["states"]
    assert 0 < len(before) < len(states)
    assert states[: len(before)] == before
    assert before[-1]["pack"] <= 16 < states[len(before)]["pack"] < 48

    train(again, *arguments, "--data.cache", str(tmp_path / "two"), plant=short_chunks)
    assert losses(again) == losses(run)
    records: list[Any] = [json.loads(path.read_text()) for path in (tmp_path / "two").glob("packs-*/chunk.json")]
    assert min(record["inputs"]["state"]["pack"] for record in records) == before[-1]["pack"]
    assert checkpoint.read_progress(checkpoint.step_folder(again, 12)).ledger["states"] == states
    assert [line["step"] for line in lines(again) if "contrast_share" in line] == [0, 4]
