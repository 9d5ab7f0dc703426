"""Protects that any rule over the whole corpus can be added: what it is given, and what becomes of what it removes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate.corpora_of_rules import files, left, picture, read, write

from megatron_lcl.curate import run
from megatron_lcl.curate.documents import Gone, Range, bytes_before, documents, ranges
from megatron_lcl.curate.joins import REMOVED
from megatron_lcl.curate.run import curate
from megatron_lcl.curate.settings import read_settings
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.prepare.unfinished import WORK
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError


def table_of(rows: Sequence[tuple[int, int, float, str]]) -> pa.Table:
    """Removals of a join."""
    return pa.Table.from_pylist([dict(zip(REMOVED.names, row, strict=True)) for row in rows], REMOVED)


@dataclass(frozen=True)
class SameTexts:
    """Removes documents whose texts another one before them has, as far as rules have left them."""

    rule: str = "document.same_texts"
    threshold: str = "1 of each"
    facts_of: str = "texts"

    def prepare(self, folder: Path, workers: int) -> None:
        (folder / "said").write_text("once")

    def facts(self, corpus: Corpus, task: Range, gone: Gone, file: Path, prepared: Path) -> None:
        found = []
        for document in documents(corpus, task):
            document.without(gone.get(document.number, ()))
            texts = [document.text(item) for item in document.kept_texts]
            found.append([document.number, document.name, texts])
        file.write_text(json.dumps(found))

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        assert list(scratch.iterdir()) == []
        assert (prepared / "said").read_text() == "once"
        first: dict[tuple[str, ...], str] = {}
        for file in facts:
            again = []
            for number, name, texts in json.loads(file.read_text()):
                original = first.setdefault(tuple(texts), name)
                if original != name:
                    again.append((number, -1, 1.0, original))
            yield table_of(again)


@dataclass(frozen=True)
class FirstItems:
    """Removes the first item of every document."""

    rule: str = "image.first"
    threshold: None = None
    facts_of: str = "numbers"

    def prepare(self, folder: Path, workers: int) -> None:
        assert list(folder.iterdir()) == []

    def facts(self, corpus: Corpus, task: Range, gone: Gone, file: Path, prepared: Path) -> None:
        file.write_text(json.dumps([document.number for document in documents(corpus, task)]))

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        numbers = [number for file in facts for number in json.loads(file.read_text())]
        yield table_of([(number, 0, 0.5, "") for number in numbers])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = ["one text", "short", "another text", "one text", "one text"]
    return write(
        tmp_path,
        [Document((Image(picture(k, 40 + k)), Text(text), Text("no"))) for k, text in enumerate(texts)],
        shard_documents=2,
    )


def test_a_rule_of_another_package(source: Path, tmp_path: Path) -> None:
    rules = read_settings(overrides={"text.min_characters": "3", "image.max_side": "43"})
    for workers in (1, 2):
        found = curate(
            source, tmp_path / str(workers), rules, joins=[SameTexts(), FirstItems()], workers=workers, task_bytes=100
        )
    assert files(tmp_path / "1") == files(tmp_path / "2")
    table = pq.read_table(tmp_path / "1" / "removed.parquet")
    rows = list(zip(*(table[name].to_pylist() for name in ("document", "item", "rule", "matched")), strict=True))
    first = [(k, 0, "image.first", "") for k in range(4)] + [(4, 0, "image.max_side", "")]  # which was before it
    short = [(k, 2, "text.min_characters", "") for k in range(5)]
    again = [(k, -1, "document.same_texts", open_corpus(source).name(0)) for k in (3, 4)]
    assert sorted(rows) == sorted(first + short + again)
    counts = {r.rule: (r.threshold, r.texts, r.images, r.documents) for r in found.rules}
    assert counts["document.same_texts"] == ("1 of each", 2, 0, 2)
    assert counts["image.first"] == ("", 0, 4, 0)
    assert read(tmp_path / "1") == left(source, tmp_path / "1")
    assert verify(tmp_path / "1") == []
    with pytest.raises(UserError, match="holds another corpus"):
        curate(source, tmp_path / "1", rules, joins=[SameTexts()], task_bytes=100)


def test_what_is_prepared_stays_where_the_run_is_interrupted(source: Path, tmp_path: Path) -> None:
    class Interrupted(FirstItems):
        def prepare(self, folder: Path, workers: int) -> None:
            raise KeyboardInterrupt

    class Prepared(SameTexts):
        def prepare(self, folder: Path, workers: int) -> None:
            pytest.fail("once more")

    output, rules = tmp_path / "out", read_settings(overrides={})
    with pytest.raises(KeyboardInterrupt):
        curate(source, output, rules, joins=[SameTexts(), Interrupted()])
    assert (output / WORK / "prepared-0" / "said").exists()
    curate(source, output, rules, joins=[Prepared(), FirstItems()])
    with pytest.raises(KeyboardInterrupt):
        curate(source, tmp_path / "nothing", rules, joins=[Interrupted()])
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("block", [1, 2, 1 << 14])
def test_ranges_are_cut_by_size_and_hold_every_document_once(
    source: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_lcl.curate.documents._BLOCK", block)
    corpus = open_corpus(source)
    for shard in corpus.shards:
        sizes = []
        for document in documents(corpus, Range(0, shard.number, 0, shard.num_documents, 0)):
            texts, images = document.kept_texts, document.kept_images
            pixels = sum(len(bytes(shard.image(document.image(item)))) for item in images)
            sizes.append(sum(4 * len(document.ids(item)) for item in texts) + 4 * len(images) + pixels)
        assert bytes_before(shard).tolist() == [0, *itertools.accumulate(sizes)]
    for task_bytes in (1, 200, 1 << 20):
        found = ranges(corpus, task_bytes)
        assert [document.number for task in found for document in documents(corpus, task)] == list(range(5))
        assert [task.number for task in found] == list(range(len(found)))
        assert len(found) == (5 if task_bytes < 1 << 20 else 3)
    monkeypatch.setattr("megatron_lcl.curate.documents.MAX_PIECES", 3)  # as a document has
    assert len(ranges(corpus, 1 << 20)) == 5


def test_many_tables_of_few_rows_are_written_in_large_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked once how long it is: a corpus of many tasks has as many tables."""
    asked = []

    class Few:
        def __init__(self, number: int) -> None:
            self.table = table_of([(number, k, 0.0, "") for k in range(number % 3)])

        def __len__(self) -> int:
            asked.append(self)
            return len(self.table)

    together = pa.concat_tables
    monkeypatch.setattr(run, "_ROWS", 30)
    monkeypatch.setattr(pa, "concat_tables", lambda tables: together([few.table for few in tables]))
    tables = [Few(number) for number in range(99)]
    run._write_tables(tmp_path / "all.parquet", REMOVED, tables)  # type: ignore[arg-type]
    assert asked == tables
    with pq.ParquetFile(tmp_path / "all.parquet") as file:
        assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [30, 30, 30, 9]
        assert file.read() == together([few.table for few in tables])
