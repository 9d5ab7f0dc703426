"""Protects `demo manual`: corpora of a folder of pages, which stay as they are when it is run again."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from quickstart.test_quickstart import write_pages

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.demo.write import write_sources


def test_pages_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pages(tmp_path / "pages")
    command = ["demo", "manual", "--html", str(tmp_path / "pages"), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    sources = json.loads((tmp_path / "out" / "sources.json").read_text())
    corpora = [open_corpus(tmp_path / "out" / "corpora" / name) for name in ("manual", "heldout")]
    assert sources["packages"] == []
    assert [sources["counts"]["documents"], sources["held out"]["documents"]] == [len(corpus) for corpus in corpora]
    assert sum(map(len, corpora)) == 24
    assert sum(len(document.images) for corpus in corpora for document in corpus) == 48
    for name, corpus in zip(("manual", "heldout"), corpora, strict=True):
        files = sorted((tmp_path / "out" / "documents" / name).glob("*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        assert sum("image" in item for line in lines for item in line["items"]) == sum(len(d.images) for d in corpus)
        assert len(lines) == len(corpus)
    assert f"{tmp_path / 'pages'}: not known" in (tmp_path / "out" / "LICENSES").read_text()
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert main(command) == 0
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
    capsys.readouterr()
    assert main([*command, "--from", str(tmp_path)]) == 2
    assert "--html" in capsys.readouterr().err


def test_what_else_lies_in_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops nothing, and is not waited for."""
    output, synced = tmp_path / "out", set()
    for name in (".venv", "documents"):
        (output / name).mkdir(parents=True)
        os.mknod(output / name / "socket", stat.S_IFSOCK)  # which cannot be opened
        (output / name / "file").touch()
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(Path(os.readlink(f"/proc/self/fd/{file}"))))
    write_sources(output, {})
    assert (output / "sources.json").exists()
    assert (output / "documents" / "file") in synced
    assert (output / ".venv" / "file") not in synced
