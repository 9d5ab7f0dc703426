"""Encoded image → uint8 RGB square, as the model sees it.

Training: JPEG scaled while it is decoded, then one resize of the crop. Evaluation: CLIP's preprocessing, bit for bit
(Pillow's bicubic resize of the shorter side, center crop).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import Literal

import cv2
import numpy as np
import PIL.Image
import simplejpeg

from megatron_lcl.data.corpus.probe import DAMAGE, BadImage, eight_bits, open_image, orientation, upright, what_it_is

# EXIF orientation → (counter-clockwise quarter turns, then mirrored left to right)
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}


_MAX_ASPECT = 64
"""of a picture that is resized as a whole: as one of 1 x 60,000 pixels would become one of 224 x 13,440,000"""
DECODING = 2
"""version of `decode_eval` and `decode_bounded`, to be raised when they give other pixels: caches are named by it"""


def decode_train(
    data: bytes | memoryview,
    size: int,
    draw: Callable[[], float],
    scale: Sequence[float] = (0.9, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random crop, resized: uint8 [3, size, size].

    `draw` gives numbers in [0, 1); scale is the crop's share of the area, ratio its width over height (both as in
    torchvision's RandomResizedCrop). BadImage if the image does not decode.
    """
    data = bytes(data)
    header = _jpeg_header(data)
    if header is None:
        pixels = np.asarray(decode_rgb(data))
        turns, mirrored = 0, False
        height, width = pixels.shape[:2]
        left, top, crop_width, crop_height = crop_box(width, height, draw, scale, ratio)
    else:
        height, width = header
        turns, mirrored = _TURNS.get(_jpeg_orientation(data), (0, False))
        shown = (height, width) if turns % 2 else (width, height)
        box = crop_box(*shown, draw, scale, ratio)
        left, top, crop_width, crop_height = _stored_box(box, width, height, turns, mirrored)
        pixels = _decode_jpeg(data, width, height, 1.5 * size / min(crop_width, crop_height))
        shrunk_x, shrunk_y = pixels.shape[1] / width, pixels.shape[0] / height
        left, crop_width = round(left * shrunk_x), max(1, round(crop_width * shrunk_x))
        top, crop_height = round(top * shrunk_y), max(1, round(crop_height * shrunk_y))
    crop = pixels[top : top + crop_height, left : left + crop_width]
    shrinks = crop.shape[0] >= size and crop.shape[1] >= size
    square = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    if turns:
        square = np.rot90(square, turns)
    if mirrored:
        square = square[:, ::-1]
    return square.transpose(2, 0, 1)


def decode_eval(data: bytes | memoryview, size: int) -> np.ndarray:
    """Shorter side to `size`, center crop: uint8 [3, size, size], equal to CLIP's Resize(bicubic) and CenterCrop.

    Of a picture over 64 times as long as it is wide only the center is resized, and equal up to rounding. BadImage if
    the image does not decode.
    """
    image = decode_rgb(bytes(data))
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


def decode_bounded(data: bytes) -> PIL.Image.Image:
    """As `decode_rgb`, for a transform that resizes the whole picture; of one over 64 times as long as it is wide, the
    center."""
    image = decode_rgb(data)
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


def crop_box(
    width: int, height: int, draw: Callable[[], float], scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Left, top, width, height of a random crop, by torchvision's rule: ten tries, then the largest centered one."""
    for _ in range(10):
        area = width * height * (scale[0] + draw() * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + draw() * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw() * (width - w + 1)), int(draw() * (height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return (width - w) // 2, (height - h) // 2, max(1, w), max(1, h)


def _stored_box(
    box: tuple[int, int, int, int], width: int, height: int, turns: int, mirrored: bool
) -> tuple[int, int, int, int]:
    """A box (left, top, width, height) of the picture as shown, in the stored picture of size width × height."""
    left, top, w, h = box
    if mirrored:
        left = (height if turns % 2 else width) - left - w
    for turn in range(turns, 0, -1):  # a counter-clockwise turn takes column x to row (side - 1 - x)
        side = width if turn % 2 else height
        left, top, w, h = side - top - h, left, h, w
    return left, top, w, h


def _jpeg_header(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that the fast decoder reads, None for everything else."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if color in ("YCbCr", "Gray", "RGB") else None


def _decode_jpeg(data: bytes, width: int, height: int, factor: float) -> np.ndarray:
    """RGB [H, W, 3], scaled in the decoder by at least `factor` where that is below 1."""
    try:
        smallest = (
            {"min_width": math.ceil(width * factor), "min_height": math.ceil(height * factor)} if factor < 1 else {}
        )
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **smallest)
    except ValueError as error:
        raise BadImage(f"a JPEG that does not decode: {error}") from None


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation, 1 if there is none. Only the start of the file is looked at; pixels are not decoded."""
    head = data[: 1 << 16]
    if b"Exif\0\0" not in head and b":Orientation" not in head:  # the second in XMP, where Pillow looks, too
        return 1
    try:
        return orientation(open_image(data))
    except DAMAGE:
        return 1


def thumbnail(data: bytes | memoryview, side: int, format: Literal["JPEG", "WEBP"] = "JPEG") -> str:
    """A data: URL of the image at no more than `side` pixels a side; an empty one for what does not decode.

    WEBP: for drawings, whose edges JPEG blurs.
    """
    try:
        image = decode_rgb(bytes(data))
    except BadImage:
        return "data:,"
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, format, quality=80)
    return f"data:image/{format.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def decode_rgb(data: bytes, min_side: int | None = None) -> PIL.Image.Image:
    """First frame as RGB: turned as EXIF says, 16 bits and floats scaled to 8 bits, transparent parts on white.

    What every encoder is given, ours and other libraries'. min_side: a JPEG's decoder may scale it down as long as both
    sides stay that long. BadImage if the image does not decode.
    """
    try:
        image = open_image(data)
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
        image = _rgb(upright(image))
    except DAMAGE as error:
        reason = what_it_is(data) if isinstance(error, PIL.UnidentifiedImageError) else error
        raise BadImage(f"an image that does not decode: {reason}") from None
    image.info = {}  # it still has the EXIF data, and whoever reads them would turn the picture once more
    return image


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    image = eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() != (255, 255):
            white = PIL.Image.new("RGB", image.size, "white")
            white.paste(image, mask=alpha)
            return white
    return image.convert("RGB")
