"""Does an encoded image decode, how large is it, how is it oriented? Every image of a corpus has passed this check,
and every decoder relies on it."""

from __future__ import annotations

import codecs
import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image as Pillow

from megatron_lcl.data.corpus.image_columns import FORMATS

MAX_PIXELS = 89_478_485
"""above this Pillow suspects a decompression bomb; decoded, so many take 360 MB"""
TOO_MANY_PIXELS = "too many pixels"
_OPENED = [format for format in FORMATS if format not in ("?", "MPO")]
"""not all that Pillow knows, as it hands EPS to Ghostscript; an MPO opens as a JPEG"""
DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    RuntimeError, MemoryError, struct.error, zlib.error, Pillow.DecompressionBombError,
)  # fmt: skip
"""what Pillow and the libraries behind it raise for damaged files"""
MAX_SCANS = 500
"""of a JPEG: each is decoded for all of the picture, and those that encoders write have at most some tens"""
FAST_FRAMES = (0xC0, 0xC1, 0xC2)
"""frames that simplejpeg may decode: Huffman-coded and lossy"""
_LOSSLESS_FRAMES = (0xC3, 0xC7, 0xCB, 0xCF)
"""libjpeg-turbo does not scale them; simplejpeg takes it that it does, and writes behind the pixels' memory"""
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff([^\xff\x00\x01\xd0-\xd7])", re.DOTALL)
"""with fill bytes before it; not those without a length"""
_ROWS = 32
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the picture upright"""
_EIGHT_BITS: dict[str, Callable[[Any], int | tuple[int, ...]]] = {
    "L;2": lambda level: 85 * level,
    "L;4": lambda level: 17 * level,
    "RGB;16B": lambda levels: tuple(level >> 8 for level in levels),
}
"""how Pillow packs a PNG's pixels → its transparent color, of 2, 4 or 16 bits, in the 8 bits that pixels have then"""
_PHOTOMETRIC = 262
"""of a TIFF: 0 where the lowest level is white"""


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Size in pixels, as shown (after the orientation that EXIF asks for), and Pillow's name of the format."""

    width: int
    height: int
    format: str


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Of the files that `open_image` opens, as this machine's Pillow names them: `.jpg`, `.jfif`, `.avif` …"""
    return frozenset(suffix for suffix, format in Pillow.registered_extensions().items() if format in FORMATS)


def open_image(data: bytes) -> Pillow.Image:
    """Pillow's lazily decoded image, of one of the corpus's formats (`image_columns.FORMATS`); one of DAMAGE if it is
    none, ValueError for a lossless JPEG."""
    image = Pillow.open(io.BytesIO(data), formats=_OPENED)
    if image.format in ("JPEG", "MPO") and jpeg_header(data)[0] in _LOSSLESS_FRAMES:
        raise ValueError(what_it_is(data))
    return image


def jpeg_header(data: bytes) -> tuple[int, int]:
    """(marker of a JPEG's frame, 0xC0 … 0xCF; offset of its first scan), read as libjpeg does (`next_marker` and
    `read_markers` of jdmarker.c), which skips what is no marker.

    (0, length of the data) where libjpeg finds no picture: no scan, no frame before it, or two.
    """
    frame, at = 0, 2
    if data[:2] == b"\xff\xd8":
        while found := _MARKER.search(data, at):
            marker, at = found[1][0], found.end()
            if marker == 0xDA:
                return (frame, at - 2) if frame else (0, len(data))
            is_frame = 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
            if marker in (0xD8, 0xD9) or (is_frame and frame):
                break
            if is_frame:
                frame = marker
            at += int.from_bytes(data[at : at + 2], "big")
    return 0, len(data)


def probe(data: bytes, max_pixels: int = MAX_PIXELS) -> Probe:
    """Decode the first frame and discard it. BadImage says what is wrong: empty, truncated, too many pixels …"""
    if not data:
        raise BadImage("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = open_image(data)
        except Pillow.DecompressionBombError:
            raise BadImage(TOO_MANY_PIXELS) from None
        except DAMAGE:
            raise BadImage(what_it_is(data)) from None
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(TOO_MANY_PIXELS)
        # in coded pixels the marker cannot stand; in what else a file holds, a film say, once in 64 KiB by chance
        if image.format in ("JPEG", "MPO") and data.count(_SCAN) > MAX_SCANS + (len(data) >> 16):
            raise BadImage("too many scans")
        try:
            if not (image.format == "JPEG" and image.mode in ("RGB", "L") and _reads_as_jpeg(data)):
                image.load()
        except Pillow.DecompressionBombError:
            raise BadImage(TOO_MANY_PIXELS) from None
        except DAMAGE:
            raise BadImage("truncated or damaged") from None
        if orientation(image) >= 5:
            width, height = height, width
    return Probe(width, height, image.format or "?")


def orientation(image: Pillow.Image) -> int:
    """EXIF's orientation, 1 … 8; 1, as it lies, where there is none or the EXIF data are damaged."""
    try:
        value = image.getexif().get(_ORIENTATION)
        return value if value in _UPRIGHT else 1
    except DAMAGE:
        return 1


def upright(image: Pillow.Image) -> Pillow.Image:
    """The picture decoded, and turned as its EXIF data say. (Pillow's own function also rewrites them, and fails if it
    cannot.) What is transparent is what the format means by it."""
    image = _loaded(image)
    turn = _UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _loaded(image: Pillow.Image) -> Pillow.Image:
    tiles = getattr(image, "tile", ())  # none of a picture that is decoded already
    raw = tiles[0][3] if image.format == "PNG" and tiles else None
    image.load()  # of a TIFF, Pillow applies the orientation here
    color = image.info.get("transparency")
    if color is not None and raw in _EIGHT_BITS:
        image.info["transparency"] = _EIGHT_BITS[raw](color)
    if image.format in ("BMP", "ICO") and image.mode == "RGBA" and not any(image.getchannel("A").getextrema()):
        image = image.convert("RGB")  # programs that know no transparency leave these bytes 0
    return image


def eight_bits(image: Pillow.Image) -> Pillow.Image:
    """Gray levels of 16 bits, whole numbers or floats as 8-bit gray, with alpha where 16 bits have a transparent level;
    other pictures as they are.

    Levels above 255 are of 16 bits, floats of at most 1 are shares of white. What lies outside is black or white.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    deep = image.mode.startswith("I;16")
    highest = 0 if deep else max(np.fmax.reduce(levels, axis=None, initial=0) for _, levels in _strips(image))
    white = 65_535 if deep or highest > 255 else 1 if image.mode == "F" and highest <= 1 else 255
    transparent, negative = image.info.get("transparency") if deep else None, is_negative(image)
    gray = Pillow.new("L", image.size)
    alpha = None if transparent is None else Pillow.new("L", image.size)
    for top, levels in _strips(image):
        shares = np.clip(levels / white, 0, 1)
        shares = np.nan_to_num(1 - shares if negative else shares)  # what is no number is black
        eight = (255 * shares + 0.5).astype(np.uint8)
        gray.paste(Pillow.fromarray(eight), (0, top))
        if alpha is not None:
            alpha.paste(Pillow.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)), (0, top))
    if alpha is not None:
        gray.putalpha(alpha)
    return gray


def is_negative(image: Pillow.Image) -> bool:
    """Whether the lowest of a TIFF's deep gray levels is white, which Pillow turns for up to 8 bits only."""
    return image.mode.startswith(("I", "F")) and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def _strips(image: Pillow.Image) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows as float64); all of a large picture would take 700 MB."""
    for top in range(0, image.height, _ROWS):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + _ROWS, image.height))), np.float64)


def _reads_as_jpeg(data: bytes) -> bool:
    """A quick check of the whole file; False also for faults that Pillow tolerates."""
    if jpeg_header(data)[0] not in FAST_FRAMES:
        return False
    try:
        simplejpeg.decode_jpeg(data, min_width=1, min_height=1, min_factor=8, strict=True)
    except ValueError:
        return False
    return True


def downscale(data: bytes, max_side: int) -> bytes:
    """`data`, or where a side is longer than `max_side` pixels, a smaller JPEG (PNG where it is transparent).

    BadImage if that is not possible.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _downscaled(data, max_side)
        except DAMAGE:
            raise BadImage("cannot be scaled down") from None


def _downscaled(data: bytes, max_side: int) -> bytes:
    image = open_image(data)
    if max(image.size) <= max_side:
        return data
    image.draft("RGB", (max_side, max_side))
    frame = upright(image)
    has_alpha = "A" in frame.getbands() or "transparency" in frame.info
    frame = eight_bits(frame)
    wanted = "RGBA" if has_alpha else "RGB"
    if frame.mode != wanted and (has_alpha or frame.mode != "L"):  # a copy of the whole, which may be large
        frame = frame.convert(wanted)
    scale = max_side / max(frame.size)
    size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    frame = frame.resize(size, Pillow.Resampling.LANCZOS).convert(wanted)
    out = io.BytesIO()
    if has_alpha:
        frame.save(out, "PNG")
    else:
        frame.save(out, "JPEG", quality=90)
    return out.getvalue()


def what_it_is(data: bytes) -> str:
    """What a file that is no image is, by its first bytes."""
    if jpeg_header(data)[0] in _LOSSLESS_FRAMES:
        return "lossless JPEG, which cannot be read"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1") and b"avif" not in data[8:64]:
        return "HEIC, which cannot be read"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL, which cannot be read"
    head = data[:512].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")) or b"<html" in head:
        return "HTML, not an image"
    if head.startswith(b"version https://git-lfs"):
        return "Git-LFS pointer, not an image"
    if head.startswith((b"<svg", b"<?xml")):
        return "SVG or XML, not a bitmap"
    return "not an image, or a format that cannot be read"
