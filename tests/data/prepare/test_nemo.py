"""Protects the reading of NeMo Curator's interleaved parquet, as its writer's schema says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.helpers import TOKENIZER, documents_of, plain, spaced, undecoded
from data.writers import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.preprocess import preprocess

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False), pa.field("position", pa.int32(), nullable=False),
        pa.field("modality", pa.string(), nullable=False), ("content_type", pa.string()), ("text_content", pa.string()),
        ("binary_content", pa.large_binary()), ("source_ref", pa.string()), ("materialize_error", pa.string()),
    ]
)  # fmt: skip
"""nemo_curator/tasks/interleaved.py"""


def rows_of(documents: list[Document]) -> list[dict[str, Any]]:
    rows = []
    for number, document in enumerate(documents):
        rows.append({"sample_id": f"s{number}", "position": -1, "modality": "metadata", "text_content": "{}"})
        for position, item in enumerate(document.items):
            row = {"sample_id": f"s{number}", "position": position}
            if isinstance(item, Text):
                row |= {"modality": "text", "content_type": "text/plain", "text_content": item.text}
            else:
                row |= {"modality": "image", "content_type": "image/png", "binary_content": item.data}
            rows.append(row)
    return rows


def write(file: Path, rows: list[dict[str, Any]], group: int = 1000) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, row_group_size=group)


items = st.one_of(
    st.integers(0, 99).map(lambda k: Text(f"text {k}")), st.integers(0, 9).map(lambda k: Image(picture(k)))
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(items, min_size=1, max_size=5), min_size=1, max_size=6), st.integers(1, 9))
def test_documents_that_run_on_over_row_groups(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[Text | Image]], group: int
) -> None:
    folder = tmp_path_factory.mktemp("nemo")
    expected = [Document(tuple(items)) for items in documents]
    write(folder / "a.parquet", rows_of(expected), group)
    found, drops = documents_of(create("nemo", folder, None, {}))
    assert plain(found) == plain(expected)
    assert [d.metadata["id"] for d in found] == [f"s{k}" for k in range(len(expected))]
    assert not drops.bad_counts


def test_through_a_corpus_and_what_is_bad(tmp_path: Path) -> None:
    good = Document((Text("a"), Image(picture(0)), Text("b"), Image(picture(1))))
    rows = rows_of([good] * 3)
    rows[2]["position"], rows[3]["position"] = 2, 1  # Text, then Text before the first image
    rows[7] |= {"binary_content": None, "materialize_error": "404"}
    rows[8] |= {"modality": "audio", "text_content": None}
    rows.append({"sample_id": "empty", "position": -1, "modality": "metadata"})
    write(tmp_path / "in/a.parquet", rows, 4)
    pq.write_table(pa.table({"sample_id": ["x"], "url": ["y"]}), tmp_path / "in/b.parquet")
    (tmp_path / "in/c.parquet").write_bytes(b"PAR1")
    summary = preprocess("nemo", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    corpus = open_corpus(tmp_path / "out")
    a, x, b, y = good.items
    expected = [Document((a, b, x, y)), Document((a, y)), good]
    assert plain(list(corpus)) == plain(spaced(expected, " "))
    assert [corpus.name(k) for k in range(3)] == ["a.parquet:0 s0", "a.parquet:5 s1", "a.parquet:10 s2"]
    assert summary.drops.bad_counts == {
        "document: damaged parquet file": 1,
        "document: no columns position and modality and text_content and binary_content; it has sample_id, url": 1,
        "document: nothing left": 1,
        "image: no bytes in binary_content (materialize the images first)": 1,
    }
    assert summary.drops.left_out_counts == {"text: modality that is neither text nor image": 1}
    assert corpus.kinds == ("natural",)
    found, _ = documents_of(create("nemo", tmp_path / "in", None, {}))
    assert [document.metadata["lost_images"] for document in found] == [0, 1, 0, 0]


def test_rows_without_a_sample_are_counted_once(tmp_path: Path) -> None:
    schema = pa.schema([field.with_nullable(True) for field in SCHEMA])
    rows = [*rows_of([Document((Text("a"),))]), *[{"modality": "text", "text_content": "x"}] * 5]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet", row_group_size=3)
    found, drops = documents_of(create("nemo", tmp_path, None, {}))
    assert plain(found) == [["a"]]
    assert drops.bad_counts == {"document: a row without sample_id": 5}


@pytest.mark.usefixtures("no_waiting_lines")
@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("nemo", "no columns sample_id and position and modality"),
        ("obelics", "no columns images and texts"),
        ("omnicorpus", "no columns images and texts"),
    ],
)
def test_other_columns_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, said: str) -> None:
    pq.write_table(pa.table({"url": ["x"], "a b": [1]}), tmp_path / "a.parquet")
    TOKENIZER.save(tmp_path / "t.model")
    before = sorted(tmp_path.iterdir())
    assert main(["preprocess", "--format", format, "--input", str(tmp_path / "a.parquet"), "--output",
                 str(tmp_path / "out"), "--tokenizer", str(tmp_path / "t.model")]) == 2  # fmt: skip
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "it has url, 'a b'. The format reads: .parquet" in line
    assert sorted(tmp_path.iterdir()) == before


def test_strings_that_are_not_utf8(tmp_path: Path) -> None:
    """They cost what they say, and no document beside them, be it in the same batch of rows or cut by it."""
    documents = [Document((Text(f"a {k}"), Image(picture(k)), Text(f"b {k}"))) for k in range(9)]
    rows = rows_of(documents)  # 4 each: batches of 16 and row groups of 18 cut some
    schema = pa.schema([field.with_type(pa.binary()) if field.type == pa.string() else field for field in SCHEMA])
    for row in rows:
        row |= {key: row[key].encode() for key in ("sample_id", "modality", "text_content") if key in row}
    for row in rows[16:20]:
        row["sample_id"] = b"s\xff4"
    rows[25]["text_content"] = b"a \xff"
    rows[29]["modality"] = b"te\xfft"
    data = pa.Table.from_pylist(rows, schema)
    columns = [  # as a damaged file has them
        undecoded(column.to_pylist()) if field.type == pa.string() else column
        for column, field in zip(data.columns, SCHEMA, strict=True)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), tmp_path / "a.parquet", row_group_size=18)
    found, drops = documents_of(create("nemo", tmp_path, None, {}))
    expected = plain(documents)
    expected[6][0] = "a \ufffd"
    del expected[7][0]
    assert plain(found) == expected
    assert [d.metadata["id"] for d in found] == [f"s\ufffd{k}" if k == 4 else f"s{k}" for k in range(9)]
    assert drops.noted_counts == {"document: invalid UTF-8 replaced": 2}
    assert drops.left_out_counts == {"text: modality that is neither text nor image": 1}
    assert not drops.bad_counts
