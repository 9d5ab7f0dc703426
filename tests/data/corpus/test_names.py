"""Protects the names of sources: every document of a corpus says where it came from, and is found by a part of it."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import writers
from data.helpers import TOKENIZER
from data.writers import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.data.corpus.names import BLOCK, MAX_BYTES, Names, NamesWriter
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus, ShardWriter, open_corpus
from megatron_lcl.data.pages.inspect import write_page
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

PAIRS = [Document((Image(picture(k)), Text(f"text {k}"))) for k in range(4)]


def written(path: Path, names: list[str]) -> Names:
    writer = NamesWriter(path)
    writer.extend(names)
    info = writer.finish()
    assert info["size"] == path.stat().st_size
    return Names(path, len(names))


alike = st.text(st.sampled_from("ab/é@\n\0\x0a\ud800"), max_size=6)


@settings(max_examples=60)
@given(st.lists(alike, max_size=12))
def test_names_come_back(tmp_path_factory: pytest.TempPathFactory, given_names: list[str]) -> None:
    names = written(tmp_path_factory.mktemp("names") / "names", given_names)
    expected = [name.encode(errors="backslashreplace").decode().replace("\n", "\\n") for name in given_names]
    assert [names[i] for i in range(len(names))] == expected
    names.check()
    for part in ("a", "é@", "ab/"):
        assert list(names.find(part)) == [i for i, name in enumerate(expected) if part in name]


def test_many_names_in_blocks(tmp_path: Path) -> None:
    given_names = [f"folder/part-{k // 1000}.jsonl@{k * 977}" for k in range(2 * BLOCK + 100)]
    given_names[BLOCK - 1 : BLOCK + 2] = ["x" * 300, "x" * 300 + "y", "é" * MAX_BYTES]
    names = written(tmp_path / "names", given_names)
    wanted = [BLOCK - 1, BLOCK, 0, 2 * BLOCK + 99]
    assert [names[i] for i in wanted] == [given_names[i] for i in wanted]
    assert names[BLOCK + 1] == "é" * (MAX_BYTES // 2)  # longer ones are cut, and not within a character
    assert (
        list(names.find("part-2.jsonl@19"))
        == [i for i, name in enumerate(given_names) if "part-2.jsonl@19" in name]
        != []
    )
    assert (tmp_path / "names").stat().st_size < 10 * len(given_names)


def test_the_format_as_it_is_documented(tmp_path: Path) -> None:
    written(tmp_path / "names", ["a.jsonl@0", "a.jsonl@97", ""])
    entries = b"\x00a.jsonl@0\n" + b"\x0897\n" + b"\x00\n"
    assert (tmp_path / "names").read_bytes() == entries + struct.pack("<2q", 0, len(entries))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-8], lambda raw: b"\x01" + raw[1:], lambda raw: raw[:5] + raw[6:],
                                    lambda raw: raw.replace(b"\n", b" "), lambda raw: raw.replace(b"b", b"\xff"),
                                    lambda raw: b""])  # fmt: skip
def test_damaged_names_are_found(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    written(tmp_path / "names", ["abc", "abd"])
    (tmp_path / "names").write_bytes(damage((tmp_path / "names").read_bytes()))
    with pytest.raises(UserError, match="is damaged: not the names of 2 documents"):
        Names(tmp_path / "names", 2).check()


# --- what each importer calls its documents ----------------------------------------------------------------------


def names_of(corpus: Path) -> list[str]:
    opened = open_corpus(corpus)
    assert verify(corpus, quick=True) == []
    return [opened.name(i) for i in range(len(opened))]


def jsonl(folder: Path) -> list[str]:
    lines = ['{"items": [{"text": "a"}], "url": "http://x/1"}', '{"items": [{"text": "b", "c": 1}], "id": 7}',
             '{"items": [{"text": "c"}]}']  # fmt: skip
    for sub in ("one", "two"):
        (folder / sub).mkdir(parents=True)
        (folder / sub / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    starts = [0, len(lines[0]) + 1, len(lines[0]) + len(lines[1]) + 2]
    marks = [" http://x/1", " 7", ""]
    plain = [f"{sub}/a.jsonl@{start}{mark}" for sub in ("one", "two")
             for start, mark in zip(starts, marks, strict=True)]  # fmt: skip
    return [f"b.jsonl.gz:{k + 1}{mark}" for k, mark in enumerate(marks)] + plain


def mmc4(folder: Path) -> list[str]:
    (folder / "s").mkdir(parents=True)
    page = {"text_list": ["a"], "image_info": [], "url": "http://x/é"}
    (folder / "s/docs_shard_3_v2.jsonl").write_text(json.dumps(page))
    return ["s/docs_shard_3_v2.jsonl@0 http://x/é"]


def obelics(folder: Path) -> list[str]:
    (folder / "s").mkdir(parents=True)
    rows = [{"images": [None], "texts": [f"t{k}"], "general_metadata": json.dumps({"url": f"u{k}"})} for k in range(3)]
    rows[2]["general_metadata"] = "no JSON"
    pq.write_table(pa.Table.from_pylist(rows), folder / "s/a.parquet", row_group_size=2)
    return ["s/a.parquet:0 u0", "s/a.parquet:1 u1", "s/a.parquet:2"]


def omnicorpus(folder: Path) -> list[str]:
    writers.write_parquet([Document((Text("a"),))], folder, folder / "images", structs=True)
    return ["train-00000.parquet:0 http://page"]


def webdataset(folder: Path) -> list[str]:
    writers.write_webdataset(PAIRS[:2], folder / "s")
    return ["s/00000.tar:000000000", "s/00001.tar:000000000"]


def mint1t(folder: Path) -> list[str]:
    writers.write_mint1t(PAIRS[:2], folder)
    return ["00000.tar:000000", "00000.tar:000001"]


def html(folder: Path) -> list[str]:
    (folder / "s").mkdir(parents=True)
    (folder / "s/a.png").write_bytes(picture(0, 80, 70))
    words = "<p>" + "word " * 700
    (folder / "s/p.html").write_text(f"<img src=a.png>{words}<h2>x</h2>{words}")
    (folder / "a.html").write_text("<p>one<img src=s/a.png>")
    return ["a.html", "s/p.html#0", "s/p.html#1"]


@pytest.mark.parametrize("write", [jsonl, mmc4, obelics, omnicorpus, webdataset, mint1t, html])
def test_what_documents_are_called_wherever_the_input_lies(tmp_path: Path, write: Callable[[Path], list[str]]) -> None:
    expected = write(tmp_path / "here/in")
    assert len(set(expected)) == len(expected)
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere/below")
    for place in ("here", "elsewhere/below"):
        preprocess(write.__name__, tmp_path / place / "in", tmp_path / place / "out", tokenizer=TOKENIZER)
        assert names_of(tmp_path / place / "out") == expected
    files = [(tmp_path / place / "out/names-00000.bin").read_bytes() for place in ("here", "elsewhere/below")]
    assert files[0] == files[1]


# --- where they are kept -----------------------------------------------------------------------------------------


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[Corpus, Corpus]:
    """One of pairs in two shards, and one of an earlier release, which has no names."""
    writers.write_webdataset(PAIRS, tmp_path / "in")
    preprocess("webdataset", tmp_path / "in", tmp_path / "new", tokenizer="clip", task_bytes=1)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    manifest = json.loads((tmp_path / "old/corpus.json").read_text())
    for file in (tmp_path / "old").glob("names-*"):
        file.unlink()
        del manifest["files"][file.name]
    del manifest["drops"]["samples"]
    (tmp_path / "old/corpus.json").write_text(json.dumps(manifest))
    return open_corpus(tmp_path / "new"), open_corpus(tmp_path / "old")


def test_corpora_of_earlier_releases_open_verify_and_merge(corpora: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    new, old = corpora
    assert verify(old.path) == verify(new.path) == []
    assert (old.name(0), old[0].name, new[0].name) == ("", "shard 0, document 0", "00000.tar:000000000")
    assert [d.items for d in old] == [d.items for d in new]
    merge([old.path, new.path], tmp_path / "both")
    assert names_of(tmp_path / "both") == [""] * 4 + names_of(new.path)
    assert list(open_corpus(tmp_path / "both").find("00001.tar")) == [6, 7]


def test_verify_reads_the_names(corpora: tuple[Corpus, Corpus]) -> None:
    new, _ = corpora
    file = new.path / "names-00001.bin"
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"tar", b"t\nr"))
    info = {"size": len(raw), "xxh3": ""}
    assert any("names-00001.bin: its XXH3" in fault for fault in verify(new.path, quick=True))
    manifest = json.loads((new.path / "corpus.json").read_text())
    manifest["files"][file.name] = {**info, "xxh3": hash_file(file)}
    (new.path / "corpus.json").write_text(json.dumps(manifest))
    assert verify(new.path, quick=True) == [f"{file} is damaged: not the names of 2 documents"]


def test_held_out_documents_keep_their_names(tmp_path: Path) -> None:
    writers.write_jsonl([Document((Image(picture(k)), Text(f"text {k}"))) for k in range(8)], tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "all", tokenizer=TOKENIZER)
    expected = {document.texts[0].text: open_corpus(tmp_path / "all").name(i)
                for i, document in enumerate(open_corpus(tmp_path / "all"))}  # fmt: skip
    preprocess("jsonl", tmp_path / "in", tmp_path / "t", tokenizer=TOKENIZER, held_out=tmp_path / "h")
    both = [*open_corpus(tmp_path / "t"), *open_corpus(tmp_path / "h")]
    assert {document.texts[0].text: document.name for document in both} == expected


def test_inspect_finds_a_source(
    corpora: tuple[Corpus, Corpus], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = (str(corpus.path) for corpus in corpora)

    def inspect(*arguments: str) -> tuple[int, str]:
        code = main(["inspect", *arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    assert inspect(new, "--source", "00001.tar")[1].splitlines() == [
        "2  00001.tar:000000000", "3  00001.tar:000000001", "2 documents",
        f"`megatron-lcl inspect {new} show N` shows one",
    ]  # fmt: skip
    code, out = inspect(new, "--source", "00001.tar:000000001")  # one alone is shown
    assert (code, out) == inspect(new, "show", "3")
    assert "document 3 of 4" in out
    assert "source: 00001.tar:000000001" in out
    code, out = inspect(new, "--source", "nowhere")
    assert (code, "no document" in out, "00000.tar:000000000" in out) == (2, True, True)
    code, out = inspect(old, "--source", "00001.tar")
    assert (code, "an earlier release" in out) == (2, True)
    assert inspect(new, "show", "3", "--source", "x")[0] == inspect(new, "--json", "--source", "x")[0] == 2
    assert inspect(new, "--source", "00001.tar", "--html", str(tmp_path / "page.html"))[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "00001.tar:000000001" in page
    assert "00000.tar:000000001" not in page
    write_page(open_corpus(new), tmp_path / "page.html")
    assert "00000.tar:000000001" in (tmp_path / "page.html").read_text()
    write_page(open_corpus(old), tmp_path / "page.html")
    assert "Document 3" in (tmp_path / "page.html").read_text()


def test_a_writer_that_is_given_no_names(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0)
    for k in range(2):
        writer.add_texts([k.to_bytes(4, "little")])
        writer.end_document()
    writer.finish()
    names = Shard(tmp_path, 0).names
    assert names is not None
    assert [names[k] for k in range(2)] == ["", ""]
