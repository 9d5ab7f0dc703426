"""Protects `verify`: it finds corpora whose files are undamaged but whose content is wrong."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from data import writers
from data.helpers import TOKENIZER
from data.writers import picture

from megatron_lcl.data.corpus.corpus_manifest import write_manifest
from megatron_lcl.data.corpus.document import Document, Text
from megatron_lcl.data.corpus.store import ShardWriter
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
        ({"similarity": 0.5, "matched": 1}, "placement 0: matched text 1 of a document with 1 texts"),
        ({"similarity": 0.5, "matched": -2}, "placement 0: matched text -2 of a document with 1 texts"),
        ({"similarity": float("inf"), "matched": 0}, "placement 0: its similarity is infinite"),
    ],
)
def test_matches(tmp_path: Path, match: dict[str, float], fault: str) -> None:
    corpus = written(tmp_path, lambda writer: image(writer, **match))
    assert verify(corpus, quick=True) == [f"shard 00000: {fault}"]


@pytest.mark.parametrize("name", ["documents", "pieces", "tokens", "placements", "images", "image_bytes"])
def test_counts(tmp_path: Path, name: str) -> None:
    corpus = written(tmp_path, image, **{name: 1})
    (fault,) = verify(corpus, quick=True)
    assert fault.startswith("shard 00000: holds {")
