"""`curate` divided into jobs: the bytes of one process, whoever does what."""

from __future__ import annotations

from pathlib import Path

import pytest
from curate.corpora_of_rules import files, picture, write

from megatron_lcl.cli import main
from megatron_lcl.curate.run import curate, curate_in_jobs
from megatron_lcl.curate.settings import read_settings
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.engines import Engine
from megatron_lcl.data.prepare.verify import verify

RULES = {"text.min_words": "2", "image.max_places": "3", "duplicates.documents.action": "keep-one"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = [
        Document((Text(f"number {k % 7} of them all, said {k % 7} times"), Text("one"), Image(picture(k % 5))))
        for k in range(24)
    ]
    return write(tmp_path, made, shard_documents=10)


@pytest.mark.slow
def test_jobs_write_the_bytes_of_one_process(source: Path, tmp_path: Path) -> None:
    settings = read_settings(overrides=RULES)
    one = curate(source, tmp_path / "one", settings, task_bytes=200)
    found = curate_in_jobs(source, tmp_path / "jobs", Engine("local", 3), settings, task_bytes=200)
    assert files(tmp_path / "one") == files(tmp_path / "jobs")
    assert (found.before, found.rules) == (one.before, one.rules)
    assert {r.rule for r in found.rules if r.texts + r.images + r.documents} >= {
        "text.min_words", "image.max_places", "document.duplicates",
    }  # fmt: skip
    assert verify(tmp_path / "jobs") == []


def test_a_job_alone_does_what_others_have_not_done(source: Path, tmp_path: Path) -> None:
    settings = read_settings(overrides=RULES)
    curate(source, tmp_path / "one", settings, task_bytes=200)
    for index in (2, 0):
        curate(source, tmp_path / "job", settings, job=(index, 3), task_bytes=200)
    assert files(tmp_path / "one") == files(tmp_path / "job")


def test_a_look_is_taken_here(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", str(source), "--dry-run", "--executor", "slurm"]) == 2
    assert capsys.readouterr().err == ("megatron-lcl curate: --dry-run looks here; give it without --executor slurm\n")
