"""Protects: a truncated file is named, with both sizes, by whatever opens its shard, and by a run before it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data import writers
from data.writers import picture

from megatron_lcl.data.corpus import indexed
from megatron_lcl.data.corpus.corpus_manifest import shard_files
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.indexed import IMAGE, IndexedWriter, read_indexed
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.pages.inspect import stats
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

DOCUMENTS = [Document((Text(f"text number {k}"), Image(picture(k)))) for k in range(6)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    writers.write_jsonl(DOCUMENTS, tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "corpus", tokenizer="clip")
    return tmp_path / "corpus"


def cut(file: Path) -> str:
    """Take off the last 40 bytes, a whole number of ids; what is to be said."""
    raw = file.read_bytes()
    file.write_bytes(raw[:-40])
    return f"{file} has {len(raw) - 40:,} bytes, but was written with {len(raw):,}; copy it again"


@pytest.mark.parametrize("name", shard_files(0))
def test_a_shard_compares_its_files(corpus: Path, tmp_path: Path, name: str) -> None:
    message = cut(corpus / name)
    uses: list[Callable[[], object]] = [
        lambda: open_corpus(corpus)[0],
        lambda: stats(open_corpus(corpus)),
        lambda: merge([corpus], tmp_path / "merged"),
        lambda: open_corpus(corpus).check_sizes(),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()
    assert not (tmp_path / "merged").exists()
    (corpus / name).unlink()
    for use in uses:
        with pytest.raises(ValueError, match=f"{corpus / name} is missing"):
            use()


def test_all_files_are_looked_at_and_none_is_read(corpus: Path) -> None:
    for name in ("tokenizer.json", "drops.jsonl"):
        (corpus / name).write_bytes((corpus / name).read_bytes() + b"\n")
        with pytest.raises(ValueError, match=f"{corpus / name} has"):
            open_corpus(corpus).check_sizes()
        (corpus / name).write_bytes((corpus / name).read_bytes()[:-1])
    (corpus / "tokens-00000.bin").write_bytes(bytes((corpus / "tokens-00000.bin").stat().st_size))
    open_corpus(corpus).check_sizes()  # `verify` compares what is in them


@pytest.mark.parametrize("many", [False, True])
def test_a_sequence_that_the_index_cannot_describe_is_refused(
    many: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths are int32; a longer one would be read as negative, and nothing of the shard could be."""
    monkeypatch.setattr(indexed, "_MAX_LENGTH", 9)
    writer = IndexedWriter(tmp_path / "images", np.uint8)

    def add(*blocks: bytes) -> None:
        if many:
            writer.add_run(b"".join(blocks), [len(block) for block in blocks], IMAGE)
        else:
            for block in blocks:
                writer.add(block, IMAGE)

    add(bytes(9), bytes(9))
    with pytest.raises(UserError, match=r"of 10 tokens or bytes for .*images\.bin: the format holds at most 9"):
        add(bytes(10))
    writer.end_document()
    writer.finish()
    assert read_indexed(tmp_path / "images").lengths.tolist() == [9, 9]
