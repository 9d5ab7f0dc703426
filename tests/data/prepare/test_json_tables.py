"""Protects tables of JSON, lines and arrays of any size; rows of texts alone; which files of a folder are read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data.helpers import TOKENIZER, documents_of, plain
from data.writers import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import Unit, create, lines
from megatron_lcl.data.prepare.importers.json_rows import array_rows, is_array
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

ROWS = [{"file_name": f"{k}.png", "text": f"text {k}", "id": k} for k in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
EXPECTED: list[list[object]] = [[(picture(k), None, None), f"text {k}"] for k in range(4)]
OTHERS = "document: file that is of another kind than those that are read: give it alone as --input"
LOST = "document: not JSON, the rows after it are lost"
CUT = "document: truncated file, the rows after it are lost"


def array_file(folder: Path, raw: str | bytes) -> Unit:
    (folder / "a.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode(errors="surrogatepass"))
    return Unit("a.json", 0, (folder / "a.json", 0, 0))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", LINES),
        ("metadata.jsonl.gz", gzip.compress(LINES)),
        ("metadata.ndjson", b"\xef\xbb\xbf" + LINES),
        ("metadata.ndjson.zst", zstandard.compress(LINES)),
        ("c4-train.00000-of-01024.json.gz", gzip.compress(LINES)),
        ("blip.json", json.dumps(ROWS, indent=1).encode()),
        ("blip.json.zst", zstandard.compress(b"\xef\xbb\xbf\n " + json.dumps(ROWS).encode())),
    ],
    ids=lambda given: given if isinstance(given, str) else "",  # a gzip file has the time in it
)
def test_rows_with_images_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    """As ImageFolder has them: names count from the table's own folder."""
    (tmp_path / "in/train").mkdir(parents=True)
    for k in range(4):
        (tmp_path / f"in/train/{k}.png").write_bytes(picture(k))
    (tmp_path / "in/train" / name).write_bytes(content)
    for size in (1, 50, 1 << 20):
        monkeypatch.setattr(lines, "RANGE", size)
        found, drops = documents_of(create("table", tmp_path / "in", None, {}))
        assert plain(found) == EXPECTED
        assert [document.metadata["id"] for document in found] == list("0123")
        assert drops == Drops()
    summary = preprocess("table", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER)
    assert plain(list(open_corpus(tmp_path / "out"))) == EXPECTED
    assert summary.counts["images"] == 4


@pytest.mark.parametrize("archive", [False, True])
def test_the_own_folder_goes_first(tmp_path: Path, archive: bool) -> None:
    """Then that of the input; with --images neither counts. Rules are others where it matters alone."""
    folder = tmp_path / "in"
    (folder / "train").mkdir(parents=True)
    for name, k in (("train/0.png", 0), ("0.png", 7), ("1.png", 1), ("train/deep.png", 5)):
        (folder / name).write_bytes(picture(k))
    text = "path,text\n0.png,a\n1.png,b\ntrain/deep.png,c\n"
    (folder / "train/a.csv").write_text(text)
    if archive:
        import tarfile

        tarfile.open(folder / "t.tar", "w:").close()
    below = create("table", folder, None, {})
    assert [row[0] for row in plain(documents_of(below)[0])] == [(picture(k), None, None) for k in (0, 1, 5)]
    given_folder = create("table", folder, folder, {})
    assert [row[0] for row in plain(documents_of(given_folder)[0])] == [(picture(k), None, None) for k in (7, 1, 5)]
    assert (
        below.rules == given_folder.rules + 1 == create("table", folder / "train/a.csv", None, {}).rules + 1 + archive
    )


some_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text('ab"\\[]{}, é\U0001f600', max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(some_json, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(2, 40))
def test_arrays_are_read_as_json_reads_them(
    tmp_path: Path, values: list[Any], indent: int | None, escaped: bool, size: int
) -> None:
    """In parts of any size; and cut anywhere, the rows before the cut come."""
    raw = json.dumps(values, indent=indent, ensure_ascii=escaped).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK", size)
        drops = Drops()
        unit = array_file(tmp_path, raw + b" \n")
        assert is_array(tmp_path / "a.json")
        found = list(array_rows(unit, drops))
        expected = [(f"a.json:{k}", value) for k, value in enumerate(values) if isinstance(value, dict)]
        assert found == expected
        others = len(values) - len(expected)
        assert drops.bad_counts == ({"document: not a JSON object": others} if others else {})
        cut = len(raw) * size // 41
        drops = Drops()
        found = list(array_rows(array_file(tmp_path, raw[:cut]), drops))
        assert found == expected[: len(found)]
        assert drops.bad_counts[CUT] + drops.bad_counts[LOST] == 1


@pytest.mark.parametrize("number", ["1.5", "-0.25", "1e5", "12E+30", "-0", "12", "0.5e-10", "Infinity", "-Infinity"])
def test_a_number_may_be_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    """It is no row, and those after it are."""
    unit = array_file(tmp_path, f'[{{"a": 1}},{number},{{"a": 2}} ,{number}]')
    for size in range(2, 30):
        monkeypatch.setattr(lines, "_CHUNK", size)
        found = list(array_rows(unit, drops := Drops()))
        assert found == [("a.json:0", {"a": 1}), ("a.json:2", {"a": 2})], size
        assert drops.bad_counts == {"document: not a JSON object": 2}


@pytest.mark.parametrize("size", [8, 64])
def test_faults_in_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for raw, num_rows, fault in (
        ('[{"a": 1} {"a": 2}]', 1, LOST),
        ('[{"a": 1}, {"a" 2}, {"a": 3}]', 1, LOST),
        ('[{"a": 1}][{"a": 2}]', 1, LOST),
        ('[{"a": 1},, {"a": 2}]', 1, LOST),
        ('[, {"a": 1}]', 0, LOST),
        ('[{"a": 1}}', 1, LOST),
        ('[{"a": 1}] x', 1, LOST),
        (b'[{"a": 1}] \xc3', 1, LOST),
        ('[{"a": 1}]' + " " * 99 + "x", 1, LOST),
        ('[{"a": 1}, ' + "[" * 100_000, 1, LOST),
        ('[{"a": 1}, {"a": "' + "x" * 3000 + '"}]', 1, LOST),
        ('[{"a": 1},', 1, CUT),
        ("[", 0, CUT),
        ('[{"a": NaN}, {"a": "\\ud800"}]', 2, None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(lines, "_CHUNK", size)
            patch.setattr("megatron_lcl.data.prepare.importers.json_rows.MAX_LINE", 1000)
            drops = Drops()
            assert len(list(array_rows(array_file(tmp_path, raw), drops))) == num_rows
            assert drops.bad_counts == ({fault: 1} if fault else {})


@pytest.mark.parametrize("size", [2, 7, 1 << 16])
def test_what_is_not_utf8_is_noted_as_in_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """And U+FFFD itself, and escaped surrogates, are no fault."""
    monkeypatch.setattr(lines, "_CHUNK", size)
    texts = (b"caf\xe9", b"plain", "\ufffd".encode(), b"\\udc80", b"cut \xf0\x9f\x98", "\U0001f600 é".encode())
    rows = [b'{"text": "%s", "n": %d}' % (text, k) for k, text in enumerate(texts)] + [b'["\xe9"]']
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join(rows) + b"]")
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(rows))
    found, drops = {}, {}
    for name in ("a.json", "b.jsonl"):
        importer = create("table", tmp_path / name, None, {"join": "none"})
        found[name], drops[name] = documents_of(importer)
    assert plain(found["a.json"]) == plain(found["b.jsonl"])
    assert [row[0] for row in plain(found["a.json"])] == [
        "caf\ufffd", "plain", "\ufffd", "\udc80", "cut \ufffd", "\U0001f600 é",
    ]  # fmt: skip
    noted = drops["a.json"].noted_counts
    assert noted == drops["b.jsonl"].noted_counts == {"document: invalid UTF-8 replaced": 3}
    assert drops["a.json"].bad_counts == drops["b.jsonl"].bad_counts == {"document: not a JSON object": 1}
    samples = [[text for text, _ in found.samples["document: not a JSON object"]] for found in drops.values()]
    assert samples == [['["\ufffd"]']] * 2


def test_a_sample_of_what_is_no_json_is_text(tmp_path: Path) -> None:
    """It is written as JSON, and printed."""
    drops = Drops()
    assert not list(array_rows(array_file(tmp_path, b'[{"a" caf\xe9}]'), drops))
    ((sample, _),) = drops.samples[LOST]
    assert sample == '{"a" caf\ufffd}]'


DEEP = '{"text": "deep", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("number", "row", "reason"),
    [(3, DEEP, LOST), (990, DEEP, LOST), (990, '{"text" "b"}', LOST), (990, None, CUT)],
    ids=["deep", "deep at the end", "not JSON", "cut"],
)
def test_the_rest_of_an_array_is_not_lost_for_one_bad_document(
    tmp_path: Path, number: int, row: str | None, reason: str
) -> None:
    rows = [json.dumps({"text": f"text {k}"}) for k in range(1000)]
    whole = "[" + ", ".join([*rows[:number], row or "", *rows[number + 1 :]]) + "]"
    (tmp_path / "a.json").write_text(whole if row else whole[: whole.index(", ,")])
    options: Any = {"tokenizer": TOKENIZER, "options": {"join": "none"}}
    said = rf"a\.json:{number}: {reason}, and nothing says how many .*drops\.jsonl.* with --max-bad-fraction 1$"
    for fraction in (0.2, 0.99):
        with pytest.raises(UserError, match=said):
            preprocess("table", tmp_path / "a.json", tmp_path / "out", max_bad_fraction=fraction, **options)
    summary = preprocess("table", tmp_path / "a.json", tmp_path / "out", max_bad_fraction=1, **options)
    assert (summary.counts["documents"], summary.drops.bad_counts) == (number, {reason: 1})


def test_an_integer_that_python_refuses(tmp_path: Path) -> None:
    """As a float, which its row's text does not depend on; nothing else is lost."""
    rows = [json.dumps({"text": f"text {k}", "n": k}) for k in range(1000)]
    rows[3] = rows[3].replace("3}", "9" * 5000 + "}")
    found = list(array_rows(array_file(tmp_path, "[" + ",".join(rows) + "]"), drops := Drops()))
    assert [row["text"] for _, row in found] == [f"text {k}" for k in range(1000)]
    assert [row["n"] for _, row in found] == [0, 1, 2, float("inf"), *range(4, 1000)]
    assert drops == Drops()


@pytest.mark.parametrize("indent", [None, 0, 1])
def test_an_array_by_the_name_of_lines(tmp_path: Path, indent: int | None) -> None:
    for name in ("a.jsonl", "a.ndjson"):
        (tmp_path / name).write_text(json.dumps(ROWS, indent=indent))
        found, drops = documents_of(create("table", tmp_path / name, None, {"join": "none"}))
        assert plain(found) == [[row["text"]] for row in ROWS]
        assert drops == Drops()


@pytest.mark.parametrize("content", ["", "{}\n" * 200, "[1]\n[2]\n", "[" + "{}," * 200 + "{}]", "[]", "text\n"])
def test_json_without_columns_is_refused(tmp_path: Path, content: str) -> None:
    """None would be taken, and each row be bad."""
    (tmp_path / "a.jsonl").write_text(content)
    for options in ({}, {"join": "none"}, {"text_column": "text", "image_column": "image"}):
        with pytest.raises(UserError, match=r"a\.jsonl: no row that is a JSON object with keys is among its first 100"):
            create("table", tmp_path, None, options)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert create("table", tmp_path, None, {}).chosen


def test_an_array_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    raw = json.dumps([{"text": "x" * 1000, "image": f"{k}.png"} for k in range(4000)])
    unit = array_file(tmp_path, raw)
    tracemalloc.start()
    try:
        assert sum(1 for _ in array_rows(unit, Drops())) == 4000
        assert tracemalloc.get_traced_memory()[1] < len(raw) / 4
    finally:
        tracemalloc.stop()


def test_values_that_are_none(tmp_path: Path) -> None:
    """A key that a row lacks is null; the columns are those of any of the first rows."""
    (tmp_path / "0.png").write_bytes(picture(0))
    rows: list[Any] = [
        {"text": "no image"},
        {"image": "0.png", "text": "pair"},
        {"image": "0.png"},
        {"image": {"path": "0.png"}, "text": "struct"},
        {"image": ["0.png"], "text": "list"},
        {"image": True, "text": "true"},
        {"image": "0.png", "text": ["a", "b"]},
        {"image": 0, "text": 7},
        [1],
        "text",
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    found, drops = documents_of(create("table", tmp_path, None, {}))
    image = (picture(0), None, None)
    expected = [["no image"], [image, "pair"], [image, ""], ["struct"], ["list"], ["true"], [image, ""], [""]]
    assert plain(found) == expected
    assert [document.metadata["lost_images"] for document in found] == [int(row[0] != image) for row in expected]
    assert drops.bad_counts == {
        "image: no name": 4,
        "image: file missing": 1,
        "text: null": 1,
        "text: not a string": 2,
        "document: not a JSON object": 2,
        "document: not JSON": 1,
    }
    for content, message in (
        ('{"id": 1, "conversations": []}', "has no column of texts; it has id, conversations: name it with"),
        ('{"text": "a"}', r"no column of images; it has text: .* image_column=NAME, or, of texts alone, .*join=none"),
    ):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            create("table", tmp_path, None, {})


@pytest.mark.parametrize("url", ["url", "URL"])
def test_texts_alone(tmp_path: Path, url: str) -> None:
    """As FineWeb has them, whose `url` is a page's; C4's in JSON."""
    rows = [{"text": "one", url: "http://x/1"}, {"text": "two\n", url: "http://x/2"}]
    (tmp_path / "parquet").mkdir()
    (tmp_path / "json").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet/a.parquet")
    (tmp_path / "json/a.json.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for folder in ("parquet", "json"):
        importer = create("table", tmp_path / folder, None, {"join": "none"})
        found, drops = documents_of(importer)
        assert plain(found) == [["one"], ["two\n"]]
        assert [document.metadata for document in found] == [{"id": row[url], "lost_images": 0} for row in rows]
        assert (importer.kind, drops) == ("natural", Drops())
        preprocess("table", tmp_path / folder, out := tmp_path / f"out-{folder}", tokenizer=TOKENIZER,
                   options={"join": "none"})  # fmt: skip
        assert open_corpus(out).kinds == ("natural",)
    signature = create("table", tmp_path / "json", None, {"join": "none"}).signature()
    (tmp_path / "json/a.tar").write_bytes(b"no tar, and nobody needs it")
    assert create("table", tmp_path / "json", None, {"join": "none"}).signature() == signature
    for images, options in ((tmp_path, {}), (None, {"image_column": url})):
        with pytest.raises(UserError, match=r"--option join=none: the rows are read without images; leave out"):
            create("table", tmp_path / "parquet", images, {"join": "none", **options})
    with pytest.raises(UserError, match=r"--option join=no: give path, key, url or none"):
        create("table", tmp_path / "parquet", None, {"join": "no"})


def test_one_kind_of_files_of_a_folder(tmp_path: Path) -> None:
    """Those of a later kind, mostly something else, are counted; the signature, by which a corpus is known, is as if
    they were not there."""
    (tmp_path / "d").mkdir()
    for name, content in (
        ("d/z_stats.json", '{"count": 1}'),
        ("a_stats.json.gz", ""),
        ("rows.jsonl", LINES.decode()),
        ("d/more.ndjson", LINES.decode()),
        ("a.csv", "file_name,text\n0.png,a\n"),
        ("b.csv.xz", ""),
    ):
        (tmp_path / name).write_text(content)
    first = create("table", tmp_path, None, {})
    assert list(first.found.names) == ["a.csv"]  # type: ignore[attr-defined]
    _, drops = documents_of(first)
    not_read = "document: file that is compressed in a way that this format does not read: unpack it"
    assert drops.left_out_counts == {OTHERS: 4, not_read: 1}
    assert drops.names[OTHERS] == ["a_stats.json.gz"]
    for name in ("rows.jsonl", "a_stats.json.gz"):
        (tmp_path / name).unlink()
    assert create("table", tmp_path, None, {}).signature() == first.signature()
    (tmp_path / "a.csv").unlink()
    second = create("table", tmp_path, None, {})
    assert list(second.found.names) == ["d/more.ndjson"]  # type: ignore[attr-defined]
    assert documents_of(second)[1].left_out_counts == {OTHERS: 1, not_read: 1}


def test_other_files_do_not_matter_to_begun_work(tmp_path: Path) -> None:
    """They may come while it is unfinished, which work of earlier releases, that knew none, may be; and are counted
    once, whatever number of jobs and of halves there are."""
    folder = tmp_path / "in"
    folder.mkdir()
    for part in range(3):
        rows = "".join(f"{k}.png,text {k}\n" for k in range(4 * part, 4 * part + 4))
        (folder / f"{part:05}.csv").write_text("path,text\n" + rows)
    for k in range(12):
        (folder / f"{k}.png").write_bytes(picture(k))
    out, held = tmp_path / "out", tmp_path / "held"
    arguments: Any = {"held_out": held, "tokenizer": TOKENIZER, "task_bytes": 1, "held_out_fraction": 0.4}
    preprocess("table", folder, out, job=(0, 2), **arguments)
    assert not (out / "corpus.json").exists()
    (folder / "00000_stats.json").write_text("{}")
    (folder / "note.json").write_text("{}")
    preprocess("table", folder, out, job=(1, 2), **arguments)
    summary = preprocess("table", folder, out, job=(0, 2), **arguments)
    assert summary.drops.left_out_counts == {OTHERS: 2}
    assert summary.drops.names[OTHERS] == ["00000_stats.json"]
    assert summary.held_out is not None
    assert summary.counts["documents"] + summary.held_out.counts["documents"] == 12
    assert OTHERS not in summary.held_out.drops.left_out_counts
    trial = preprocess("table", folder, tmp_path / "trial", tokenizer=TOKENIZER, limit=3)
    assert (trial.counts["documents"], trial.drops.left_out_counts) == (3, {OTHERS: 2})


def test_lines_of_documents_by_other_names(tmp_path: Path) -> None:
    """`.ndjson`, `.json.gz`: read where there is no `.jsonl`, else counted."""
    raw = b'{"items": [{"text": "a"}]}\n'
    (tmp_path / "a.jsonl").write_bytes(raw)
    alone = create("jsonl", tmp_path, None, {}).signature()
    for name, content in (
        ("b.json.gz", gzip.compress(raw)),
        ("c.ndjson", raw),
        ("d.json.zst", zstandard.compress(raw)),
    ):
        (tmp_path / name).write_bytes(content)
    importer = create("jsonl", tmp_path, None, {})
    found, drops = documents_of(importer)
    assert (plain(found), drops.left_out_counts, importer.signature()) == ([["a"]], {OTHERS: 3}, alone)
    (tmp_path / "a.jsonl").unlink()
    assert list(create("jsonl", tmp_path, None, {}).found.names) == ["c.ndjson"]  # type: ignore[attr-defined]
    (tmp_path / "c.ndjson").unlink()
    found, drops = documents_of(create("jsonl", tmp_path, None, {}))
    assert (plain(found), drops) == ([["a"], ["a"]], Drops())


def test_what_is_taken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "a.jsonl").write_bytes(LINES[: LINES.index(b"\n")])
    preprocess("table", tmp_path / "a.jsonl", tmp_path / "out", tokenizer=TOKENIZER, progress=True)
    said = "images by the path in column file_name, texts of column text\n"
    assert f"a.jsonl: {said}" in capsys.readouterr().err
    preprocess(create("table", tmp_path / "a.jsonl", None, {}), None, tmp_path / "out2", tokenizer=TOKENIZER,
               progress=True)  # fmt: skip
    assert said in capsys.readouterr().err.splitlines(keepends=True)


def test_names_of_columns_that_are_a_file(tmp_path: Path) -> None:
    """Of JSON that is named like something else."""
    (tmp_path / "a.tsv").write_text(json.dumps(ROWS * 10))
    with pytest.raises(UserError) as raised:
        create("table", tmp_path / "a.tsv", None, {})
    assert len(str(raised.value)) < len(str(tmp_path)) + 200
