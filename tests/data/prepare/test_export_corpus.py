"""Protects a corpus's way back into JSON lines with tars, WebDataset and parquet: `preprocess` makes the same of it."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import writers
from data.helpers import TOKENIZER, contents, documents_of, plain, spaced
from data.writers import picture

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.corpus_manifest import read_manifest, write_manifest
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.tokenizer import ClipTokenizer
from megatron_lcl.data.prepare import export_corpus as export_module
from megatron_lcl.data.prepare.export_corpus import export_corpus
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

PAIRS = [Document((Image(picture(k, format=format)), Text(f"Text {k}\n é")), kind="pairs")
         for k, format in enumerate(("PNG", "JPEG", "WEBP", "PPM", "TIFF", "GIF", "PNG"))]  # fmt: skip
MIXED = [
    Document((Text("a"), Image(picture(1)), Text(" b\n"), Image(picture(2)))),
    *PAIRS[:3],
    Document((Text("only"),)),
    Document((Image(picture(1), "", 0.3, 1), Text("c"), Image(picture(4), "", -0.5, 0), Text("d")), kind="matched"),
]
CAPTIONS = [
    Document((Image(picture(1)), Text("first\n"), Text(" another"), Text("third é")), kind="captions"),
    Document((Image(picture(2, format="JPEG")), Text("alone")), kind="captions"),
]
STRING, IMAGE = {"dtype": "string", "_type": "Value"}, {"_type": "Image"}
STRINGS, IMAGES = {"feature": STRING, "_type": "List"}, {"feature": IMAGE, "_type": "List"}
"""features in a file's metadata, as `to_parquet` of datasets 5.2 writes them"""


def make(folder: Path, documents: list[Document], **options: object) -> Path:
    writers.write_jsonl(documents, folder / "in")
    preprocess("jsonl", folder / "in", folder / "corpus", tokenizer=TOKENIZER, **options)  # type: ignore[arg-type]
    return folder / "corpus"


def test_lines_and_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path, MIXED)
    assert main(["export-corpus", str(source), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path / 'out'}: 6 documents, 7 images"]
    export_corpus(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    preprocess("jsonl", tmp_path / "out", tmp_path / "back", tokenizer=source)
    first, back = open_corpus(source), open_corpus(tmp_path / "back")
    assert plain(list(back)) == plain(list(first))
    assert back.manifest["shards"] == first.manifest["shards"]
    same = [name for name in first.manifest["files"] if name.startswith(("tokens", "images"))]
    assert [back.manifest["files"][name] for name in same] == [first.manifest["files"][name] for name in same]
    assert back.name(0) == f"00000.jsonl@0 {first.name(0)}"


def test_webdataset_as_its_library_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = make(
        tmp_path, [*PAIRS, Document((Text("alone"),), kind="pairs"), Document((Image(picture(9)),), kind="pairs")]
    )
    exported = export_corpus(source, tmp_path / "out", "webdataset")
    assert (exported.documents, exported.without_image, exported.exact) == (8, 1, True)
    assert str(exported).splitlines() == [
        f"{tmp_path / 'out'}: 8 documents, 8 images",
        "  left out  1  documents without an image",
    ]
    samples = list(webdataset.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False, empty_check=False))
    assert [sample.get("txt") for sample in samples] == [*(d.texts[0].text.encode() for d in PAIRS), None]
    suffixes = ["png", "jpg", "webp", "ppm", "tif", "gif", "png"]
    assert [sample[suffix] for sample, suffix in zip(samples, suffixes, strict=False)] == [
        d.images[0].data for d in PAIRS
    ]
    assert json.loads(samples[0]["json"]) == {"id": open_corpus(source).name(0)}
    preprocess("webdataset", tmp_path / "out", tmp_path / "back", tokenizer=TOKENIZER)
    assert plain(list(open_corpus(tmp_path / "back"))) == [*plain(PAIRS), [(picture(9), None, None)]]


def test_interleaved_webdataset(tmp_path: Path) -> None:
    """As webdataset's own library groups it, and read back; an image is what its entry names."""
    webdataset = pytest.importorskip("webdataset")
    source = make(tmp_path, MIXED)
    exported = export_corpus(source, tmp_path / "out", "webdataset")
    assert (exported.documents, exported.images, exported.without_image) == (6, 7, 0)
    samples = list(webdataset.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False, empty_check=False))
    record = json.loads(samples[0]["json"])
    assert record["texts"] == ["a", None, " b\n", None]
    assert record["images"] == [None, "1.png", None, "3.png"]
    assert [samples[0][name] for name in record["images"] if name] == [picture(1), picture(2)]
    preprocess("mint1t", tmp_path / "out", tmp_path / "back", tokenizer=source)

    def items(documents: Iterable[Document]) -> list[list[object]]:
        return [[i.text if isinstance(i, Text) else i.data for i in d.items] for d in documents]

    assert items(open_corpus(tmp_path / "back")) == items(spaced(list(open_corpus(source)), " "))
    assert open_corpus(tmp_path / "back").name(0).endswith(open_corpus(source).name(0))
    with pytest.raises(UserError, match=r"no image in the sample, but lists texts and images; --format mint1t reads"):
        preprocess("webdataset", tmp_path / "out", tmp_path / "pairs", tokenizer=source)


@pytest.mark.parametrize("format", ["webdataset", "hf"])
def test_captions_stay_alternatives(tmp_path: Path, format: str) -> None:
    source = make(tmp_path, CAPTIONS)
    exported = export_corpus(source, tmp_path / "out", format)
    assert (exported.documents, exported.images, exported.lost) == (2, 2, ())
    preprocess(format, tmp_path / "out", tmp_path / "back", tokenizer=source, options={"captions": "captions"})
    back = open_corpus(tmp_path / "back")
    assert back.kinds == open_corpus(source).kinds == ("captions",)
    assert plain(list(back)) == plain(CAPTIONS)
    preprocess(format, tmp_path / "out", tmp_path / "pairs", tokenizer=source)
    assert plain(list(open_corpus(tmp_path / "pairs"))) == [d[:2] for d in plain(CAPTIONS)]


def test_captions_in_files(tmp_path: Path) -> None:
    source = make(tmp_path, CAPTIONS)
    for format in ("webdataset", "hf"):
        export_corpus(source, tmp_path / format, format)
    with tarfile.open(tmp_path / "webdataset/00000.tar") as archive:
        read = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    assert [read[f"00000000{k}.txt"] for k in (0, 1)] == [b"first\n", b"alone"]
    first, second = (json.loads(read[f"00000000{k}.json"]) for k in (0, 1))
    assert (first["captions"], "captions" in second) == ([" another", "third é"], False)
    rows = pq.read_table(tmp_path / "hf/00000.parquet", partitioning=None)
    assert features_of(rows) == {"id": STRING, "image": IMAGE, "text": STRING, "captions": STRINGS}
    assert rows["text"].to_pylist() == ["first\n", "alone"]
    assert rows["captions"].to_pylist() == [[" another", "third é"], []]


@pytest.mark.parametrize(("bound", "value"), [("GROUP_ROWS", 2), ("GROUP_BYTES", 2 * (len(picture(1)) + 6) + 100)])
def test_row_groups_of_parquet_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    source = make(tmp_path, [Document((Image(picture(k)), Text(f"text {k}")), kind="pairs") for k in range(5)])
    monkeypatch.setattr(export_module, bound, value)
    export_corpus(source, tmp_path / "out", "hf")
    with pq.ParquetFile(tmp_path / "out/00000.parquet") as file:
        assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [2, 2, 1]


@pytest.mark.parametrize("format", ["jsonl", "webdataset", "hf"])
def test_a_corpus_that_is_cut_is_not_exported(tmp_path: Path, format: str) -> None:
    source = make(tmp_path, PAIRS)
    (file,) = source.glob("images-*.bin")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 9)
    with pytest.raises(UserError, match=re.escape(file.name)):
        export_corpus(source, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_what_other_formats_do_not_say_is_said(tmp_path: Path) -> None:
    source = make(tmp_path, [*MIXED, *CAPTIONS])
    assert open_corpus(source).kinds == ("natural", "pairs", "matched", "captions")
    assert export_corpus(source, tmp_path / "jsonl").lost == ()
    for format in ("webdataset", "hf"):
        lines = str(export_corpus(source, tmp_path / format, format)).splitlines()[1:]
        assert lines == [
            "  noted  not in these files: which text an image is matched to, and its similarity; --format jsonl has it",
            "  noted  not in these files: which documents are captions and pairs, as others are interleaved; "
            "--format jsonl has it",
        ]


def features_of(table: pa.Table) -> dict[str, object]:
    return json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]  # type: ignore[no-any-return]


def test_pairs_as_parquet(tmp_path: Path) -> None:
    source = make(
        tmp_path, [*PAIRS, Document((Text("alone"),), kind="pairs"), Document((Image(picture(9)),), kind="pairs")]
    )
    exported = export_corpus(source, tmp_path / "out", "hf")
    assert (exported.documents, exported.images, exported.without_image) == (8, 8, 1)
    (file,) = (tmp_path / "out").iterdir()
    table = pq.read_table(file, partitioning=None)
    assert features_of(table) == {"id": STRING, "image": IMAGE, "text": STRING}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.remove_metadata() == pa.schema([("id", "string"), ("image", image), ("text", "string")])
    assert table["id"].to_pylist() == [open_corpus(source).name(i) for i in (*range(7), 8)]
    rows = table.to_pylist()
    assert [(row["image"]["bytes"], row["text"]) for row in rows] == [
        *((d.images[0].data, d.texts[0].text) for d in PAIRS),
        (picture(9), ""),
    ]
    suffixes = ["png", "jpg", "webp", "ppm", "tif", "gif", "png", "png"]
    assert [row["image"]["path"].split(".")[1] for row in rows] == suffixes
    preprocess("hf", tmp_path / "out", tmp_path / "back", tokenizer=source)
    back = open_corpus(tmp_path / "back")
    assert plain(list(back)) == [*plain(PAIRS), [(picture(9), None, None)]]
    assert back.kinds == ("pairs",)


def test_interleaved_documents_as_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups end before they would be larger than the bound, but for a document that alone is larger."""
    monkeypatch.setattr(export_module, "GROUP_BYTES", 9000)
    large, one, two = (picture(1, 80, 80), picture(2), picture(3))
    assert len(large) > 9000 > len(one + two + b"d") > 6000
    documents = [
        Document((Text("a"), Image(one), Text(" b\n"), Image(two))),
        Document((Text("c"),)),
        Document((Image(large), Image(two), Text("d"), Text("e"))),
        Document((Image(one), Image(two), Text("d"))),
    ]
    source = make(tmp_path, documents, shard_documents=3)
    exported = export_corpus(source, tmp_path / "out", "hf")
    assert (exported.documents, exported.images, exported.without_image, exported.lost) == (4, 6, 0, ())
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["00000.parquet", "00001.parquet"]
    with pq.ParquetFile(files[0]) as first:
        groups = [first.metadata.row_group(k).num_rows for k in range(first.num_row_groups)]
        assert groups == [2, 1]
    tables = [pq.read_table(file, partitioning=None) for file in files]
    assert features_of(tables[1]) == {"id": STRING, "images": IMAGES, "texts": STRINGS}
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["texts"] for row in rows] == [
        ["a", None, " b\n", None],
        ["c"],
        [None, None, "d", "e"],
        [None, None, "d"],
    ]
    assert [[image and image["bytes"] for image in row["images"]] for row in rows] == [
        [None, one, None, two], [None], [large, two, None, None], [one, two, None],
    ]  # fmt: skip
    preprocess("hf", tmp_path / "out", tmp_path / "back", tokenizer=source)
    back = open_corpus(tmp_path / "back")
    assert plain(list(back)) == plain(spaced(documents, " "))
    assert back.name(3).endswith(open_corpus(source).name(3))
    with pytest.raises(UserError, match=r"--option captions: .* has lists of images in its column images"):
        preprocess("hf", tmp_path / "out", tmp_path / "no", tokenizer=source, options={"captions": "texts"})
    with pytest.raises(UserError, match=r"--option captions=none: .* has no such column; it has id, images, texts"):
        preprocess("hf", tmp_path / "out", tmp_path / "no", tokenizer=source, options={"captions": "none"})


def test_an_interleaved_webdataset_without_an_image(tmp_path: Path) -> None:
    lists = {"texts": ["a", None, None, "b"], "images": [None, "0.PNG", "__key__", None]}
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, data in {"k.0.png": picture(1), "k.json": json.dumps(lists).encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    summary = preprocess("mint1t", tmp_path / "in.tar", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    assert "no file of this name in the tar" in str(summary)
    assert re.search(r"out: 1 document, \d tokens, 1 image \(1 distinct", str(summary))
    (document,) = open_corpus(tmp_path / "out")
    assert [image.data for image in document.images] == [picture(1)]
    assert [text.text for text in document.texts] == ["a", " b"]


def test_what_is_refused_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "a", MIXED)
    several = make(tmp_path / "b", [*PAIRS, Document((Text("x"), Image(picture(1)), Text("y")), kind="pairs")])
    pair = Document((Image(picture(1)), Image(picture(2)), Text("y")), kind="pairs")
    two = make(tmp_path / "c", [*PAIRS, pair], shard_documents=5)
    for corpus, format, message in (
        (two, "webdataset", "document 7 of .* has 2 images and 1 texts, but is of kind pairs"),
        (two, "hf", "document 7 of .* has 2 images and 1 texts, but is of kind pairs"),
        (several, "webdataset", "document 7 of .* has 1 images and 2 texts"),
        (several, "hf", "document 7 of .* has 1 images and 2 texts, but is of kind pairs"),
        (several, "parquet", "--format parquet: a corpus is exported as jsonl, webdataset or hf"),
    ):
        with pytest.raises(UserError, match=message):
            export_corpus(corpus, tmp_path / "out", format)
    assert main(["export-corpus", str(source), "--output", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"megatron-lcl export-corpus: {tmp_path / 'a'} is not empty; give a new folder"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("format", ["jsonl", "webdataset", "hf"])
def test_documents_that_have_no_names(tmp_path: Path, format: str) -> None:
    """As of an earlier release; all are there."""
    source = make(tmp_path, PAIRS)
    manifest = {key: value for key, value in read_manifest(source).items() if key != "fingerprint"}
    manifest["files"] = {name: info for name, info in manifest["files"].items() if not name.startswith("names-")}
    for file in source.glob("names-*"):
        file.unlink()
    write_manifest(source, manifest)
    assert export_corpus(source, tmp_path / "out", format).documents == len(PAIRS)
    for file in () if format == "hf" else (tmp_path / "out").iterdir():
        assert b'"id"' not in file.read_bytes()
    importer = create(format, tmp_path / "out", None, {})
    found, drops = documents_of(importer)
    assert (plain(found), drops) == (plain(PAIRS), Drops())
    assert [document.metadata.get("id") for document in found] == [None] * len(PAIRS)


def test_texts_alone_are_one_file(tmp_path: Path) -> None:
    exported = export_corpus(make(tmp_path, [Document((Text("a"),))]), tmp_path / "out")
    assert str(exported).endswith("out: 1 document, 0 images")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["00000.jsonl"]


def test_texts_that_were_changed_are_said_to_be(tmp_path: Path) -> None:
    writers.write_jsonl([Document((Text("Upper"),))], tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "corpus", tokenizer=ClipTokenizer([]))
    exported = export_corpus(tmp_path / "corpus", tmp_path / "out")
    assert not exported.exact
    assert "not as they were" in str(exported)
    assert '"upper"' in (tmp_path / "out/00000.jsonl").read_text()


@pytest.mark.parametrize("format", ["jsonl", "webdataset", "hf"])
def test_many_shards_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """Files are read in the order of their names; a corpus may have more shards than five digits count."""
    monkeypatch.setattr(export_module, "_DIGITS", 1)
    documents = [Document((Text(f"text {k}"), Image(picture(k % 3)))) for k in range(12)]
    source = make(tmp_path, documents, shard_documents=1)
    export_corpus(source, tmp_path / "out", format)
    names = {file.stem for file in (tmp_path / "out").iterdir()}
    assert names == {f"{number:02d}" for number in range(12)}
    read_as = {"webdataset": "mint1t"}.get(format, format)
    found, _ = documents_of(create(read_as, tmp_path / "out", None, {}))
    assert [text.text for document in found for text in document.texts] == [f"text {k}" for k in range(12)]
