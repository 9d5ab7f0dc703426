"""Protects: odd images decode as they should, damaged ones are refused, and every drop is counted by its reason."""

from __future__ import annotations

import base64
import io
import json
import random
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from data.helpers import corpus_of, encoded, mutate
from data.writers import picture
from PIL import Image as Pillow

from megatron_lcl.data.corpus.probe import BadImage, downscale, eight_bits, open_image, probe
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.crops import decode_train
from megatron_lcl.data.loading.images import decode_eval, thumbnail
from megatron_lcl.data.pages.inspect import stats, table
from megatron_lcl.data.prepare.verify import verify

BASE = Pillow.open(io.BytesIO(picture(3, 90, 70)))
RED, *OTHERS = (Pillow.new("RGB", (90, 70), color) for color in ("red", "lime", "blue"))
DEEP = np.arange(6300, dtype=np.uint16).reshape(70, 90) * 10
ROTATED = Pillow.Exif()
ROTATED[0x0112] = 6

GOOD: dict[str, tuple[bytes, tuple[int, int]]] = {
    "cmyk jpeg": (encoded(BASE.convert("CMYK"), "JPEG"), (90, 70)),
    "gray jpeg": (encoded(BASE.convert("L"), "JPEG"), (90, 70)),
    "progressive jpeg": (encoded(BASE, "JPEG", progressive=True), (90, 70)),
    "jpeg rotated by exif": (encoded(BASE, "JPEG", exif=ROTATED), (70, 90)),
    "palette png": (encoded(BASE.convert("P"), "PNG"), (90, 70)),
    "palette png with transparency": (encoded(BASE.convert("P"), "PNG", transparency=3), (90, 70)),
    "gray and alpha png": (encoded(BASE.convert("LA"), "PNG"), (90, 70)),
    "1-bit png": (encoded(BASE.convert("1"), "PNG"), (90, 70)),
    "16-bit png": (encoded(Pillow.fromarray(DEEP), "PNG"), (90, 70)),
    "16-bit big-endian tiff": (
        encoded(Pillow.frombytes("I;16B", (90, 70), DEEP.astype(">u2").tobytes()), "TIFF"),
        (90, 70),
    ),
    "tiff rotated by exif": (encoded(BASE, "TIFF", exif=ROTATED), (70, 90)),
    "lab tiff": (encoded(Pillow.new("LAB", (90, 70)), "TIFF"), (90, 70)),
    "rgba webp": (encoded(BASE.convert("RGBA"), "WEBP"), (90, 70)),
    "animated gif": (encoded(RED, "GIF", save_all=True, append_images=OTHERS), (90, 70)),
    "animated webp": (encoded(RED, "WEBP", save_all=True, append_images=OTHERS), (90, 70)),
    "animated png": (encoded(RED, "PNG", save_all=True, append_images=OTHERS), (90, 70)),
    "animated avif": (encoded(RED, "AVIF", save_all=True, append_images=OTHERS), (90, 70)),
    "avif": (encoded(BASE, "AVIF"), (90, 70)),
    "bmp": (encoded(BASE, "BMP"), (90, 70)),
    "jpeg with junk after its end": (encoded(BASE, "JPEG") + b"junk" * 9, (90, 70)),
}


def with_scans(jpeg: bytes, number: int) -> bytes:
    """A progressive JPEG whose last scan stands so many times more."""
    end = jpeg.rindex(b"\xff\xd9")
    return jpeg[:end] + jpeg[jpeg.rindex(b"\xff\xda") : end] * number + jpeg[end:]


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML, not an image"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git-LFS pointer, not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG or XML, not a bitmap"),
    "svg with a byte order mark": (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "SVG or XML, not a bitmap"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC, which cannot be read"),
    "jpeg xl": (b"\xff\x0a" + bytes(99), "JPEG XL, which cannot be read"),
    "jpeg xl in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL, which cannot be read"),
    "noise": (bytes(range(256)) * 4, "not an image, or a format that cannot be read"),
    "truncated jpeg": (encoded(BASE, "JPEG")[:-900], "truncated or damaged"),
    "truncated png": (picture(5, 90, 70)[:-4000], "truncated or damaged"),
    "truncated webp": (encoded(BASE, "WEBP", lossless=True)[:-4000], "."),
    "cut header": (encoded(BASE, "JPEG")[:50], "."),
    "jpeg of 1,000 scans": (with_scans(GOOD["progressive jpeg"][0], 1000), "too many scans"),
    "bomb": (encoded(Pillow.new("1", (9_500, 9_500)), "PNG"), "too many pixels"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images(name: str) -> None:
    data, size = GOOD[name]
    found = probe(data)
    assert (found.width, found.height) == size
    assert decode_eval(data, 32).shape == (3, 32, 32)  # what passes here, training decodes


@pytest.mark.parametrize("name", [name for name in GOOD if name.startswith("animated")])
def test_of_an_animation_the_first_frame(name: str) -> None:
    data = GOOD[name][0]
    assert Pillow.open(io.BytesIO(data)).n_frames == 3
    for pixels in (
        decode_eval(data, 32),
        decode_train(data, 32, lambda: 0.5),
        decode_eval(downscale(data, 45), 32),
        decode_eval(base64.b64decode(thumbnail(data, 32).split(",")[1]), 32),
    ):
        assert (pixels.mean((1, 2)) > 230).tolist() == [True, False, False], name


def test_sixteen_bits_keep_their_levels() -> None:
    expected = DEEP / 257
    for name in ("16-bit png", "16-bit big-endian tiff"):
        for data in (GOOD[name][0], downscale(GOOD[name][0], 89)):
            gray = decode_eval(data, 70)[0].astype(float)
            assert np.abs(gray - expected[:, 10:80]).mean() < 4, name


@pytest.mark.parametrize("at", [0, 7, 300 * 4 - 1])
def test_gray_levels_beside_what_is_no_number(at: int) -> None:
    """Above 255 they are of 16 bits; a picture of 300 rows is looked at in strips."""
    levels = np.full(1200, 40 * 257, np.float32)
    levels[at] = np.nan
    with np.errstate(invalid="ignore"):
        gray = np.asarray(eight_bits(Pillow.fromarray(levels.reshape(300, 4)))).ravel()
    assert set(np.delete(gray, at)) == {40}
    assert set(np.asarray(eight_bits(Pillow.fromarray(np.full((300, 4), 40.4, np.float32)))).ravel()) == {40}


@pytest.mark.parametrize("highest", [1.0, 0.25])
def test_float_levels_of_at_most_one_are_shares_of_white(highest: float) -> None:
    shares = np.linspace(-0.1, highest, 6300, dtype=np.float32).reshape(70, 90)
    data = encoded(Pillow.fromarray(shares), "TIFF")
    expected = np.clip(255 * shares, 0, 255)
    assert np.abs(np.asarray(eight_bits(open_image(data))) - expected).max() <= 0.501
    for shown in (data, downscale(data, 89)):
        assert np.abs(decode_eval(shown, 70)[0] - expected[:, 10:80]).mean() < 4
    black = Pillow.fromarray(np.zeros((70, 90), np.float32))
    assert eight_bits(black).getextrema() == (0, 0)
    assert eight_bits(Pillow.fromarray(np.full((70, 90), 1, np.int32))).getextrema() == (1, 1), "whole numbers"


def mutated_header(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed in the EXIF data, or near the start; a PNG's checksum is made to agree."""
    found = [at + len(mark) for mark in (b"Exif\0\0", b"eXIf", b"EXIF") if (at := data.find(mark)) >= 0]
    raw, start = bytearray(data), min(found, default=0) if rng.random() < 0.8 else 0
    for _ in range(rng.choice((1, 2, 4, 8))):
        at = start + rng.randrange(min(300, len(raw) - start))
        raw[at] = rng.choice((*range(14), 255, rng.randrange(256)))
    if (at := raw.find(b"eXIf")) >= 0:
        length = int.from_bytes(raw[at - 4 : at], "big")
        raw[at + 4 + length : at + 8 + length] = zlib.crc32(raw[at : at + 4 + length]).to_bytes(4, "big")
    return bytes(raw)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF data
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_damaged_images_raise_what_is_declared(format: str, request: pytest.FixtureRequest) -> None:
    """What passes the check decodes everywhere; nothing else than BadImage comes out."""
    exif = Pillow.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    exif[0x8769], exif[0x8825] = {36867: "2020:01:01", 33434: (1, 100)}, {2: (1.0, 2.0, 3.0)}
    data = encoded(BASE, format, **({} if format in ("GIF", "TIFF") else {"exif": exif}))
    passed = 0
    for seed in range(3_000 if request.config.getoption("--soak") else 300):
        rng = random.Random(seed)
        damaged = mutated_header(data, rng) if seed % 3 else mutate(data, rng)
        try:
            size = probe(damaged)
        except BadImage:
            size = None
        try:
            small = downscale(damaged, 45)
        except BadImage:
            assert size is None
        else:
            assert size is None or max(decode_eval(small, 32).shape) == 32
        for decode in (decode_eval, partial(decode_train, draw=lambda: 0.5)):
            try:
                assert decode(damaged, 32).shape == (3, 32, 32)
            except BadImage:
                assert size is None
        thumbnail(damaged, 32)
        passed += size is not None
    assert passed > 10


@pytest.mark.parametrize("name", BAD)
def test_bad_images(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImage, match=reason):
        probe(data)


def test_scans_of_jpegs() -> None:
    """Many more than encoders write are decoded; what stands behind a picture has no scans."""
    jpeg = GOOD["progressive jpeg"][0]
    assert probe(with_scans(jpeg, 400)).height == 70
    behind = (b"\xff\xda" + bytes((1 << 16) - 2)) * 600
    assert probe(jpeg + behind).height == 70
    with pytest.raises(BadImage, match="too many scans"):
        probe(with_scans(jpeg, 1200) + behind)


def test_scans_of_a_jpeg_of_several_pictures() -> None:
    """Of a stereo camera, say: an MPO, whose first picture counts."""
    data = encoded(BASE, "MPO", save_all=True, append_images=[BASE], progressive=True)
    assert probe(data).format == "MPO"
    end = data.index(b"\xff\xd9") + 2
    with pytest.raises(BadImage, match="too many scans"):
        probe(with_scans(data[:end], 1000) + data[end:])


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


def test_every_drop_is_counted_by_reason(tmp_path: Path) -> None:
    good, secret = picture(0), tmp_path / "secret.png"
    secret.write_bytes(good)
    items = [
        {"text": "first \ud800"}, {"image": "good.png"}, {"text": None}, {"text": " \n\t"}, {"text": 5}, {"other": 1},
        {"image": "../secret.png"}, {"image": str(secret)}, {"image": "C:\\x.png"}, {"image": ""}, {"image": 7},
        {"image": "gone.png"}, {"image": "html.jpg"}, {"image": "lfs.webp"}, {"image": "dot.gif"}, {"image": "a\0b"},
        {"image": "row.gif"}, {"image": "column.gif"},
        {"text": "last \ud800."},
        {"image": "good.png", "similarity": 0.5, "matched_text_index": 4},
        {"image": "good.png", "similarity": float("nan"), "matched_text_index": 0},
        {"image": "good.png", "similarity": True, "matched_text_index": 0},
        {"image": "good.png", "similarity": 0.5, "matched_text_index": 1},
        {"image": "good.png", "similarity": 0.5, "matched_text_index": 5},
        {"image": "good.png", "similarity": 0.5, "matched_text_index": -1},
    ]  # fmt: skip
    lines = [{"items": items}, {"items": [{"image": "gone.png"}]}, {"items": 3}, 4, b'{"items": [{"text": "x\xff"}]}',
             b"[" * 100_000, b'{"items": [{"te']  # fmt: skip
    sizes = {"dot.gif": (1, 1), "row.gif": (5, 1), "column.gif": (1, 5)}
    images = {"good.png": good, "html.jpg": BAD["html"][0], "lfs.webp": BAD["lfs"][0]}
    images |= {name: encoded(Pillow.new("P", size), "GIF") for name, size in sizes.items()}
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
        "image: similarity is not a number": 2,
        "image: matched text is blank": 1,
        "image: matched text out of range": 2,
        "document: nothing left, its images are missing or bad": 1,
        'document: no list "items"': 1,
        "document: not a JSON object": 1,
        "document: not JSON": 1,
        "document: cut last line": 1,
    }
    assert drops.left_out_counts == {"text: blank": 1, "image: 1x1 pixel": 1}
    assert drops.noted_counts == {"text: invalid Unicode replaced": 2, "document: invalid UTF-8 replaced": 1}

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
    assert [t.text for t in first.texts] == ["first \ufffd", " \n\tlast \ufffd."]
    assert [(i.data, i.similarity, i.matched_text) for i in first.images] == [
        (good, None, None),
        (images["row.gif"], None, None),
        (images["column.gif"], None, None),
        (good, 0.5, 1),
    ]
    assert [t.text for t in second.texts] == ["x\ufffd"]
