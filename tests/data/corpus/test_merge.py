"""Protects `merge`: all documents of all corpora, and nothing lost by an interruption or a second merge."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from data import writers
from data.corpus.conftest import DOCUMENTS
from data.helpers import TOKENIZER, plain
from forks import fork_context

from megatron_lcl.data.corpus import owners
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.prepare import merge as merge_module
from megatron_lcl.data.prepare.merge import link_file, merge
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError


@pytest.mark.parametrize("move", [False, True])
def test_merge(corpus: Path, tmp_path: Path, move: bool) -> None:
    writers.write_jsonl(DOCUMENTS[:2], tmp_path / "in2")
    preprocess("jsonl", tmp_path / "in2", tmp_path / "second", tokenizer=TOKENIZER)
    manifest = merge([corpus, tmp_path / "second"], tmp_path / "both", move=move)
    assert manifest["counts"]["documents"] == 6
    assert plain(list(open_corpus(tmp_path / "both"))) == plain(DOCUMENTS + DOCUMENTS[:2])
    assert verify(tmp_path / "both") == []
    assert corpus.exists() != move
    linked = {p.name: p.stat().st_nlink for p in (tmp_path / "both").iterdir()}
    ours = {"corpus.json", "drops.jsonl"}  # written anew; moved or linked, nothing else is copied
    assert {name for name, links in linked.items() if links == 1} == (set(linked) if move else ours)
    left = tmp_path / f".both.{owners.machine()}-{2**30}-{'0' * 32}"  # of a merge that was killed when it was done
    left.mkdir()
    again = merge([corpus, tmp_path / "second"], tmp_path / "both", move=move)
    assert again["fingerprint"] == manifest["fingerprint"]
    assert not left.exists()


def test_a_move_that_is_interrupted_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers.write_jsonl(DOCUMENTS[:2], tmp_path / "in2")
    second = tmp_path / "second"
    preprocess("jsonl", tmp_path / "in2", second, tokenizer=TOKENIZER)
    (second / "diary.txt").write_text("dear")
    original, removed = Path.unlink, 0

    def unlink(path: Path, missing_ok: bool = False) -> None:
        nonlocal removed
        if removed == 1:
            raise KeyboardInterrupt
        removed += path.exists() and path.parent in (corpus, second)
        original(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        for step in range(18):  # each run removes one file more: eight of each corpus, and its manifest
            removed = 0
            with pytest.raises(KeyboardInterrupt) if step < 17 else nullcontext():
                merge([corpus, second], tmp_path / "both", move=True)
            assert verify(tmp_path / "both", quick=True) == []
            for source in (corpus, second):
                assert not (source / "corpus.json").exists() or not verify(source, quick=True), "complete or not there"
    assert not corpus.exists()
    assert [p.name for p in second.iterdir()] == ["diary.txt"]
    assert plain(list(open_corpus(tmp_path / "both"))) == plain(DOCUMENTS + DOCUMENTS[:2])


def test_a_move_removes_nothing_outside_of_a_corpus(corpus: Path, tmp_path: Path) -> None:
    mine, manifest = tmp_path / "mine", json.loads((corpus / "corpus.json").read_text())
    for name in (str(mine), "../mine"):
        mine.write_text("ours")
        listed = {**manifest["files"], name: {"size": 4, "xxh3": "0" * 32}}
        (corpus / "corpus.json").write_text(json.dumps({**manifest, "files": listed}))
        with pytest.raises(UserError, match=f"corpus.json lists '{name}', which is no name of a file in its folder"):
            merge([corpus], tmp_path / "both", move=True)
        assert not (tmp_path / "both").exists()
        assert mine.exists()
    (corpus / "corpus.json").write_text(json.dumps(manifest))
    merge([corpus], tmp_path / "both")  # and, where the removal goes on of what was merged, in what is left of it
    (corpus / "corpus.json").unlink()
    (corpus / "corpus.json.moved").write_text(json.dumps({"files": {str(mine): {}}}))
    with pytest.raises(UserError, match=f"corpus.json.moved lists '{mine}'"):
        merge([corpus], tmp_path / "both", move=True)
    assert mine.read_text() == "ours"


def test_merge_refuses(corpus: Path, tmp_path: Path) -> None:
    preprocess("jsonl", tmp_path / "in", tmp_path / "clip", tokenizer="clip")
    with pytest.raises(ValueError, match="different tokenizers"):
        merge([corpus, tmp_path / "clip"], tmp_path / "out")
    with pytest.raises(ValueError, match="given twice"):
        merge([corpus, corpus], tmp_path / "out")
    with pytest.raises(ValueError, match="not empty"):
        merge([corpus], tmp_path)
    with pytest.raises(ValueError, match="is not a corpus"):
        merge([corpus, tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "clip" / "images-00000.arrow").unlink()
    with pytest.raises(ValueError, match="missing"):
        merge([tmp_path / "clip"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge([corpus], tmp_path / "out")
    with pytest.raises(ValueError, match="not empty"):  # and not that it was done before, as of one that was moved
        merge([tmp_path / "nowhere"], tmp_path / "out")


def test_a_source_whose_documents_have_other_names_was_not_merged(corpus: Path, tmp_path: Path) -> None:
    """Moved as if it had been, they were lost: contents alone make two corpora one and the same."""
    merge([corpus], tmp_path / "both")
    writers.write_jsonl(DOCUMENTS, tmp_path / "renamed")
    (tmp_path / "renamed" / "documents.jsonl").rename(tmp_path / "renamed" / "0.jsonl")
    preprocess("jsonl", tmp_path / "renamed", tmp_path / "other", tokenizer=TOKENIZER)
    assert open_corpus(tmp_path / "other").fingerprint == open_corpus(corpus).fingerprint
    with pytest.raises(UserError, match="not empty"):
        merge([tmp_path / "other"], tmp_path / "both", move=True)
    assert open_corpus(tmp_path / "other").name(0).startswith("0.jsonl")
    # an earlier release did not record the names
    manifest = json.loads((tmp_path / "both" / "corpus.json").read_bytes())
    del manifest["recipe"]["names"]
    (tmp_path / "both" / "corpus.json").write_text(json.dumps(manifest))
    merge([corpus], tmp_path / "both", move=True)
    assert not corpus.exists()


def test_merge_never_reads_its_output(corpus: Path, tmp_path: Path) -> None:
    """As `merge corpora/* --output corpora/both` does when it runs again: of one corpus both have one fingerprint."""
    merge([corpus], tmp_path / "both")
    (tmp_path / "link").symlink_to("both")
    for sources in ([tmp_path / "both"], [tmp_path / "link"], [corpus, tmp_path / "in/../both"]):
        for move in (False, True):
            with pytest.raises(ValueError, match=r"/both is the output, and given as a corpus"):
                merge(sources, tmp_path / "both", move=move)
    assert verify(tmp_path / "both") == verify(corpus) == []


@pytest.mark.parametrize("links", [True, False])
def test_of_two_merges_into_one_folder_the_first_stays_whole(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Both found it empty; the other was sooner. With `move`, too, nothing is removed of what was not merged."""
    output, original = tmp_path / "out", Corpus.check_sizes

    def overtaken(self: Corpus) -> None:
        monkeypatch.setattr(Corpus, "check_sizes", original)
        merge([corpus], output)
        original(self)

    def no_links(a: object, b: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(Corpus, "check_sizes", overtaken)
    with pytest.raises(ValueError, match="/out is not empty; give a new folder"):
        merge([corpus], output, move=True)
    assert verify(output) == []
    assert verify(corpus) == []
    assert {path.name for path in tmp_path.iterdir()} == {"in", "corpus", "out"}


@pytest.mark.timeout(60)
def test_after_a_kill_the_same_command_merges(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(merge_module, "write_manifest", killed)
        process = fork_context().Process(target=merge, args=([corpus], tmp_path / "out"))
        process.start()
        process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    merge([corpus], tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert {path.name for path in tmp_path.iterdir()} == {"in", "corpus", "out"}


def test_what_is_missing_is_named(corpus: Path, tmp_path: Path) -> None:
    """The source, or the folder that it was to be put into."""
    opened = open_corpus(corpus)
    with pytest.raises(UserError, match=f"^{corpus}/nothing is missing; `megatron-lcl verify`"):
        link_file(opened, "nothing", tmp_path / "copy")
    with pytest.raises(FileNotFoundError) as raised:
        link_file(opened, "tokens-00000.bin", tmp_path / "gone" / "copy")
    assert raised.value.filename == str(tmp_path / "gone" / "copy")
