"""Inputs that are objects: what `preprocess` and `fetch` make of them is what they make of the same files on a disk."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import jpeg
from s3_server import Proxy

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.fetch import urls
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.importers.html import HtmlImporter
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.storage import paths
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.data.storage.paths import WINDOW, path_of
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError

FORMATS = {"jsonl": "images", "mmc4": "images", "obelics": "images", "webdataset": "", "hf": "", "coco": "images"}
FORMATS |= {"html": "", "markdown": "", "epub": ""}


def put_tree(folder: Path, place: str) -> str:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            Store(place).put(file.relative_to(folder).as_posix(), file)
    return place


def tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write(format: str, folder: Path) -> None:
    """A small input of a format, some of it damaged."""
    inner = folder / "in" / "below"
    inner.mkdir(parents=True)
    images = {f"{k}.jpg": jpeg(k) for k in range(6)}
    if FORMATS[format]:
        (folder / "images").mkdir()
        tar(folder / "images" / "00000.tar", images)
    match format:
        case "jsonl":
            lines = [{"items": [{"text": f"text {k} " * 40}, {"image": f"{k % 6}.jpg"}]} for k in range(30)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "in" / "a.jsonl").write_text(text + "no JSON\n")
            (inner / "b.jsonl").write_text(text.replace("text", "other"))
        case "mmc4":
            shown = [{"image_name": f"{k}.jpg", "matched_text_index": 0, "matched_sim": 0.3} for k in range(6)]
            lines = [{"text_list": [f"text {k}"], "image_info": [image]} for k, image in enumerate(shown)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "in" / "docs_shard_10_v2.jsonl").write_text(text + "no JSON\n")
            (inner / "docs_shard_9_v2.jsonl").write_text(text.replace("text ", "other "))
        case "obelics":
            rows = {
                "images": [[f"http://h/{k}", None] for k in range(6)],
                "texts": [[None, f"t {k}"] for k in range(6)],
            }
            pq.write_table(pa.table(rows), folder / "in" / "a.parquet", row_group_size=2)
            (inner / "b.parquet").write_bytes((folder / "in" / "a.parquet").read_bytes()[:-40])
            import hashlib

            named = {hashlib.sha256(f"http://h/{k}".encode()).hexdigest() + ".jpg": jpeg(k) for k in range(6)}
            tar(folder / "images" / "00000.tar", named)
        case "webdataset":
            texts = {f"{k}.txt": f"caption {k}".encode() for k in range(6)}
            tar(folder / "in" / "00000.tar", dict(sorted({**images, **texts}.items())))
            (inner / "00001.tar").write_bytes((folder / "in" / "00000.tar").read_bytes()[:-6000])
        case "hf":
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            column = pa.array([{"bytes": jpeg(k), "path": f"{k}.jpg"} for k in range(6)], kind)
            table = pa.table({"image": column, "text": [f"caption {k}" for k in range(6)]})
            with pa.OSFile(str(folder / "in" / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
        case "html" | "markdown" | "epub":
            write_pages(format, folder / "in")
        case "coco":
            listed = [{"id": k, "file_name": f"{k}.jpg"} for k in range(6)]
            said = [{"image_id": k, "caption": f"caption {k}"} for k in range(6)]
            (folder / "in" / "a.json").write_text(json.dumps({"images": listed, "annotations": said}))


def write_pages(format: str, folder: Path) -> None:
    """Pages in a folder and below it: images beside them, above, from the top, missing and outside."""
    pictures = {f"pictures/{k}.jpg": jpeg(k, 80, 70) for k in range(6)}
    sources = ["pictures/0.jpg", "/pictures/1.jpg", "below/../pictures/2.jpg", "no.jpg", "../../out.jpg"]
    shown = {"a": sources, "below/b": ["../pictures/3.jpg", "/pictures/4.jpg", "../../out.jpg"]}
    shown |= {"below/c": ["../pictures/5.jpg"], "c": []}
    pages = {
        name: "".join(f'<p>Words of {name} {k}.</p><img src="{image}">' for k, image in enumerate(images))
        for name, images in shown.items()
    }
    if format == "epub":
        listed = '<item id="p" href="p.xhtml" media-type="application/xhtml+xml"/>'
        package = f'<package><manifest>{listed}</manifest><spine><itemref idref="p"/></spine></package>'
        container = '<container><rootfiles><rootfile full-path="b.opf"/></rootfiles></container>'
        for name, page in pages.items():
            inside = page.replace('src="../', 'src="').replace('src="/', 'src="').replace('">', '"/>')
            members = {"META-INF/container.xml": container, "b.opf": package, "p.xhtml": f"<body>{inside}</body>"}
            with zipfile.ZipFile(folder / f"{name}.epub", "w") as book:
                for member, data in {**members, **pictures}.items():
                    book.writestr(member, data)
        whole = (folder / "a.epub").read_bytes()
        (folder / "below" / "damaged.epub").write_bytes(whole[: len(whole) // 2])
        return
    suffix = ".html" if format == "html" else ".md"
    files = {f"{name}{suffix}": page.encode() for name, page in pages.items()} | pictures
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def content(folder: Path) -> dict[str, Any]:
    """All files of a corpus, without what says where and when the input was."""
    found: dict[str, Any] = {file.name: file.read_bytes() for file in folder.iterdir()}
    manifest = json.loads(found.pop("corpus.json"))
    manifest["recipe"].pop("input")
    manifest["recipe"].pop("images")
    return {**found, "corpus.json": manifest}


@pytest.mark.parametrize("format", FORMATS)
def test_a_corpus_is_that_of_the_disk(s3: Proxy, place: str, tmp_path: Path, format: str) -> None:
    write(format, tmp_path)
    put_tree(tmp_path / "in", f"{place}/in")
    images = {"images": tmp_path / "images"} if FORMATS[format] else {}
    options: dict[str, Any] = {"tokenizer": "clip", "max_bad_fraction": 0.9}
    preprocess(format, tmp_path / "in", tmp_path / "disk", **images, **options)
    if images:
        images = {"images": put_tree(tmp_path / "images", f"{place}/images")}
    s3.unavailable, s3.cut = 7, 5
    found = preprocess(format, f"{place}/in", tmp_path / "objects", **images, **options)
    assert found.counts["placements"] > 5
    assert content(tmp_path / "objects") == content(tmp_path / "disk")
    s3.reset()
    assert preprocess(format, f"{place}/in", tmp_path / "objects", **images, **options).reused


@pytest.mark.parametrize("format", FORMATS)
def test_a_request_that_fails_is_no_damage(
    s3: Proxy, place: str, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(format, tmp_path)
    put_tree(tmp_path, place)
    images = {"images": f"{place}/images"} if FORMATS[format] else {}
    read, left = Store.read, [0]

    def failing(self: Store, name: str, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0 and not name.endswith(".json"):
            raise StorageError("the network is gone")
        return read(self, name, *arguments)

    monkeypatch.setattr(Store, "read", failing)
    for reads in range(3 if format in ("jsonl", "obelics") else 1):
        left[0] = reads
        with pytest.raises(StorageError, match="the network is gone"):
            preprocess(format, f"{place}/in", tmp_path / "out", tokenizer="clip", max_bad_fraction=1.0, **images)
        assert not (tmp_path / "out" / "corpus.json").exists()


@pytest.mark.slow
def test_several_processes_read_large_files(s3: Proxy, place: str, tmp_path: Path) -> None:
    write("jsonl", tmp_path)
    line = json.dumps({"items": [{"text": "a long text of few tokens " * 4000}, {"image": "1.jpg"}]}) + "\n"
    (tmp_path / "in" / "large.jsonl").write_text(line * 110)
    put_tree(tmp_path, place)
    options: dict[str, Any] = {"tokenizer": "clip", "task_bytes": 1 << 20, "workers": 2}
    preprocess("jsonl", tmp_path / "in", tmp_path / "disk", images=tmp_path / "images", **options)
    s3.reset()
    s3.unavailable = 9
    preprocess("jsonl", f"{place}/in", tmp_path / "objects", images=f"{place}/images", **options)
    assert content(tmp_path / "objects") == content(tmp_path / "disk")
    sent = sum(request.sent for request in s3.requests if "large" in request.path)
    assert sent < 1.6 * (tmp_path / "in" / "large.jsonl").stat().st_size
    assert max(request.sent for request in s3.requests) <= 1 << 20


def test_objects_as_files(s3: Proxy, place: str) -> None:
    content = bytes(range(256)) * 40_000
    assert len(content) > WINDOW
    Store(place).put("a/b.bin", content)
    path = path_of(f"{place}/a/b.bin")
    with path.open("rb") as file:
        assert [file.seek(9_000_000), file.read(7), file.seek(-3, io.SEEK_END), file.read()] == [
            9_000_000, content[9_000_000:9_000_007], len(content) - 3, content[-3:],
        ]  # fmt: skip
    s3.reset()
    with path.open("rb", 0) as file:
        file.seek(5)
        assert file.read(6) == content[5:11]
    assert [request.sent for request in s3.requests] == [6]
    assert path.read_bytes() == content
    assert (path.parent / "none").exists() is False
    assert str(path.parent.parent) == place
    with pytest.raises(FileNotFoundError, match="none"):
        (path.parent / "none").read_bytes()
    Store(place).put("a/b.bin", content[::-1])
    with pytest.raises(BaseException, match="was replaced while it was read"):
        path.read_bytes()


@pytest.mark.parametrize("format", ["jsonl", "mmc4"])
def test_the_objects_that_were_listed_are_read(s3: Proxy, place: str, tmp_path: Path, format: str) -> None:
    write(format, tmp_path)
    put_tree(tmp_path / "in", place)
    importer = create(format, place, None, {})
    s3.reset()
    units = importer.units()
    assert s3.requests == [], "sizes and versions are known from the list"
    for unit in units:
        name = unit.payload[0].relative_to(importer.root).as_posix()
        Store(place).put(name, (tmp_path / "in" / name).read_bytes() + b"\n")
        with pytest.raises(BaseException, match="was replaced while it was read"):
            list(importer.documents(unit, Drops()))


def test_another_process_is_given_the_version_of_an_object() -> None:
    """Else it would read, without a word, what has taken the object's place."""
    path = paths._with_about("s3://bucket/folder/object", (3, "tag"))
    assert pickle.loads(pickle.dumps(path)).about == (3, "tag")


def test_what_cannot_be_read_is_said(s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (place, f"{place}/pages"):
        Store(folder).put("a.html", b"<p>text</p>")
    monkeypatch.setattr(HtmlImporter, "reads_objects", False)
    Store(f"{place}/begun").put("_uploading.json", b"{}")
    for format, url, said in (
        ("html", place, "format html reads files on a disk; copy s3://"),
        ("jsonl", f"{place}/none", f"{place}/none does not exist"),
        ("jsonl", f"{place}/begun", "is being written, or was not finished"),
        (
            "jsonl",
            f"{place}/pages",
            f"no .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.zip, .ndjson, .* files in {place}/pages",
        ),
        ("jsonl", "s3://nowhere/in", "there is no bucket 'nowhere'"),
        ("jsonl", "s3://me:planted@bucket/in", "environment variables"),
    ):
        with pytest.raises(UserError, match=said) as error:
            preprocess(format, url, tmp_path / "out")
        assert "planted" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_url_lists(s3: Proxy, place: str, tmp_path: Path) -> None:
    listed = [f"http://host{k}/{k}.jpg" for k in range(9)]
    pq.write_table(pa.table({"url": listed[:4]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"url": url}) + "\n" for url in listed[4:6]))
    (tmp_path / "c.txt").write_text("\n".join(listed[6:]))
    put_tree(tmp_path, place)
    s3.unavailable = 3
    files = urls.url_files(path_of(place))
    assert [url for some in urls.read_urls(files, None, Drops()) for url in some] == listed
    Store(place).put("d.csv", b"a")
    with pytest.raises(UserError, match=r"is none of \.parquet"):
        urls.url_files(path_of(f"{place}/d.csv"))
