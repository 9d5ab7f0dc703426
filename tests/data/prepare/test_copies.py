"""Protects: a file with a compressed copy beside it is read once; what is compressed and not read is named."""

from __future__ import annotations

import bz2
import gzip
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from data import writers
from data.helpers import TOKENIZER, contents
from data.writers import picture

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers.sources import ImageSource
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

DOCUMENTS = [Document((Image(picture(k, 80, 70), "", 0.5, 0), Text(f"text {k}"))) for k in range(3)]
PAIRS = [Document((Image(picture(k)), Text(f"text {k}"))) for k in range(4)]
TWICE = "document: file that is a copy of a file beside it, compressed in another way or not"
NOT_READ = "document: file that is compressed in a way that this format does not read: unpack it"


def html(folder: Path) -> None:
    folder.mkdir()
    for k, document in enumerate(DOCUMENTS):
        (folder / f"{k}.png").write_bytes(document.images[0].data)
        (folder / f"{k}.html").write_text(f"<p>text {k}<img src={k}.png>")


def mmc4(folder: Path) -> None:
    writers.write_mmc4(DOCUMENTS, folder, folder.parent / "images")
    for packed in list(folder.iterdir()):
        with zipfile.ZipFile(packed) as archive:
            packed.with_suffix("").write_bytes(archive.read(archive.namelist()[0]))
        packed.unlink()


WRITE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # format: what writes its files, a file of it, why its copy with .gz is not read
    "html": (html, "1.html", TWICE),
    "jsonl": (lambda folder: writers.write_jsonl(DOCUMENTS, folder), "documents.jsonl", TWICE),
    "mmc4": (mmc4, "docs_shard_1_v2.jsonl", TWICE),
    "obelics": (lambda f: writers.write_parquet(PAIRS, f, f.parent / "images", False), "train-00000.parquet", TWICE),
    "omnicorpus": (lambda f: writers.write_parquet(PAIRS, f, f.parent / "images", True), "train-00000.parquet", TWICE),
    "mint1t": (lambda folder: writers.write_mint1t(PAIRS, folder), "00000.tar", TWICE),
    "webdataset": (lambda folder: writers.write_webdataset(PAIRS, folder), "00001.tar", TWICE),
}


@pytest.mark.parametrize("format", WRITE)
@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
def test_a_copy_beside_a_file(tmp_path: Path, format: str, suffix: str) -> None:
    write, name, reason = WRITE[format]
    write(tmp_path / "in")
    images = tmp_path / "images" if (tmp_path / "images").exists() else None
    alone = preprocess(format, tmp_path / "in", tmp_path / "alone", images=images, tokenizer=TOKENIZER)
    raw = (tmp_path / "in" / name).read_bytes()
    copy = tmp_path / "in" / f"{name}{suffix}"
    copy.write_bytes(gzip.compress(raw) if suffix == ".gz" else bz2.compress(raw))
    both = preprocess(format, tmp_path / "in", tmp_path / "both", images=images, tokenizer=TOKENIZER)
    assert (both.drops.left_out_counts.pop(reason), both.drops.names[reason]) == (1, [copy.name])
    assert (both.counts, both.drops.left_out_counts) == (alone.counts, alone.drops.left_out_counts)
    for file, content in contents(tmp_path / "alone").items():
        if file not in ("corpus.json", "drops.jsonl"):
            assert (tmp_path / "both" / file).read_bytes() == content
    # a copy alone is read where the format reads it, and named where not
    (tmp_path / "in" / name).unlink()
    readable = suffix == ".gz" and format in ("jsonl", "mmc4", "mint1t", "webdataset")
    others = len([p for p in (tmp_path / "in").iterdir() if p.suffix == Path(name).suffix])
    if not readable and not others:
        with pytest.raises(ValueError, match=f"{copy.name} is compressed in a way .* unpack it"):
            preprocess(format, tmp_path / "in", tmp_path / "copy", images=images, tokenizer=TOKENIZER)
        return
    copied = preprocess(format, tmp_path / "in", tmp_path / "copy", images=images, tokenizer=TOKENIZER)
    assert (copied.counts["documents"] == alone.counts["documents"]) == readable
    assert copied.drops.names.get(NOT_READ) == (None if readable else [copy.name])


def test_which_of_several_copies_is_read(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    line = b'{"items": [{"text": "%s"}]}\n'
    for name, data in (
        ("a.jsonl.gz", gzip.compress(line % b"gz")),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(line % b"zst")),
        ("a.jsonl.xz", b""),
        ("sub/a.jsonl", line % b"other folder"),
        ("b.jsonl", line % b"plain"),
        ("B.JSONL.GZ", gzip.compress(line % b"another name")),
    ):
        (tmp_path / "in" / name).write_bytes(data)
    summary = preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER)
    assert [document.name for document in open_corpus(tmp_path / "out")] == [
        "B.JSONL.GZ:1", "a.jsonl.zst:1", "b.jsonl@0", "sub/a.jsonl@0",
    ]  # fmt: skip
    assert summary.drops.names[TWICE] == ["a.jsonl.gz", "a.jsonl.xz"]


def test_images_in_compressed_tars_are_named(tmp_path: Path) -> None:
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(picture(k))
        with tarfile.open(tmp_path / f"{k}.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / f"{k}.png", f"{k}.png")
        with tarfile.open(tmp_path / f"{k}.tar", "w") as archive:
            archive.add(tmp_path / f"{k}.png", f"{k}.png")
        (tmp_path / f"{k}.png").unlink()
    assert ImageSource(tmp_path).read("1.png") == picture(1)
    with pytest.raises(BadImage, match=r"^file missing$"):
        ImageSource(tmp_path).read("gone.png")
    (tmp_path / "1.tar").unlink()
    with pytest.raises(BadImage, match=r"file missing, and 1\.tar\.gz is compressed, which is not read: unpack it"):
        ImageSource(tmp_path).read("1.png")
    for name in ("shard.0.tar", "shard.0.tar.gz", "shard.1.tgz", "shard.1.tar"):
        shutil.copy(tmp_path / "0.tar", tmp_path / name)
    with pytest.raises(BadImage, match=r"and 1\.tar\.gz is compressed"):
        ImageSource(tmp_path).read("1.png")
    (tmp_path / "1.tar.gz").unlink()
    with pytest.raises(BadImage, match=r"^file missing$"):
        ImageSource(tmp_path).read("1.png")
    for tar in tmp_path.glob("*.tar"):  # without any tar
        tar.unlink()
    with pytest.raises(BadImage, match=r"0\.tar\.gz is compressed"):
        ImageSource(tmp_path).read("1.png")


def test_images_in_zips_are_named(tmp_path: Path) -> None:
    for name in ("a.jsonl.zip", "train2017.zip"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadImage, match=r"file missing, and train2017\.zip is compressed, which is not read: unpack it"):
        ImageSource(tmp_path).read("1.png")
    (tmp_path / "train2017").mkdir()  # where it was unpacked
    with pytest.raises(BadImage, match=r"^file missing$"):
        ImageSource(tmp_path).read("1.png")


@pytest.mark.parametrize("name", ["train2017.zip", "images.tar.gz", "images.tgz", "captions.json", "images"])
def test_images_are_a_folder_or_a_tar(tmp_path: Path, name: str) -> None:
    """Else all images of the input would be missing, and the tar called damaged."""
    writers.write_jsonl(DOCUMENTS, tmp_path / "in")
    (tmp_path / name).write_bytes(b"PK")
    message = (
        rf"--images .*/{name}: give a folder of images, .tar files or \*\.images\.parquet, or one such file; unpack"
    )
    with pytest.raises(UserError, match=message):
        preprocess("jsonl", tmp_path / "in", tmp_path / "out", images=tmp_path / name, tokenizer=TOKENIZER)
