"""Does an encoded image decode, and how large is it? The check that every image passes on its way into a corpus."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import simplejpeg
from PIL import Image as Pillow
from PIL import ImageOps

MAX_PIXELS = 89_478_485
"""above this Pillow suspects a decompression bomb; decoded, so many take 360 MB"""
_EXIF_ORIENTATION = 0x0112
DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
    struct.error, Pillow.DecompressionBombError,
)  # fmt: skip
"""what Pillow raises for files that are not whole"""


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Size in pixels, as shown (after the orientation that EXIF asks for), and Pillow's name of the format."""

    width: int
    height: int
    format: str


def probe(data: bytes) -> Probe:
    """Decode the first frame and throw it away. BadImage says what is wrong: empty, truncated, too many pixels …"""
    if not data:
        raise BadImage("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Pillow.open(io.BytesIO(data))
        except Pillow.DecompressionBombError:
            raise BadImage("too many pixels") from None
        except DAMAGE:
            raise BadImage(_what_it_is(data)) from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage("too many pixels")
        try:
            if not (image.format == "JPEG" and image.mode in ("RGB", "L") and _reads_as_jpeg(data)):
                image.load()
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if image.format != "GIF" else 1
        except Pillow.DecompressionBombError:
            raise BadImage("too many pixels") from None
        except DAMAGE:
            raise BadImage("truncated or damaged") from None
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return Probe(width, height, image.format or "?")


def _reads_as_jpeg(data: bytes) -> bool:
    """A quick check of the whole file; False also for faults that Pillow gets over."""
    try:
        simplejpeg.decode_jpeg(data, min_width=1, min_height=1, min_factor=8, strict=True)
    except ValueError:
        return False
    return True


def downscale(data: bytes, max_side: int, quality: int = 90) -> bytes:
    """`data`, or where a side is longer than `max_side` pixels, a smaller JPEG (PNG where it is transparent)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Pillow.open(io.BytesIO(data))
        if max(image.size) <= max_side:
            return data
        image.draft("RGB", (max_side, max_side))
        frame: Pillow.Image = ImageOps.exif_transpose(image) or image
        has_alpha = "A" in frame.getbands() or "transparency" in frame.info
        if frame.mode.startswith("I;16") or frame.mode == "I":
            frame = frame.point(lambda value: value / 256).convert("L")
        frame = frame.convert("RGBA" if has_alpha else "RGB")
        scale = max_side / max(frame.size)
        size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
        frame = frame.resize(size, Pillow.Resampling.LANCZOS)
        out = io.BytesIO()
        if has_alpha:
            frame.save(out, "PNG")
        else:
            frame.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _what_it_is(data: bytes) -> str:
    head = data[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")) or b"<html" in head:
        return "HTML, not an image"
    if head.startswith(b"version https://git-lfs"):
        return "Git-LFS pointer, not an image"
    if head.startswith((b"<svg", b"<?xml")):
        return "SVG or XML, not a bitmap"
    return "not an image, or a format that cannot be read"
