"""What real collections are full of: odd images, names that lead outside, damaged files. Every drop is counted."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from megatron_lcl.data.document import Document, Image, Text
from megatron_lcl.data.drops import Drops
from megatron_lcl.data.images import decode_eval
from megatron_lcl.data.importers import create
from megatron_lcl.data.inspect import stats, table
from megatron_lcl.data.preprocess import Summary, preprocess
from megatron_lcl.data.probe import BadImage, downscale, probe
from megatron_lcl.data.store import open_corpus
from megatron_lcl.data.verify import verify

from . import writers
from .test_formats import TOKENIZER
from .writers import picture


def encoded(image: Pillow.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


BASE = Pillow.open(io.BytesIO(picture(3, 90, 70)))
FRAMES = [Pillow.open(io.BytesIO(picture(k, 90, 70))) for k in range(3)]
ROTATED = Pillow.Exif()
ROTATED[0x0112] = 6

GOOD: dict[str, tuple[bytes, tuple[int, int]]] = {
    "cmyk jpeg": (encoded(BASE.convert("CMYK"), "JPEG"), (90, 70)),
    "grey jpeg": (encoded(BASE.convert("L"), "JPEG"), (90, 70)),
    "progressive jpeg": (encoded(BASE, "JPEG", progressive=True), (90, 70)),
    "jpeg rotated by exif": (encoded(BASE, "JPEG", exif=ROTATED), (70, 90)),
    "palette png": (encoded(BASE.convert("P"), "PNG"), (90, 70)),
    "palette png with transparency": (encoded(BASE.convert("P"), "PNG", transparency=3), (90, 70)),
    "grey and alpha png": (encoded(BASE.convert("LA"), "PNG"), (90, 70)),
    "1-bit png": (encoded(BASE.convert("1"), "PNG"), (90, 70)),
    "16-bit png": (encoded(Pillow.fromarray(np.arange(6300, dtype=np.uint16).reshape(70, 90)), "PNG"), (90, 70)),
    "rgba webp": (encoded(BASE.convert("RGBA"), "WEBP"), (90, 70)),
    "animated gif": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), (90, 70)),
    "animated webp": (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), (90, 70)),
    "animated png": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), (90, 70)),
    "avif": (encoded(BASE, "AVIF"), (90, 70)),
    "bmp": (encoded(BASE, "BMP"), (90, 70)),
    "jpeg with junk after its end": (encoded(BASE, "JPEG") + b"junk" * 9, (90, 70)),
}

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML, not an image"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git-LFS pointer, not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG or XML, not a bitmap"),
    "noise": (bytes(range(256)) * 4, "not an image, or a format that cannot be read"),
    "truncated jpeg": (encoded(BASE, "JPEG")[:-900], "truncated or damaged"),
    "truncated png": (picture(5, 90, 70)[:-4000], "truncated or damaged"),
    "truncated webp": (encoded(BASE, "WEBP", lossless=True)[:-4000], "."),
    "cut header": (encoded(BASE, "JPEG")[:50], "."),
    "bomb": (encoded(Pillow.new("1", (20_000, 20_000)), "PNG"), "too many pixels"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images(name: str) -> None:
    data, size = GOOD[name]
    found = probe(data)
    assert (found.width, found.height) == size
    assert decode_eval(data, 32).shape == (3, 32, 32)  # what passes here, training decodes


@pytest.mark.parametrize("name", BAD)
def test_bad_images(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImage, match=reason):
        probe(data)


@pytest.mark.parametrize("name", GOOD)
def test_downscale(name: str) -> None:
    data, (width, height) = GOOD[name]
    small = probe(downscale(data, 45))
    assert max(small.width, small.height) == 45
    assert small.width / small.height == pytest.approx(width / height, rel=0.05)
    assert downscale(data, 90) == data


def test_real_odd_images(shared: Path) -> None:
    files = sorted((shared / "samples/images").iterdir())
    assert len(files) >= 5
    for file in files:
        assert probe(file.read_bytes()).width == Pillow.open(file).width


def corpus_of(tmp_path: Path, lines: list[Any], images: dict[str, bytes], **options: Any) -> Summary:
    (tmp_path / "in").mkdir()
    for name, data in images.items():
        (tmp_path / "in" / name).write_bytes(data)
    raw = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    (tmp_path / "in" / "a.jsonl").write_bytes(raw)
    return preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1, **options)


def test_every_drop_is_counted_by_reason(tmp_path: Path) -> None:
    good, secret = picture(0), tmp_path / "secret.png"
    secret.write_bytes(good)
    items = [
        {"text": "first"}, {"image": "good.png"}, {"text": None}, {"text": " \n\t"}, {"text": 5}, {"other": 1},
        {"image": "../secret.png"}, {"image": str(secret)}, {"image": "C:\\x.png"}, {"image": ""}, {"image": 7},
        {"image": "gone.png"}, {"image": "html.jpg"}, {"image": "lfs.webp"}, {"image": "dot.gif"}, {"image": "a\0b"},
        {"text": "last \ud800."},
        {"image": "good.png", "similarity": 0.5, "matched_text_index": 4},
        {"image": "good.png", "similarity": float("nan"), "matched_text_index": 0},
        {"image": "good.png", "similarity": 0.5, "matched_text_index": 1},
        {"image": "good.png", "similarity": 0.5, "matched_text_index": 5},
        {"image": "good.png", "similarity": 0.5, "matched_text_index": -1},
    ]  # fmt: skip
    lines = [{"items": items}, {"items": [{"image": "gone.png"}]}, {"items": 3}, 4, b'{"items": [{"text": "x\xff"}]}',
             b"[" * 100_000, b'{"items": [{"te']  # fmt: skip
    dot = encoded(Pillow.new("P", (1, 1)), "GIF")
    images = {"good.png": good, "html.jpg": BAD["html"][0], "lfs.webp": BAD["lfs"][0], "dot.gif": dot}
    drops = corpus_of(tmp_path, lines, images).drops
    assert drops.bad_counts == {
        "text: null": 1,
        "text: not a string": 1,
        'text: an item without one of "text" and "image"': 1,
        "image: name leads outside the folder": 4,
        "image: no name": 2,
        "image: file missing": 2,
        "image: HTML, not an image": 1,
        "image: Git-LFS pointer, not an image": 1,
        "image: similarity is not a number": 1,
        "image: matched text is blank": 1,
        "image: matched text out of range": 2,
        "document: nothing left": 1,
        'document: no list "items"': 1,
        "document: not a JSON object": 1,
        "document: not JSON": 1,
        "document: cut last line": 1,
    }
    assert drops.left_out_counts == {"text: blank": 1, "image: 1x1 pixel": 1}
    assert drops.noted_counts == {"text: invalid Unicode replaced": 1, "document: invalid UTF-8 replaced": 1}

    log = [json.loads(line) for line in (tmp_path / "out" / "drops.jsonl").read_text("utf-8").splitlines()]
    counts = {what: {row["reason"]: row["count"] for row in log if row["what"] == what} for what in ("bad", "left out")}
    assert counts == {"bad": drops.bad_counts, "left out": drops.left_out_counts}
    (missing,) = [row["names"] for row in log if row["reason"] == "image: file missing"]
    assert [name.split(": ")[1] for name in missing] == ["gone.png", "gone.png"]
    assert "gone.png" in table(stats(open_corpus(tmp_path / "out")))
    assert "drops.jsonl" in open_corpus(tmp_path / "out").manifest["files"]
    assert not verify(tmp_path / "out")
    with (tmp_path / "out" / "drops.jsonl").open("ab") as file:
        file.write(b"{}\n")
    assert verify(tmp_path / "out")[0].startswith("drops.jsonl")

    first, second = open_corpus(tmp_path / "out")
    assert [t.text for t in first.texts] == ["first", "last \ufffd."]
    assert [(i.data == good, i.similarity, i.matched_text) for i in first.images] == [
        (True, None, None),
        (True, 0.5, 1),
    ]
    assert [t.text for t in second.texts] == ["x\ufffd"]


# --- MMC4 --------------------------------------------------------------------------------------------------------


def mmc4(tmp_path: Path, pages: list[Any], images: dict[str, bytes], name: str = "docs_shard_0_v2.jsonl") -> Summary:
    (tmp_path / "in").mkdir()
    (tmp_path / "images").mkdir()
    for image, data in images.items():
        (tmp_path / "images" / image).write_bytes(data)
    (tmp_path / "in" / name).write_text("\n".join(map(json.dumps, pages)))
    return preprocess("mmc4", tmp_path / "in", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER,
                      max_bad_fraction=1)  # fmt: skip


def info(name: Any, index: Any, similarity: Any = 0.5) -> dict[str, Any]:
    return {"image_name": name, "matched_text_index": index, "matched_sim": similarity}


def test_mmc4_oddities(tmp_path: Path) -> None:
    page = {
        "text_list": ["a", "b", None, "d"],
        "image_info": [
            info("2.png", 3), info("0.png", 1, 0.25), info("1.png", 1), info("0.png", 2), info("0.png", None),
            info("0.png", 4), info("0.png", -1), info("../x", 0), info("0.png", 0, float("nan")), info(None, 0),
            info("0.png", "1"), None, info("0.png", 0, None),
        ],
    }  # fmt: skip
    matrix = [[0.0, 0.125], [0.5, 0.75]]
    from_matrix = {"text_list": ["x", "y"], "image_info": [info("0.png", 1, None), info("1.png", 0, None)],
                   "similarity_matrix": matrix}  # fmt: skip
    wrong = {"text_list": ["x", "y"], "image_info": [info("0.png", 1)], "similarity_matrix": matrix}
    images = {f"{k}.png": picture(k) for k in range(3)}
    summary = mmc4(tmp_path, [page, from_matrix, wrong, {"text_list": None}, {"text_list": ["z"]}], images)
    documents = list(open_corpus(tmp_path / "out"))
    # two images share a sentence, image_info is in no order, the null sentence is gone
    assert [i.text if isinstance(i, Text) else (i.data, i.similarity, i.matched_text) for i in documents[0].items] == [
        "a", (picture(0), 0.25, 1), (picture(1), 0.5, 1), "b", (picture(2), 0.5, 2), "d",
    ]  # fmt: skip
    assert [(i.data, i.similarity) for i in documents[1].images] == [(picture(1), 0.5), (picture(0), 0.125)]
    assert [i.matched_text for i in documents[1].images] == [0, 1]
    assert summary.drops.bad_counts == {
        "document: no text_list": 1,
        "image: matched text is blank": 1,
        "image: matched text null": 1,
        "image: matched text out of range": 3,
        "image: name leads outside the folder": 1,
        "image: no image_info": 1,
        "image: no name": 2,
        "image: no similarity": 1,
        "image: similarity is not a number": 1,
        "text: null": 1,
    }
    assert summary.drops.noted_counts == {"document: similarity_matrix of the wrong size": 1}


def test_mmc4_shards_in_number_order_with_gaps_and_images_in_tars(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "images").mkdir()
    for shard in (10, 2, 5):
        line = json.dumps({"text_list": [f"shard {shard}"], "image_info": [info(f"{shard}.png", 0)]})
        with zipfile.ZipFile(tmp_path / f"in/docs_no_face_shard_{shard}_v3.jsonl.zip", "w") as archive:
            archive.writestr("whatever", line)
        with tarfile.open(tmp_path / f"images/{shard}.tar", "w") as tar:
            writers._add(tar, f"folder/{shard}.png", picture(shard))
    summary = preprocess("mmc4", tmp_path / "in", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER)
    assert [d.texts[0].text for d in open_corpus(tmp_path / "out")] == ["shard 2", "shard 5", "shard 10"]
    assert [d.images[0].data for d in open_corpus(tmp_path / "out")] == [picture(2), picture(5), picture(10)]
    assert summary.drops.noted_counts == {"document: shards that are not there": 6}


def test_mmc4_sample_without_its_images(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images are bad \(100%.*no image folder was given"):
        preprocess("mmc4", shared / "samples/mmc4", tmp_path / "out", tokenizer="clip")
    assert not (tmp_path / "out").exists()
    summary = preprocess("mmc4", shared / "samples/mmc4", tmp_path / "out", tokenizer="clip", max_bad_fraction=1)
    assert summary.counts["documents"] == 60


def test_webdataset_sample_without_captions(shared: Path, tmp_path: Path) -> None:
    summary = preprocess("webdataset", shared / "samples/pairs", tmp_path / "out", tokenizer=TOKENIZER)
    assert summary.drops.noted_counts["document: no caption"] == summary.counts["documents"] > 0


@pytest.mark.parametrize("suffix", [".jsonl.zip", ".jsonl.gz", ".jsonl.zst"])
def test_truncated_shards_give_what_they_hold(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    lines = "".join(json.dumps({"text_list": [rng.randbytes(40).hex()], "image_info": []}) + "\n" for _ in range(9000))
    file = tmp_path / f"docs_shard_0_v2{suffix}"
    if suffix == ".jsonl.zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x", lines)
    elif suffix == ".jsonl.gz":
        import gzip

        file.write_bytes(gzip.compress(lines.encode()))
    else:
        import zstandard

        file.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    summary = preprocess("mmc4", file, tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=0.2)
    assert 4000 < summary.counts["documents"] < 7000
    assert summary.drops.bad_counts["document: truncated file, the lines after it are lost"] == 1


# --- parquet, tars -----------------------------------------------------------------------------------------------


def test_obelics_oddities(tmp_path: Path) -> None:
    rows = [
        {"images": ["http://x/a", None, None], "texts": [None, "t", None]},
        {"images": ["http://x/a"], "texts": ["both"]},
        {"images": ["http://x/a"], "texts": ["t", "u"]},
        {"images": None, "texts": ["t"]},
        {"images": ["http://x/../../etc/passwd"], "texts": [None]},
    ]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in/a.parquet")
    (tmp_path / "in/b.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "in/c.parquet")
    (tmp_path / "images").mkdir()
    for row in range(2):
        (tmp_path / f"images/a_{row}_0.png").write_bytes(picture(row))
    summary = preprocess("obelics", tmp_path / "in", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER,
                         max_bad_fraction=1, options={"image_name": "{file}_{row}_{position}"})  # fmt: skip
    assert [d.images[0].data for d in open_corpus(tmp_path / "out")] == [picture(0), picture(1)]
    assert summary.drops.bad_counts == {
        "document: damaged parquet file": 1,
        "document: images and texts are not lists of one length": 2,
        "document: no columns images and texts": 1,
        "document: nothing left": 1,
        "image: file missing": 1,
        "text: both image and text at one position": 1,
        "text: null": 1,
    }
    with pytest.raises(ValueError, match=r"it may use \{sha256\}"):
        preprocess("obelics", tmp_path / "in", tmp_path / "o2", tokenizer=TOKENIZER, options={"image_name": "{nope}"})


def test_mint1t_with_another_number_of_frames(tmp_path: Path) -> None:
    documents = [Document((Image(picture(0)), Text("a"), Image(picture(1)))), Document((Text("b"), Image(picture(2))))]
    writers.write_mint1t(documents, tmp_path / "in")
    path = tmp_path / "in/00000.tar"
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    tiffs = [data for name, data in members if name.endswith("tiff")]
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            writers._add(archive, name, tiffs[1] if name == "000000.tiff" else data)
    summary = preprocess("mint1t", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    assert summary.drops.bad_counts == {"image: TIFF with another number of frames": 2}
    assert [len(d.images) for d in open_corpus(tmp_path / "out")] == [0, 1]


# --- fuzz --------------------------------------------------------------------------------------------------------

DOCUMENTS = [
    Document((Text(f"text {k}"), Image(picture(k), "", 0.5, 0), Text("more"), Image(picture(k + 1), "", 0.25, 1)))
    for k in range(12)
]
PLAIN = [Document(tuple(Image(i.data) if isinstance(i, Image) else i for i in d.items)) for d in DOCUMENTS]
WRITE: dict[str, Callable[[Path], Path | None]] = {
    "jsonl": lambda folder: writers.write_jsonl(DOCUMENTS, folder / "in"),
    "mmc4": lambda folder: writers.write_mmc4(DOCUMENTS, folder / "in", folder / "images"),
    "obelics": lambda folder: writers.write_parquet(PLAIN, folder / "in", folder / "images", False),
    "omnicorpus": lambda folder: writers.write_parquet(PLAIN, folder / "in", folder / "images", True),
    "mint1t": lambda folder: writers.write_mint1t(PLAIN, folder / "in"),
    "webdataset": lambda folder: writers.write_webdataset([Document((d.images[0], d.texts[0])) for d in PLAIN],
                                                          folder / "in"),
    "html": lambda folder: _write_html(folder / "in"),
}  # fmt: skip


def _write_html(folder: Path) -> None:
    folder.mkdir()
    for k in range(12):
        (folder / f"{k}.png").write_bytes(picture(k, 80, 70))
        page = f"<html><body><h1>{k}</h1><p>Some <b>text</b> {k}<img src='{k}.png'>after<pre>a\n b</pre></body></html>"
        (folder / f"{k}.html").write_text(page)


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Flip bits, overwrite, insert, delete or repeat a stretch, or cut the end."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        if not data:
            break
        at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 16, 200))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            data[at:at] = rng.choice(
                (b'"', b"\\u0000", b"null", b"{", b"]", b"\n", b"\xff", b"-1", b"1e999", b"<", b"\0")
            )
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("format", WRITE)
def test_mutated_input_never_crashes_and_counts_add_up(
    format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    WRITE[format](tmp_path)
    originals = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    images = tmp_path / "images" if (tmp_path / "images").exists() else None
    rounds = 400 if request.config.getoption("--soak") else 25
    for seed in range(rounds):
        rng = random.Random(f"{format} {seed}")
        for path, raw in originals.items():
            path.write_bytes(mutate(raw, rng) if rng.random() < 0.5 else raw)
        importer, drops = create(format, tmp_path / "in", images, {}), Drops()
        documents = [d for unit in importer.units() for d in importer.documents(unit, drops)]
        yielded = sum(len(d.images) for d in documents), sum(bool(t.text) for d in documents for t in d.texts)
        output = tmp_path / f"out-{seed}"
        try:
            summary = preprocess(
                format, tmp_path / "in", output, images=images, tokenizer=TOKENIZER, max_bad_fraction=1
            )
        except ValueError as error:
            if "no usable document" not in str(error):
                raise
            continue
        counts, total = summary.counts, summary.drops
        for kind, kept, given in (
            ("image", counts["placements"], yielded[0]),
            ("text", counts["pieces"] - counts["placements"], yielded[1]),
            ("document", counts["documents"], len(documents)),
        ):
            dropped, before = (
                sum(n for c in (d.bad_counts, d.left_out_counts) for key, n in c.items() if key.startswith(kind + ":"))
                for d in (total, drops)
            )
            assert kept + dropped - before == given, (seed, kind)
        assert not verify(output)
