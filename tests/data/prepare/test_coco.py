"""Protects COCO captions: the captions that COCO's own reader finds, with their images."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data import writers
from data.helpers import TOKENIZER, documents_of, plain
from data.writers import picture

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import coco, create
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError


def write(tmp_path: Path, num_images: int = 9) -> Path:
    """Captions in no order; the first image has none, another is fetched by its URL."""
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for k in range(num_images):
        url = f"http://images.cocodataset.org/{k}.jpg"
        name = f"{k:012d}.png" if k != 3 else hashlib.sha256(url.encode()).hexdigest() + ".png"
        (tmp_path / "images" / name).write_bytes(picture(k))
        images.append({"id": 100 + k, "file_name": f"{k:012d}.png", "coco_url": url, "height": 30, "width": 40})
        annotations += [{"id": 7 * k + j, "image_id": 100 + k, "caption": f"caption {k} {j}"} for j in range(k % 4)]
    annotations.sort(key=lambda a: -a["id"])
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"info": {}, "images": images, "licenses": [], "annotations": annotations}))
    return file


@pytest.mark.parametrize(
    ("change", "caption", "noted"),
    [
        (lambda raw: raw.replace(b'"info": {}', b'"info": {"score": NaN}'), "caption 1 0", []),
        (lambda raw: b"\xef\xbb\xbf" + raw, "caption 1 0", []),
        (
            lambda raw: raw.replace(b"caption 1 0", b"caption \xff"),
            "caption \ufffd",
            ["document: invalid UTF-8"],
        ),
        (
            lambda raw: raw.replace(b"caption 1 0", rb"caption \ud83d"),
            "caption \ufffd",
            ["text: invalid Unicode"],
        ),
    ],
    ids=["NaN", "mark", "no UTF-8", "surrogate"],
)
def test_what_other_parsers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes], caption: str, noted: list[str]
) -> None:
    monkeypatch.setattr(coco, "_IMAGES_PER_UNIT", 4)  # what is of the file is noted once
    file = write(tmp_path)
    file.write_bytes(change(file.read_bytes()))
    summary = preprocess("coco", file, tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER)
    corpus = open_corpus(summary.path)
    assert len(corpus) == 15
    assert plain([corpus[1]]) == [[(picture(1), None, None), caption]]
    assert summary.drops.noted_counts == {"document: no caption": 3, **{f"{reason} replaced": 1 for reason in noted}}
    assert not summary.drops.bad_counts


def test_the_captions_that_pycocotools_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("pycocotools.coco")
    file = write(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = reader.COCO(str(file))
    expected: list[list[Any]] = []
    for image, info in theirs.imgs.items():
        shown = (picture(int(info["file_name"][:12])), None, None)
        expected += [[shown, a["caption"]] for a in theirs.imgToAnns[image]] or [[shown]]
    for size in (2, 200):
        monkeypatch.setattr(coco, "_IMAGES_PER_UNIT", size)
        importer = create("coco", file, tmp_path / "images", {})
        found, drops = documents_of(importer)
        assert plain(found) == expected
        assert {(d.metadata["group"], d.metadata["id"]) for d in found} == {
            (f"captions.json:{k}", str(100 + k)) for k in range(9)
        }
        assert (drops.bad_counts, drops.noted_counts) == ({}, {"document: no caption": 3})
    summary = preprocess("coco", file, tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER)
    corpus = open_corpus(summary.path)
    assert plain(list(corpus)) == expected
    assert (corpus.kinds, corpus.name(2)) == (("pairs",), "captions.json:2#0 102")
    assert summary.counts["images"] == 9


def test_tars_beside_the_file_are_of_the_input(tmp_path: Path) -> None:
    """One that is replaced makes another corpus, and what was found in the old one is not used for it."""
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(4)]
    annotations = [{"image_id": k, "caption": str(k)} for k in range(4)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.json").write_text(json.dumps({"images": images, "annotations": annotations}))

    def write_tar(order: list[int]) -> None:
        with tarfile.open(tmp_path / "in/0.tar", "w") as tar:
            for k in order:
                writers._add(tar, f"{k}.png", picture(k))

    write_tar([0, 1, 2, 3])
    first = create("coco", tmp_path / "in", None, {}).signature()
    given = create("coco", tmp_path / "in/a.json", tmp_path / "in", {}).signature()
    jobs = {"tokenizer": TOKENIZER, "task_bytes": 1}
    preprocess("coco", tmp_path / "in", tmp_path / "out", job=(1, 2), **jobs)  # type: ignore[arg-type]
    write_tar([3, 2, 1, 0])
    assert create("coco", tmp_path / "in", None, {}).signature() != first
    # with --images the recipe has the tars by that, and earlier corpora are recognized
    assert create("coco", tmp_path / "in/a.json", tmp_path / "in", {}).signature() == given
    with pytest.raises(UserError, match=r"another unfinished corpus \(different: input\)"):
        preprocess("coco", tmp_path / "in", tmp_path / "out", job=(0, 2), **jobs)  # type: ignore[arg-type]
    documents = documents_of(create("coco", tmp_path / "in", None, {}))[0]
    assert plain(documents) == [[(picture(k), None, None), str(k)] for k in range(4)]


@pytest.mark.usefixtures("no_waiting_lines")
def test_what_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(coco, "_IMAGES_PER_UNIT", 1)
    images = [{"id": 1, "file_name": "no.png"}, {"id": "x"}]
    annotations = [{"image_id": 1, "caption": "a"}, {"image_id": 9, "caption": "b"}, {"image_id": "x"}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "in/b.json").write_text("{")
    (tmp_path / "in/c.json").write_bytes(b'{"images": "x", "\xff": 1}')
    found, drops = documents_of(create("coco", tmp_path / "in", None, {}))
    assert plain(found) == [["a"], [""]]
    assert drops.bad_counts == {
        "document: no COCO captions: it is no JSON": 1,
        "document: no COCO captions: Expected `array`, got `str` - at `$.images`; it has images, '\ufffd'": 1,
        "image: file missing": 1,
        "image: no name": 1,
        "text: caption of an image that is not listed": 1,
        "text: null": 1,
    }
    (tmp_path / "dets.json").write_text(json.dumps({"images": [], "categories": []}))
    command = [
        "preprocess",
        "--format",
        "coco",
        "--input",
        str(tmp_path / "dets.json"),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no COCO captions: Object missing required field `annotations`; it has images, categories" in line
    assert not (tmp_path / "o").exists()
