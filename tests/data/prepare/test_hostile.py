"""Protects against hostile input: it is counted, in bounded memory, and no code of it runs."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data import writers
from data.helpers import TOKENIZER, corpus_of, documents_of, encoded, plain
from data.prepare.test_epub import shown, write_book
from data.writers import picture
from PIL import Image as Pillow

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import MAX_PIXELS, BadImage, probe
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.fetch.urls import read_urls, url_files
from megatron_lcl.data.loading.images import decode_eval
from megatron_lcl.data.prepare import preprocess_task
from megatron_lcl.data.prepare.importers import create, mint1t, row_groups
from megatron_lcl.data.prepare.importers.files import MAX_FILE
from megatron_lcl.data.prepare.importers.html_page import parse_page
from megatron_lcl.data.prepare.importers.sources import ImageSource
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    summary = corpus_of(tmp_path, [{"items": [{"text": "a"}, {"image": "\ud800.png"}]}], {})
    (tmp_path / "in" / os.fsdecode(b"b\xff.jsonl")).write_bytes(b'{"items": 3}')
    summary = preprocess("jsonl", tmp_path / "in", tmp_path / "o2", tokenizer=TOKENIZER, max_bad_fraction=1)
    str(summary).encode()
    assert summary.drops.names["image: file missing"] == ["a.jsonl:1: \\ud800.png"]
    assert summary.drops.names['document: no list "items"'] == ["b\\udcff.jsonl:1"]
    assert not verify(tmp_path / "o2")


def test_pictures_run_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to Ghostscript, where that is installed."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n"
    with pytest.raises(BadImage, match="format that cannot be read"):
        probe(eps)
    with pytest.raises(BadImage, match="does not decode"):
        decode_eval(eps, 32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("side", [9_500, 13_000])
def test_more_pixels_than_fit_in_memory(side: int) -> None:
    """Ours is the lower bound: Pillow raises above twice as many."""
    assert MAX_PIXELS < side * side < 2 * MAX_PIXELS
    with pytest.raises(BadImage, match="too many pixels"):
        probe(encoded(Pillow.new("1", (side, side)), "PNG"))


def peak_mib(source: Path, output: Path, format: str = "jsonl", **options: object) -> float:
    """Of a process that preprocesses `source`."""
    TOKENIZER.save(output.with_suffix(".model"))
    program = (
        "import re; from megatron_lcl.data.prepare.preprocess import preprocess\n"
        f"preprocess({format!r}, {str(source)!r}, {str(output)!r}, tokenizer={str(output.with_suffix('.model'))!r}, "
        f"**{options!r})\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024)"
    )  # not ru_maxrss, which begins with this process's
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout)


def test_a_small_file_that_unpacks_to_much(tmp_path: Path) -> None:
    line = json.dumps({"items": [{"text": "x" * 1000}] * 990}).encode() + b"\n"
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    packed = b"".join(compressor.compress(line) for _ in range(150)) + compressor.flush()
    (tmp_path / "in.jsonl.zst").write_bytes(packed)
    assert len(packed) < 64 << 10  # one read of the file, of which all would come at once
    assert 150 * len(line) > 140e6
    assert peak_mib(tmp_path / "in.jsonl.zst", tmp_path / "out") < 200
    assert open_corpus(tmp_path / "out").manifest["counts"]["pieces"] == 150 * 990


BIG = 100 << 20


def add_bomb(archive: zipfile.ZipFile, name: str, method: int) -> None:
    """A member of BIG zeros."""
    member = zipfile.ZipInfo(name)
    member.compress_type = method
    with archive.open(member, "w") as opened:
        for _ in range(BIG >> 20):
            opened.write(bytes(1 << 20))


def say_less(file: Path) -> None:
    """In a zip file's headers, that BIG bytes are 100."""
    raw = file.read_bytes()
    assert raw.count(struct.pack("<L", BIG)) == 2
    file.write_bytes(raw.replace(struct.pack("<L", BIG), struct.pack("<L", 100)))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_zip_members_larger_than_they_say(method: int, tmp_path: Path) -> None:
    write_book(tmp_path / "in/a.epub")
    page = "OEBPS/text/two.xhtml"
    with zipfile.ZipFile(tmp_path / "in/a.epub") as whole, zipfile.ZipFile(tmp_path / "in/b.epub", "w") as book:
        for name in whole.namelist():
            if name != page:
                book.writestr(name, whole.read(name))
        add_bomb(book, page, method)
    say_less(tmp_path / "in/b.epub")
    (tmp_path / "in/a.epub").unlink()
    assert peak_mib(tmp_path / "in", tmp_path / "out", "epub", max_bad_fraction=1) < 220
    assert plain(list(open_corpus(tmp_path / "out"))) == [[*shown(0)[0][:-1], "\nAfter."]]
    assert open_corpus(tmp_path / "out").manifest["drops"]["bad"] == {"document: page that cannot be read": 1}

    with zipfile.ZipFile(tmp_path / "0.jsonl.zip", "w") as lines:
        lines.writestr("0", json.dumps({"items": [{"text": "a"}]}))
        add_bomb(lines, "1", method)
    say_less(tmp_path / "0.jsonl.zip")
    assert peak_mib(tmp_path / "0.jsonl.zip", tmp_path / "o2", max_bad_fraction=1) < 220
    assert open_corpus(tmp_path / "o2").manifest["counts"]["documents"] == 1


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("damaged", [True, False])
def test_zip_methods_that_are_not_read(damaged: bool, method: int, tmp_path: Path) -> None:
    """What Python's `zipfile` unpacks of them has no bound; EPUB allows neither."""
    write_book(tmp_path / "in/a.epub")
    page, text = "OEBPS/text/two.xhtml", b"".join(b"%d" % k for k in range(1000))
    with zipfile.ZipFile(tmp_path / "in/a.epub") as whole, zipfile.ZipFile(tmp_path / "in/b.epub", "w") as book:
        for name in whole.namelist():
            book.writestr(name, text if name == page else whole.read(name), method if name == page else None)
    with zipfile.ZipFile(tmp_path / "in/0.jsonl.zip", "w") as lines:
        lines.writestr("0", text, method)
        lines.writestr("1", json.dumps({"items": [{"text": "a"}]}))
    for file, member in (("in/b.epub", page), ("in/0.jsonl.zip", "0")) if damaged else ():
        raw = bytearray((tmp_path / file).read_bytes())
        with zipfile.ZipFile(tmp_path / file) as archive:
            at = archive.getinfo(member).header_offset + 30 + len(member) + 9  # behind the properties of LZMA
        raw[at : at + 300] = b"\xff" * 300
        (tmp_path / file).write_bytes(raw)
    (tmp_path / "in/a.epub").unlink()
    found, drops = documents_of(create("epub", tmp_path / "in", None, {}))
    assert plain(found) == [shown(0)[0]]
    assert drops.bad_counts == {"document: page that cannot be read": 1}
    found, drops = documents_of(create("jsonl", tmp_path / "in", None, {}))
    assert plain(found) == [["a"]]
    assert drops.bad_counts == {"document: zip method not known": 1}


def test_a_zip_member_without_a_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "0.jsonl.zip", "w") as lines:
        lines.writestr(zipfile.ZipInfo("folder/"), b"")
        lines.writestr(zipfile.ZipInfo(""), json.dumps({"items": [{"text": "a"}]}))
    found, drops = documents_of(create("jsonl", tmp_path, None, {}))
    assert (plain(found), drops.bad_counts, drops.noted_counts) == ([["a"]], {}, {})


def test_a_small_tar_that_unpacks_to_much(tmp_path: Path) -> None:
    """Of a sample that holds a film, say, the rest is read."""
    peaks = []
    for name, size in (("little", 512), ("out", MAX_FILE + 512)):
        with gzip.open(tmp_path / "0.tar.gz", "wb", 1) as file, tarfile.open(fileobj=file, mode="w:") as archive:
            writers._add(archive, "0.png", picture(0))
            member = tarfile.TarInfo("0.mp4")
            member.size = size
            with open("/dev/zero", "rb") as zeros:
                archive.addfile(member, zeros)
            writers._add(archive, "0.txt", b"a")
        peaks.append(peak_mib(tmp_path / "0.tar.gz", tmp_path / name, "webdataset"))
    assert peaks[1] - peaks[0] < 100
    assert plain(list(open_corpus(tmp_path / "out"))) == [[(picture(0), None, None), "a"]]
    drops = open_corpus(tmp_path / "out").manifest["drops"]
    assert (drops["bad"], drops["left_out"]) == ({}, {"document: file over 256 MiB in a tar": 1})


@pytest.mark.parametrize("mode", ["RGB", "I;16", "I"])
def test_the_largest_picture_is_scaled_down_in_600_mib(tmp_path: Path, mode: str) -> None:
    (tmp_path / "in").mkdir()
    big = Pillow.new(mode, (9_450, 9_450), 40_000 if mode != "RGB" else "red")
    if mode == "I":
        big.save(tmp_path / "in/big.png", "TIFF", compression="tiff_adobe_deflate")
    else:
        big.save(tmp_path / "in/big.png")
    (tmp_path / "in/a.jsonl").write_text(json.dumps({"items": [{"image": "big.png"}]}))
    assert peak_mib(tmp_path / "in", tmp_path / "out", max_image_side=64) < 600
    ((small,),) = (document.images for document in open_corpus(tmp_path / "out"))
    with Pillow.open(io.BytesIO(small.data)) as image:
        assert image.size == (64, 64)
        pixel = image.convert("RGB").getpixel((32, 32))
    level = round(40_000 / 257)
    assert pixel == pytest.approx((254, 0, 0) if mode == "RGB" else (level, level, level), abs=2)


def test_a_similarity_that_float32_cannot_hold(tmp_path: Path) -> None:
    items = [
        {"text": "a"},
        *({"image": "a.png", "similarity": s, "matched_text_index": 0} for s in (1e39, -1e39, 3e38)),
    ]
    summary = corpus_of(tmp_path, [{"items": items}], {"a.png": picture(0)})
    assert summary.drops.bad_counts == {"image: similarity is not a number": 2}
    assert not verify(tmp_path / "out")


def test_a_tar_whose_sizes_are_negative(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        writers._add(archive, "0.png", picture(0))
        header = tarfile.TarInfo("1.png")
        header.size = -512
        writers.add_header(archive, header)
        writers._add(archive, "2.png", picture(2))
    source = ImageSource(tmp_path)
    assert source.read("0.png") == picture(0)
    with pytest.raises(BadImage, match=r"file missing, and 0\.tar is damaged or cut"):
        source.read("2.png")


def test_frames_that_no_position_has(tmp_path: Path) -> None:
    tiff = encoded(Pillow.new("RGB", (8, 8)), "TIFF", save_all=True, append_images=[Pillow.new("RGB", (8, 8))] * 2)
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        writers._add(archive, "0.json", json.dumps({"texts": ["a", "b"], "images": [None, None]}).encode())
        writers._add(archive, "0.tiff", tiff)
        writers._add(archive, "1.json", json.dumps({"texts": ["c"], "images": [None]}).encode())
        writers._add(archive, "1.tiff", b"garbage")
    summary = preprocess("mint1t", tmp_path / "0.tar", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    assert summary.drops.bad_counts == {
        "image: TIFF with another number of frames": 3,
        "image: no TIFF, or not readable": 1,
    }
    assert summary.counts["pieces"] == 3


def test_more_frames_than_a_document_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mint1t, "MAX_FRAMES", 3)
    frames = [Pillow.new("RGB", (8, 8))] * 4
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in (3, 4):
            record = {"texts": [None] * number, "images": ["x"] * number}
            writers._add(archive, f"{number}.json", json.dumps(record).encode())
            tiff = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:number])
            writers._add(archive, f"{number}.tiff", tiff)
    found, drops = documents_of(create("mint1t", tmp_path / "0.tar", None, {}))
    assert [len(document.images) for document in found] == [3, 0]
    assert drops.bad_counts == {"image: no TIFF, or not readable": 4}


def test_a_book_whose_spine_names_a_page_again(tmp_path: Path) -> None:
    """EPUB forbids it; a book of some kilobytes would be read for hours."""
    write_book(tmp_path / "in/a.epub")
    importer = create("epub", tmp_path / "in", None, {})
    opf = "OEBPS/content.opf"
    with zipfile.ZipFile(tmp_path / "in/a.epub") as whole, zipfile.ZipFile(tmp_path / "in/b.epub", "w") as book:
        for name in whole.namelist():
            again = b'<itemref idref="a"/>' * (1 + 5 * (name == opf))
            book.writestr(name, whole.read(name).replace(b'<itemref idref="a"/>', again))
    (tmp_path / "in/a.epub").unlink()
    again = create("epub", tmp_path / "in", None, {})
    assert [page.replace("b.epub", "a.epub") for page in again.pages] == [*importer.pages]


def test_pages_whose_reading_takes_the_square_of_their_length() -> None:
    """Elements that are looked up, and lists in lists; by another way each takes half a minute and more."""
    mains = "<main>a</main>" * 48_000 + "<p>b</p>" * 48_000
    lists = "<ul><li>" * 800 + "some words of no link<a href=x>a</a>" * 5_000
    start = time.process_time()
    for body in (mains, lists):
        assert parse_page(f"<html><body>{body}", "a.html").events
    assert time.process_time() - start < 10


@pytest.mark.timeout(60)
@pytest.mark.parametrize("format", ["html", "jsonl"])
def test_images_that_are_no_plain_files(format: str, tmp_path: Path) -> None:
    """A film beside a page, a device that has no end, a pipe into which nobody writes."""
    names = ("film.mp4", "zero.png", "pipe.png", "folder.png", "0.png")
    (tmp_path / "0.png").write_bytes(picture(0, 90, 80))
    with (tmp_path / "film.mp4").open("wb") as film:
        film.truncate(MAX_FILE + 1)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a.html").write_text("<p>a</p>" + "".join(f"<img src={name}>" for name in names))
    (tmp_path / "a.jsonl").write_text(json.dumps({"items": [{"text": "a"}, *({"image": name} for name in names)]}))
    found, drops = documents_of(create(format, tmp_path, None, {}))
    assert plain(found) == [["a", (picture(0, 90, 80), None, None)]]
    assert drops.bad_counts == {"image: over 256 MiB": 1, "image: file missing": 3}


def test_a_page_of_more_than_may_be_read(tmp_path: Path) -> None:
    with (tmp_path / "a.html").open("wb") as page:
        page.truncate(MAX_FILE + 1)
    (tmp_path / "b.md").write_text("b")
    found, drops = documents_of(create("html", tmp_path, None, {}))
    assert (found, drops.bad_counts) == ([], {"document: page that cannot be read": 1})


def test_values_that_a_parquet_file_has_once_for_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte of a file of 1 kB, where all rows of a batch have a copy."""
    monkeypatch.setattr(row_groups, "_BATCH_BYTES", 1 << 20)
    value, rows, file = "http://a.example/" + "x" * 100_000, 200, tmp_path / "a.parquet"
    columns = {
        "url": pa.array([value] * rows),
        "images": pa.array([[value, None, value]] * rows),
        "image": pa.array([{"bytes": value.encode(), "path": None}] * rows),
        "few": pa.array(["b"] * rows),
    }
    pq.write_table(pa.table(columns), file, row_group_size=150)
    assert file.stat().st_size < 40_000
    with row_groups.open_parquet(file) as source:
        for name, column in columns.items():
            found = list(row_groups.batches(file, source, range(2), [name], 64))
            assert max(batch.nbytes for batch in found) < 1.2 * (1 << 20), name
            assert [value for batch in found for value in batch.column(0).to_pylist()] == column.to_pylist()
        assert len(found) == 4
        assert len(list(row_groups.read_rows(file, source, range(2), 0, ["url", "few"]))) == rows
    lists = list(read_urls(url_files(file), None, Drops()))
    assert max(map(len, lists)) <= 10
    assert sum(map(len, lists)) == 2 * rows


def test_a_parquet_file_that_has_a_column_twice(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lists = pa.array([["a"]])
    pq.write_table(pa.Table.from_arrays([lists, lists, lists], ["images", "texts", "texts"]), tmp_path / "in/a.parquet")
    good = pa.table({"images": [[None]], "texts": [["t"]]})
    pq.write_table(good, tmp_path / "in/b.parquet")
    summary = preprocess("obelics", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    assert summary.drops.bad_counts == {"document: column texts twice; it has images, texts, texts": 1}
    assert summary.counts["documents"] == 1


@pytest.mark.parametrize("name", ["A.JSONL.ZST", "A.JSONL"])
def test_suffixes_in_capitals(tmp_path: Path, name: str) -> None:
    line = b'{"items": [{"text": "a"}]}\n'
    (tmp_path / name).write_bytes(zstandard.ZstdCompressor().compress(line) if name.endswith("ZST") else line)
    summary = preprocess("jsonl", tmp_path / name, tmp_path / "out", tokenizer=TOKENIZER)
    assert (summary.counts["documents"], summary.drops.bad_counts) == (1, {})


@pytest.mark.parametrize("side", [-5, 0, 1])
def test_pictures_of_no_size_are_refused(tmp_path: Path, side: int) -> None:
    writers.write_jsonl([], tmp_path / "in")
    with pytest.raises(ValueError, match=f"--max-image-side {side}: give"):
        preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_image_side=side)


def test_images_larger_than_a_file_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a column of parquet, or another package's importer, may have them."""
    small = picture(0)
    monkeypatch.setattr(preprocess_task, "MAX_FILE", len(small))
    line = {"items": [{"text": "a"}, {"image": "small.png"}, {"image": "large.png"}]}
    summary = corpus_of(tmp_path, [line], {"small.png": small, "large.png": small + b"0"})
    assert summary.drops.names == {"image: over 256 MiB": ["a.jsonl:1: large.png"]}
    assert [image.data for image in open_corpus(tmp_path / "out")[0].images] == [small]
