"""Protects `verify`: it finds corpora whose files are undamaged but whose content is wrong."""

from __future__ import annotations

import json
import os
import signal
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import writers
from data.helpers import TOKENIZER
from data.writers import picture

from megatron_lcl.data.corpus.corpus_manifest import write_manifest
from megatron_lcl.data.corpus.document import Document, Text
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import ShardWriter
from megatron_lcl.data.corpus.tokenizer import SPECIAL_TOKENS
from megatron_lcl.data.prepare import verify as verify_module
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify


def image(writer: ShardWriter, data: bytes = picture(0), width: int = 40, height: int = 30, **match: float) -> None:
    writer.add_texts([array("i", [1, 2]).tobytes()])
    writer.add_image(data, width, height, "PNG", match.get("similarity"), match.get("matched"))  # type: ignore[arg-type]
    writer.end_document()


def written(tmp_path: Path, write: Callable[[ShardWriter], None], **count: int) -> Path:
    """A corpus whose only shard is what `write` puts there; `count` is added to its counts."""
    writers.write_jsonl([Document((Text("a"),))], tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "corpus", tokenizer=TOKENIZER)
    writer = ShardWriter(tmp_path / "corpus", 0)
    write(writer)
    files, counts = writer.finish()
    counts = {name: n + count.get(name, 0) for name, n in counts.items()}
    manifest = json.loads((tmp_path / "corpus/corpus.json").read_text())
    manifest.update(files={**manifest["files"], **files}, shards=[counts], counts=counts)
    write_manifest(tmp_path / "corpus", manifest)
    return tmp_path / "corpus"


def test_what_is_right(tmp_path: Path) -> None:
    assert verify(written(tmp_path, lambda writer: image(writer, similarity=0.5, matched=0))) == []


@pytest.mark.parametrize(
    ("write", "fault"),
    [
        (lambda writer: image(writer, b"<html>"), "image 0: HTML, not an image"),
        (lambda writer: image(writer, picture(0)[:-40]), "image 0: truncated or damaged"),
        (lambda writer: image(writer, width=41), "image 0: 40x30, not 41x30"),
        (lambda writer: image(writer, height=31), "image 0: 40x30, not 40x31"),
    ],
)
def test_images(tmp_path: Path, write: Callable[[ShardWriter], None], fault: str) -> None:
    corpus = written(tmp_path, write)
    assert verify(corpus) == [f"shard 00000: {fault}"]
    assert verify(corpus, quick=True) == []


@pytest.mark.parametrize(
    ("match", "fault"),
    [
        ({"similarity": 0.5, "matched": 1}, "placement 0: matched text 1 of a document with 1 text"),
        ({"similarity": 0.5, "matched": -2}, "placement 0: matched text -2 of a document with 1 text"),
        ({"similarity": float("inf"), "matched": 0}, "placement 0: its similarity is infinite"),
    ],
)
def test_matches(tmp_path: Path, match: dict[str, float], fault: str) -> None:
    corpus = written(tmp_path, lambda writer: image(writer, **match))
    assert verify(corpus, quick=True) == [f"shard 00000: {fault}"]


@pytest.mark.parametrize("token", [-1, TOKENIZER.vocab_size - len(SPECIAL_TOKENS)])
def test_ids_that_no_text_has(tmp_path: Path, token: int) -> None:
    """Those of special tokens are behind the others'."""

    def write(writer: ShardWriter) -> None:
        writer.add_texts([array("i", [1, 2]).tobytes(), array("i", [1, token]).tobytes()])
        writer.end_document()

    fault = f"shard 00000: piece 1: token id {token} is out of range"
    assert verify(written(tmp_path, write), quick=True) == [fault]


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda m: m["counts"].update(documents=2), "corpus.json: the counts are not the sum of the shards'"),
        (lambda m: m["files"].pop("tokenizer.model"), "tokenizer.model: not in the manifest"),
        (lambda m: m.update(contents="0" * 32), "corpus.json: its `contents` are not those of the files that it names"),
        (
            lambda m: m["tokenizer"].update(fingerprint="x"),
            "tokenizer.model: not the tokenizer that the manifest names",
        ),
    ],
)
def test_the_manifest(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], fault: str) -> None:
    corpus = written(tmp_path, image)
    manifest = json.loads((corpus / "corpus.json").read_text())
    edit(manifest)
    (corpus / "corpus.json").write_text(json.dumps(manifest))
    assert fault in verify(corpus, quick=True)


def test_long_pieces_are_looked_at_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their tokens, which decide on the memory: a piece that is longer than a block is one of its own."""

    def write(writer: ShardWriter) -> None:
        for k, length in enumerate((3, 4, 2, 20, 1, 1)):
            writer.add_texts([array("i", [1] * (length - 1) + [10**6 if k == 4 else 1]).tobytes()])
            writer.end_document()

    sizes, pieces = [], Shard.pieces

    def counted(self: Shard, start: int, stop: int) -> np.ndarray:
        sizes.append(int(self.lengths[start:stop].sum()))
        return pieces(self, start, stop)

    corpus = written(tmp_path, write)
    monkeypatch.setattr(verify_module, "_BLOCK", 8)
    monkeypatch.setattr(Shard, "pieces", counted)
    assert verify(corpus) == ["shard 00000: piece 4: token id 1000000 is out of range"]
    assert sizes == [31, 7, 2, 20, 2]  # the first: a view of all, of which nothing is copied


def test_sigterm_ends_it_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it has on the disk."""
    removed = []

    def killed(*_: object) -> Iterator[str]:
        try:
            yield "a fault"
            os.kill(os.getpid(), signal.SIGTERM)
            yield "another"
        finally:
            removed.append(True)

    monkeypatch.setattr(verify_module, "_faults", killed)
    with pytest.raises(SystemExit) as ended:
        verify("corpus")
    assert (ended.value.code, removed) == (128 + signal.SIGTERM, [True])
    assert verify("corpus", max_faults=1) == ["a fault"]
    assert removed == [True, True]


@pytest.mark.parametrize("name", ["documents", "pieces", "tokens", "placements", "images", "image_bytes"])
def test_counts(tmp_path: Path, name: str) -> None:
    corpus = written(tmp_path, image, **{name: 1})
    (fault,) = verify(corpus, quick=True)
    assert fault.startswith("shard 00000: holds {")
