"""Protects what is kept: an error of the disk that passes ends a run, and nothing is counted as missing or damaged."""

from __future__ import annotations

import builtins
import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import writers
from data.helpers import TOKENIZER, contents, plain
from data.prepare.test_epub import write_book
from data.prepare.test_nemo import rows_of
from data.prepare.test_nemo import write as write_nemo
from data.writers import picture

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.fetch.urls import read_urls, url_files
from megatron_lcl.data.prepare.importers import create, hf, image_tables, row_groups, url_keys
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.filesystem import raise_if_passing

Input = tuple[str, Path, Path | None, dict[str, Any]]
"""what `create` takes"""
URL = "http://example.org/1"
NAMES = ["0.png", "1.png"]
LINES = "".join(json.dumps({"items": [{"text": name}, {"image": name}]}) + "\n" for name in NAMES).encode()


def lines(folder: Path) -> Input:
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "images").mkdir()
    (folder / "images/0.png").write_bytes(picture(0))
    return "jsonl", folder / "a.jsonl", folder / "images", {}


def lines_gz(folder: Path) -> Input:
    return "jsonl", packed(lines(folder)[1], ".gz", gzip.compress(LINES)), folder / "images", {}


def lines_zip(folder: Path) -> Input:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return "jsonl", packed(lines(folder)[1], ".zip", out.getvalue()), folder / "images", {}


def packed(file: Path, suffix: str, data: bytes) -> Path:
    file.unlink()
    file = file.with_name(file.name + suffix)
    file.write_bytes(data)
    return file


def lines_tar(folder: Path) -> Input:
    _, file, images, _ = lines(folder)
    with tarfile.open(folder / "images/0.tar", "w") as archive:
        writers._add(archive, "1.png", picture(1))
    return "jsonl", file, images, {}


def lines_table(folder: Path) -> Input:
    """Images in a store of `fetch` in parquet."""
    _, file, images, _ = lines(folder)
    key = hashlib.sha256(URL.encode()).hexdigest() + ".png"
    file.write_text(json.dumps({"items": [{"image": URL}]}))
    row = {"key": key, "size": len(picture(1)), "status": "kept", "bytes": picture(1)}
    table = pa.Table.from_pylist([row])
    image_tables.write_image_table(folder / "images/0.images.parquet", [table], table.schema)
    return "jsonl", file, images, {}


def pages(folder: Path) -> Input:
    (folder / "a.html").write_text("<p>Text</p><img src=0.png><img src=1.png>")
    (folder / "0.png").write_bytes(picture(0, 90, 80))
    return "html", folder / "a.html", folder, {"text_pages": "true"}


def books(folder: Path) -> Input:
    write_book(folder / "a.epub")
    return "epub", folder / "a.epub", None, {}


def tar(folder: Path) -> Input:
    writers.write_webdataset([Document((Image(picture(0, format="JPEG")), Text("a")))], folder)
    return "webdataset", folder / "00000.tar", None, {}


def tar_gz(folder: Path) -> Input:
    file = tar(folder)[1]
    return "webdataset", packed(file, ".gz", gzip.compress(file.read_bytes())), None, {}


def captions(folder: Path) -> Input:
    images = [{"id": 1, "file_name": "0.png"}]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": [{"image_id": 1, "caption": "a"}]}))
    return "coco", folder / "a.json", lines(folder)[2], {}


def table(folder: Path) -> Input:
    """Images of img2dataset, by URL."""
    (folder / "a.csv").write_text(f"url,caption\n{URL},a\n")
    (folder / "images/00000").mkdir(parents=True)
    (folder / "images/00000/000000001.jpg").write_bytes(picture(1, format="JPEG"))
    row = {"url": URL, "key": "000000001", "status": "success"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "images/00000.parquet")
    return "table", folder / "a.csv", folder / "images", {}


def rows(folder: Path) -> Input:
    lists = {"images": [["0.png", None]], "texts": [[None, "a"]]}
    pq.write_table(pa.table(lists), folder / "a.parquet")
    return "obelics", folder / "a.parquet", lines(folder)[2], {"image_name": "0.png"}


def nemo(folder: Path) -> Input:
    write_nemo(folder / "a.parquet", rows_of([Document((Text("a"), Image(picture(0))))]))
    return "nemo", folder / "a.parquet", None, {}


def data_set(folder: Path) -> pa.Table:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array([{"bytes": picture(0), "path": "0.png"}], image), "text": ["a"]})


def hf_parquet(folder: Path) -> Input:
    pq.write_table(data_set(folder), folder / "a.parquet")
    return "hf", folder / "a.parquet", None, {}


def hf_arrow(folder: Path) -> Input:
    data = data_set(folder)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
        writer.write_table(data)
    return "hf", folder / "a.arrow", None, {}


def hf_card(folder: Path) -> Input:
    """The card says which file is of which split."""
    for name in ("a", "b"):
        pq.write_table(data_set(folder), folder / f"{name}.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- data_files:\n  - {split: x, path: a.*}\n---\n")
    return "hf", folder, None, {"split": "x"}


class Disk:
    """Fails once, at the n-th time that a file of this name is read, or its descriptor asked for, to map it."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.num_read, self.failing = name, 0, 0
        monkeypatch.setattr(io, "open", self.instead_of(io.open))
        monkeypatch.setattr(builtins, "open", self.instead_of(builtins.open))
        for module in (row_groups, url_keys, hf):
            monkeypatch.setattr(module, "opened", self.instead_of(row_groups.opened, buffering=0))

    def fails_at(self, number: int) -> None:
        """Counted from now, from 1 on."""
        self.failing = self.num_read + number

    def check(self) -> None:
        self.num_read += 1
        if self.num_read == self.failing:
            raise OSError(errno.EIO, "Error reading bytes")  # as pyarrow puts it

    def instead_of(self, ask: Callable[..., Any], buffering: int = -1) -> Callable[..., Any]:
        def answer(file: Any, mode: str = "r", buffering: int = buffering, *others: Any, **options: Any) -> Any:
            if not isinstance(file, str | Path) or os.path.basename(file) != self.name:
                return ask(file, *(() if ask.__name__ == "opened" else (mode, buffering, *others)), **options)
            raw = Checked(file)
            raw.check = self.check
            if buffering == 0:
                return raw
            buffered = io.BufferedReader(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, "utf-8")

        return answer


class Checked(io.FileIO):
    check: Callable[[], None]

    def read(self, *arguments: Any) -> Any:
        self.check()
        return super().read(*arguments)

    def readinto(self, *arguments: Any) -> Any:
        self.check()
        return super().readinto(*arguments)

    def readall(self) -> Any:
        self.check()
        return super().readall()

    def fileno(self) -> int:
        self.check()
        return super().fileno()


def read(given: Input, work: Path) -> tuple[list[Any], Any]:
    """Documents and what was dropped, as of a run with `work`."""
    importer, drops = create(*given), Drops()
    importer.prepare(work)
    units = importer.units()
    copy = pickle.loads(pickle.dumps(importer))  # which has nothing open
    return plain([document for unit in units for document in copy.documents(unit, drops)]), drops.bad_counts


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lines, "a.jsonl"),
        (lines, "0.png"),
        (lines_gz, "a.jsonl.gz"),
        (lines_zip, "a.jsonl.zip"),
        (lines_tar, "0.tar"),
        (lines_table, "0.images.parquet"),
        (pages, "a.html"),
        (pages, "0.png"),
        (books, "a.epub"),
        (tar, "00000.tar"),
        (tar_gz, "00000.tar.gz"),
        (captions, "a.json"),
        (table, "a.csv"),
        (table, "00000.parquet"),
        (rows, "a.parquet"),
        (nemo, "a.parquet"),
        (hf_parquet, "a.parquet"),
        (hf_arrow, "a.arrow"),
        (hf_card, "README.md"),
    ],
)
def test_a_run_ends_and_can_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Input], name: str
) -> None:
    """Whichever time the file is read."""
    given = make(tmp_path)
    disk, work = Disk(name, monkeypatch), tmp_path / "work"
    work.mkdir()
    expected = read(given, work)
    assert expected[0]
    assert disk.num_read
    for number in range(1, disk.num_read + 1):
        shutil.rmtree(work)
        work.mkdir()
        disk.fails_at(number)
        try:
            found: Any = read(given, work)
        except OSError as error:
            found = str(error)
        # not always: what `tarfile` asks whether a plain tar is compressed has one answer, whether it is read or not
        if make is not tar or found != expected:
            path = rf"'{re.escape(str(tmp_path))}/.*{re.escape(name)}'"
            assert re.fullmatch(rf"\[Errno {errno.EIO}\] [^']*{path}", str(found)), number
        assert read(given, work) == expected


def test_a_corpus_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    format, input, images, _ = lines_tar(tmp_path / "in")

    def make(name: str) -> dict[str, bytes]:
        preprocess(format, input, tmp_path / name, images=images, tokenizer=TOKENIZER, max_bad_fraction=1)
        return contents(tmp_path / name)

    expected = make("expected")
    disk = Disk("0.tar", monkeypatch)
    for number in (1, 2, 3):  # as the tar is listed, and then as an image is read
        disk.fails_at(number)
        with pytest.raises(OSError, match=r"0\.tar'$"):
            make("out")
    assert make("out") == expected


def test_urls_that_could_not_be_read_are_in_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"url": [URL]}), tmp_path / "a.parquet")
    disk, drops = Disk("a.parquet", monkeypatch), Drops()
    disk.fails_at(1)
    with pytest.raises(OSError, match=r"a\.parquet'$"):
        list(read_urls(url_files(tmp_path), None, drops))
    assert list(read_urls(url_files(tmp_path), None, drops)) == [[URL]]
    assert not drops.bad_counts


def test_a_link_of_which_the_disk_does_not_say_where_it_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no bad document then."""
    (tmp_path / "link").symlink_to("gone")
    given = pages(tmp_path)
    stat = Path.stat

    def fail(path: Path, **options: Any) -> os.stat_result:
        if path.name == "link":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(OSError, match=r"link'$"):
        create(given[0], tmp_path, None, {})


def test_too_many_open_files(tmp_path: Path) -> None:
    """What pyarrow says of it, which opens files itself."""
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    assert row_groups.column_names(tmp_path / "a.parquet") == ["a"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match=r"a\.parquet'$") as raised:
            row_groups.column_names(tmp_path / "a.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised.value.errno == errno.EMFILE


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone"),
        PermissionError(errno.EACCES, "not yours"),
        OSError(errno.EINVAL, "no such place"),
        OSError("a library's word for damage"),
        pa.ArrowInvalid("damage"),
    ],
    ids=repr,
)
def test_what_is_of_the_file_is_counted(error: Exception) -> None:
    raise_if_passing(error, "a.parquet")
