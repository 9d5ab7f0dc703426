"""Encoded image → uint8 RGB square, as the model sees it in an evaluation: CLIP's preprocessing, bit for bit (Pillow's
bicubic resize of the shorter side, center crop). What training sees is in crops.py.
"""

from __future__ import annotations

import base64
import io
import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image

from megatron_lcl.data.corpus.probe import DAMAGE, BadImage
from megatron_lcl.data.corpus.rgb import decode_rgb, rgb

Source = bytes | bytearray | memoryview | str | os.PathLike[str] | PIL.Image.Image
"""an image as callers have it: encoded bytes, the path of a file on a disk, or Pillow's"""
_MAX_ASPECT = 64
"""of a picture that is resized as a whole: as one of 1 x 60,000 pixels would become one of 224 x 13,440,000"""
DECODING = 3
"""version of `read_rgb`, `square` and `bounded`, to be raised when they give other pixels: caches are named by it"""


def decode_eval(image: Source, size: int) -> np.ndarray:
    """Shorter side to `size`, center crop: uint8 [3, size, size], equal to CLIP's Resize(bicubic) and CenterCrop.

    image: encoded bytes, the path of a file, or a PIL image. Of a picture over 64 times as long as it is wide only the
    center is resized, and equal up to rounding. BadImage if the image does not decode, TypeError for anything else.
    """
    return square(read_rgb(image), size)


def square(image: PIL.Image.Image, size: int) -> np.ndarray:
    """`decode_eval` of an image that `read_rgb` gave."""
    short, long = sorted(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if long <= _MAX_ASPECT * short:
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    (left, right), (x0, x1) = _span(left, size, width, image.width)
    (top, bottom), (y0, y1) = _span(top, size, height, image.height)
    image = image.crop((left, top, right, bottom)).resize((size, size), PIL.Image.Resampling.BICUBIC, (x0, y0, x1, y1))
    return np.asarray(image).transpose(2, 0, 1)


def bounded(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image, for a transform that resizes all of it; of one over 64 times as long as it is wide, the center."""
    short, long = sorted(image.size)
    if long <= _MAX_ASPECT * short:
        return image
    length = _MAX_ASPECT * short - (long - _MAX_ASPECT * short) % 2  # so that as much is left out on either side
    left, top = ((side - length) // 2 if side == long else 0 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def _span(first: int, num: int, resized: int, side: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """What pixels first … first + num - 1 are computed from where a side of `side` pixels is resized to `resized`.

    Returns the first pixel and the one behind the last; and, counted from the former, where those pixels begin and end:
    Pillow keeps that as float32, too coarse for a place in a long side.
    """
    scale = side / resized
    begin, end = first * scale, (first + num) * scale
    support = math.ceil(2 * max(1, scale)) + 1  # of the bicubic filter to each side
    low, high = max(0, math.floor(begin) - support), min(side, math.ceil(end) + support)
    return (low, high), (begin - low, end - low)


def thumbnail(data: bytes | memoryview, side: int, format: Literal["JPEG", "WEBP"] = "JPEG") -> str:
    """A data: URL of the image at no more than `side` pixels a side; an empty one for what does not decode.

    WEBP: for drawings, whose edges JPEG blurs.
    """
    try:
        image = decode_rgb(bytes(data))
    except BadImage:
        return "data:,"
    image.thumbnail((side, side))
    return data_url(image, format)


def data_url(image: PIL.Image.Image, format: Literal["JPEG", "PNG", "WEBP"]) -> str:
    """An image as a data: URL."""
    out = io.BytesIO()
    image.save(out, format, quality=80)
    return f"data:image/{format.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def read_rgb(image: Source) -> PIL.Image.Image:
    """What every encoder is given, ours and other libraries': `decode_rgb` of encoded bytes or of a file.

    A PIL image, at its first frame, gives the same pixels as its file does, and keeps its own. (One of a PNG with a
    transparent color of 2, 4 or 16 bits has that color in 8 bits from then on; decoded before, it has lost which it
    is.) BadImage if the image does not decode, TypeError for what is no image, OSError for a file that cannot be read.
    """
    if isinstance(image, PIL.Image.Image):
        if not image.width * image.height:
            raise BadImage(f"an image of {image.width} x {image.height} pixels")
        try:
            return rgb(image)
        except DAMAGE as error:  # one that `PIL.Image.open` gave is decoded here
            raise BadImage(f"an image that does not decode: {error}") from None
    if isinstance(image, str | os.PathLike):
        return decode_rgb(Path(image).read_bytes())
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_rgb(bytes(image))
    raise TypeError(
        f"an image of type {type(image).__name__}; give encoded bytes, the path of a file, or a PIL image (of an array "
        "uint8 [H, W, 3]: PIL.Image.fromarray)"
    )
