"""Protects which member of which tar stands for a name: never one that another folder is named for."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import writers
from data.helpers import TOKENIZER, documents_of
from data.writers import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import create, sources
from megatron_lcl.data.prepare.importers.files import FilesImporter
from megatron_lcl.data.prepare.importers.sources import ImageSource
from megatron_lcl.data.prepare.importers.urls import names_of_url
from megatron_lcl.data.prepare.preprocess import preprocess

SEVERAL = "several images of this name in the tars"


def source_of(folder: Path, tars: Mapping[str, Mapping[str, bytes]]) -> ImageSource:
    folder.mkdir(exist_ok=True)
    for tar, members in tars.items():
        with tarfile.open(folder / f"{tar}.tar", "w") as archive:
            for name, data in members.items():
                writers._add(archive, name, data)
    return ImageSource(folder)


def read(source: ImageSource, name: str | list[str], near: tuple[str, ...] = ()) -> bytes | str:
    """The image, or why there is none."""
    try:
        return source.read(name, near)
    except BadImage as error:
        return str(error)


@pytest.mark.parametrize(
    ("asked", "members", "found"),
    [
        ("cats/1.png", ["dogs/1.png"], None),
        ("cats/1.png", ["images/cats/1.png"], "images/cats/1.png"),
        ("cats/1.png", ["1.png"], "1.png"),
        ("cats/1.png", ["cats/1.png", "images/cats/1.png", "1.png"], "cats/1.png"),
        ("cats/1.png", ["dogs/1.png", "1.png", "images/cats/1.png"], "images/cats/1.png"),
        ("cats/1.png", ["dogs/1.png", "1.png"], "1.png"),
        ("cats/1.png", ["train/cats/1.png", "val/cats/1.png"], SEVERAL),
        ("cats/1.png", ["mycats/1.png", "cats/11.png"], None),
        ("1.png", ["cats/1.png"], "cats/1.png"),
        ("1.png", ["cats/1.png", "dogs/1.png"], SEVERAL),
        ("a/b/c/1.png", ["c/1.png", "1.png", "b/1.png"], "c/1.png"),
        ("a/b/1.png", ["x/b/1.png"], None),
        ("./cats//1.png", ["./cats/1.png"], "./cats/1.png"),
        (".", ["1.png"], None),
        ("a/" * 100_000 + "1.png", ["a/" * 100_000 + "2.png"], None),
    ],
)
def test_folders_that_a_name_has(asked: str, members: list[str], found: str | None, tmp_path: Path) -> None:
    source = source_of(tmp_path, {"0": {name: name.encode() for name in members}})
    told = read(source, asked)
    assert told == (found or "file missing") or told == (found or "").encode()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("in_a_tar", [False, True])
def test_names_in_another_normal_form(tmp_path: Path, form: Literal["NFC", "NFD"], in_a_tar: bool) -> None:
    """What a name is exactly goes before; macOS makes archives with NFD."""
    composed, decomposed = (unicodedata.normalize(other, "caf\u00e9.png") for other in ("NFC", "NFD"))
    name = unicodedata.normalize(form, "caf\u00e9.png")
    source = source_of(tmp_path, {"0": {name: b"one"}} if in_a_tar else {})
    if not in_a_tar:
        (tmp_path / name).write_bytes(b"one")
    assert [read(source, asked) for asked in (composed, decomposed, "cafe.png")] == [b"one", b"one", "file missing"]
    both = source_of(tmp_path / "both", {"0": {composed: b"c", decomposed: b"d"}})
    assert (read(both, composed), read(both, decomposed)) == (b"c", b"d")
    assert read(both, ["gone.png", decomposed]) == b"d"
    parts = source_of(tmp_path / "parts", {"0": {f"cats/{decomposed}": b"whole", composed: b"of another folder"}})
    assert read(parts, f"cats/{composed}") == b"whole"


def test_the_whole_name_goes_before_a_part_in_the_tar_beside(tmp_path: Path) -> None:
    source = source_of(
        tmp_path, {"0": {"1.png": b"part"}, "1": {"cats/1.png": b"whole"}, "2": {"cats/1.png": b"other"}}
    )
    assert read(source, "cats/1.png", ("1",)) == b"whole"
    assert read(source, "cats/1.png", ("2",)) == b"other"
    assert read(source, "cats/1.png", ("0",)) == SEVERAL
    assert read(source, "birds/1.png", ("0",)) == b"part"


def test_the_longest_end_of_all_names_goes_first(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"0": {f"mmc4/{n}/1.png": n.encode() for n in ("shard_151", "shard_152", "x")}})
    assert read(source, ["1.png", "151/1.png", "shard_151/1.png"]) == b"shard_151"
    assert read(source, ["1.png", "y/1.png"]) == SEVERAL


@pytest.mark.parametrize(("near", "asked"), [((), 1), (("elsewhere",), 1), (("1",), 3)])
def test_no_name_is_looked_for_behind_one_that_is_there(
    near: tuple[str, ...], asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL has up to 40. But where an archive is near, it may have a later one."""
    source = source_of(tmp_path, {"0": {"a.png": b"first", "c.png": b"last"}, "1": {"x.png": b"x"}})
    looked: list[int] = []
    find = ImageSource.find
    monkeypatch.setattr(ImageSource, "find", lambda self, digest: looked.append(digest) or find(self, digest))
    assert read(source, ["a.png", "b.png", "c.png"], near) == b"first"
    assert len(looked) == asked


def test_images_of_a_shard_of_mmc4_in_one_tar_of_all(tmp_path: Path) -> None:
    page = {"text_list": ["t"], "image_info": [{"image_name": "1.png", "matched_text_index": 0, "matched_sim": 0.3}]}
    (tmp_path / "in").mkdir()
    for shard in (151, 152):
        (tmp_path / f"in/docs_no_face_shard_{shard}_v3.jsonl").write_text(json.dumps(page))
    source_of(tmp_path / "images", {"all": {f"mmc4/shard_{k}/1.png": picture(k) for k in (151, 152)}})
    documents, drops = documents_of(create("mmc4", tmp_path / "in", tmp_path / "images", {}))
    assert [[i.data for i in d.images] for d in documents] == [[picture(151)], [picture(152)]]
    assert not drops.bad_counts


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
URL = "http://x/1.png"


def lines_file(file: Path) -> None:
    line = json.dumps({"items": [{"image": "1.png"}, {"text": "t"}]}).encode()
    file.write_bytes(gzip.compress(line) if file.suffix == ".gz" else line)


def coco_file(file: Path) -> None:
    content = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "t"}]}
    file.write_text(json.dumps(content))


def hf_file(file: Path) -> None:
    rows = pa.table({"image": pa.array([{"bytes": None, "path": "1.png"}], IMAGE), "text": ["t"]})
    if file.suffix == ".parquet":
        pq.write_table(rows, file)
        return
    with pa.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows)


def hf_lists(file: Path) -> None:
    pq.write_table(
        pa.table({"image": pa.array([[{"bytes": None, "path": "1.png"}]], pa.list_(IMAGE)), "text": ["t"]}), file
    )


@pytest.mark.parametrize(
    ("format", "suffix", "write", "options"),
    [
        ("jsonl", "jsonl", lines_file, {}),
        ("jsonl", "JSONL.gz", lines_file, {}),
        ("table", "csv", lambda file: file.write_text("key,text\n1,t\n"), {}),
        ("table", "tsv", lambda file: file.write_text("path\ttext\n1.png\tt\n"), {}),
        ("table", "csv", lambda file: file.write_text(f"url,text\n{URL},t\n"), {}),
        ("coco", "json", coco_file, {}),
        ("hf", "parquet", hf_file, {"image_column": "image"}),
        ("hf", "arrow", hf_file, {"image_column": "image"}),
        ("hf", "parquet", hf_lists, {"image_column": "image"}),
        (
            "obelics",
            "parquet",
            lambda file: pq.write_table(pa.table({"images": [[URL, None]], "texts": [[None, "t"]]}), file),
            {"image_name": "1"},
        ),
    ],
)  # fmt: skip
def test_the_tar_that_is_named_like_a_file(
    tmp_path: Path, format: str, suffix: str, write: Callable[[Path], object], options: dict[str, str]
) -> None:
    """The whole name but for the suffixes of the format, however many dots it has."""
    (tmp_path / "in").mkdir()
    for k in range(3):
        write(tmp_path / f"in/shard.{k:05d}.{suffix}")
    members = ("1.png", *names_of_url(URL))
    source_of(tmp_path / "images", {f"shard.{k:05d}": dict.fromkeys(members, picture(k)) for k in range(3)})
    documents, drops = documents_of(create(format, tmp_path / "in", tmp_path / "images", options))
    assert [[i.data for i in d.images] for d in documents] == [[picture(k)] for k in range(3)]
    assert not drops.bad_counts


@pytest.mark.parametrize(("name", "stem"), [("a.b.jsonl.zst", "a.b"), ("a.b.txt", "a.b"), ("a", "a")])
def test_a_single_file_may_have_any_suffix(tmp_path: Path, name: str, stem: str) -> None:
    (tmp_path / name).write_text("{}")
    importer = create("jsonl", tmp_path / name, None, {})
    assert isinstance(importer, FilesImporter)
    assert importer.stem(tmp_path / name) == stem


def test_of_images_alike_one_is_taken(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"0": {"a/1.png": b"same"}, "1": {"b/1.png": b"same"}})
    assert read(source, "1.png") == b"same"


parts = st.sampled_from(["a", "b", "c"])
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)


def test_against_the_rule_written_out(tmp_path: Path) -> None:
    """Of the members one of whose name and the name asked for ends the other, those that share most."""

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.sets(paths, max_size=8), min_size=1, max_size=3), st.lists(paths, min_size=5, max_size=5))
    def check(tars: list[set[str]], names: list[str]) -> None:
        for old in tmp_path.glob("*.tar"):
            old.unlink()
        source = source_of(
            tmp_path,
            {str(k): {name: f"{k}:{name}".encode() for name in sorted(members)} for k, members in enumerate(tars)},
        )
        for asked in names:
            for near in ((), ("0",)):
                ranked: dict[tuple[int, bool], list[bytes]] = {}
                for k, members in enumerate(tars):
                    for name in members:
                        content, far = f"{k}:{name}".encode(), str(k) not in near
                        mine, theirs = f"/{name}", f"/{asked}"
                        shared = min(mine.count("/"), theirs.count("/"))
                        if mine == theirs:
                            ranked.setdefault((0, far), []).append(content)
                        elif mine.endswith(theirs) or theirs.endswith(mine):
                            ranked.setdefault((2 if far else 1, -shared), []).append(content)  # type: ignore[arg-type]
                best = ranked[min(ranked)] if ranked else []
                expected = {0: "file missing", 1: best and best[0]}.get(len(best), SEVERAL)
                assert read(source, asked, near) == expected, (tars, asked, near)

    check()


def test_a_document_gets_no_image_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    source_of(tmp_path / "images", {"0": {"dogs/1.png": picture(0), "cats/2.png": picture(2)}})
    lines = [{"items": [{"text": "a cat"}, {"image": f"cats/{k}.png"}]} for k in (1, 2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = preprocess("jsonl", tmp_path / "a.jsonl", tmp_path / "out", images=tmp_path / "images",
                         tokenizer=TOKENIZER, max_bad_fraction=1)  # fmt: skip
    assert [[i.data for i in d.images] for d in open_corpus(summary.path)] == [[], [picture(2)]]
    assert summary.drops.bad_counts == {"image: file missing": 1}


def test_paths_of_hf(tmp_path: Path) -> None:
    """Which the format looks for without their folders, too."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"image": {"bytes": None, "path": f"cats/{k}.png"}, "text": str(k)} for k in range(3)]
    features = '{"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}'
    schema = pa.schema([("image", image), ("text", pa.string())], {"huggingface": features})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    source_of(tmp_path / "images", {"0": {"dogs/0.png": picture(0), "1.png": picture(1)}})
    (tmp_path / "images/2.png").write_bytes(picture(2))
    documents, drops = documents_of(create("hf", tmp_path / "a.parquet", tmp_path / "images", {}))
    assert [[i.data for i in d.images] for d in documents] == [[], [picture(1)], [picture(2)]]
    assert drops.bad_counts == {"image: file missing": 1}


def test_corpora_with_images_in_tars_have_rules_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"items": [{"text": "a"}]}\n')
    (tmp_path / "folder").mkdir()
    source_of(tmp_path / "tars", {"0": {"1.png": picture(0)}})
    rules = [create("jsonl", tmp_path / "a.jsonl", tmp_path / name, {}).rules for name in ("folder", "tars")]
    assert rules == [2, 3]


@pytest.mark.parametrize(
    ("format", "name", "content"),
    [("jsonl", "a.jsonl", '{"items": [{"image": "1.png"}]}'), ("table", "a.csv", "image,text\n1.png,a")],
)
def test_tars_beside_the_input_are_of_it(tmp_path: Path, format: str, name: str, content: str) -> None:
    """What was made with others is no part of the same corpus."""
    (tmp_path / name).write_text(content)
    signatures = set()
    for k in range(2):
        source_of(tmp_path, {"0": {"1.png": picture(k)}})
        signatures.add(create(format, tmp_path, None, {}).signature())
    assert len(signatures) == 2


class FailingFile(io.BytesIO):
    def read(self, _size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("format", ["hf", "hf.arrow", "jsonl", "obelics", "table"])
def test_a_tar_that_cannot_be_read_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """It can be resumed when the disk is back; nothing is taken for damage of the table, and lost."""
    source_of(tmp_path / "images", {"0": {f"{k}.png": picture(k) for k in range(4)}})
    names, texts = [f"{k}.png" for k in range(4)], [f"text {k}" for k in range(4)]
    (tmp_path / "in").mkdir()
    options = {}
    if format == "jsonl":
        lines = (json.dumps({"items": [{"image": name}]}) for name in names)
        (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    elif format == "obelics":
        lists = {"images": [[name] for name in names], "texts": pa.array([[None]] * 4, pa.list_(pa.string()))}
        pq.write_table(pa.table(lists), tmp_path / "in/a.parquet")
        options = {"image_name": "{row}"}
    elif format == "table":
        pq.write_table(pa.table({"path": names, "text": texts}), tmp_path / "in/a.parquet")
    else:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        data = pa.table({"image": pa.array([{"path": name} for name in names], kind), "text": texts})
        if format == "hf":
            pq.write_table(data, tmp_path / "in/a.parquet")
        else:
            with pa.OSFile(str(tmp_path / "in/a.arrow"), "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
                writer.write_table(data)
    (tmp_path / "work").mkdir()
    importer, drops = create(format.split(".")[0], tmp_path / "in", tmp_path / "images", options), Drops()
    importer.prepare(tmp_path / "work")
    (unit,) = importer.units()
    assert [len(document.images) for document in importer.documents(unit, drops)] == [1] * 4
    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda p, *how: FailingFile() if p.name == "0.tar" else opened(p, *how))
        with pytest.raises(OSError, match=r"Input/output error: .*0\.tar"):
            list(importer.documents(unit, drops))
    (tmp_path / "images/0.tar").unlink()
    with pytest.raises(OSError, match=r"0\.tar"):
        list(importer.documents(unit, drops))
    assert not drops.bad_counts


@pytest.mark.parametrize("in_files", [False, True])
def test_another_name_with_the_same_64_bits_of_hash_is_not_taken(
    in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among 10^10 images there are some; nothing but a name tells them apart."""
    digest = sources._digest
    monkeypatch.setattr(sources, "_digest", lambda key: (7, digest(key)[1]))
    names = [f"images/{k}.png" for k in range(20)]
    source = source_of(tmp_path / "images", {"0": {name: name.encode() for name in names}})
    if in_files:
        source.prepare(tmp_path)
    assert [read(source, name) for name in names] == [name.encode() for name in names]
    assert read(source, "3.png") == b"images/3.png"
    assert {read(source, f"gone/{k}.jpg") for k in range(20)} == {"file missing"}
