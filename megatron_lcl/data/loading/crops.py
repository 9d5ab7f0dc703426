"""Encoded image → uint8 RGB square, as the model sees it in training: a random crop, resized."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
import torch
from torch.nn import functional

from megatron_lcl.data.corpus.probe import DAMAGE, FAST_FRAMES, BadImage, jpeg_header, open_image, orientation
from megatron_lcl.data.corpus.rgb import decode_rgb

# EXIF orientation → (counter-clockwise quarter turns, then mirrored left to right)
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}

_LEFT = 4
"""times `size` is what a JPEG's decoder leaves of a crop at least, if it reduces it. It averages squares of pixels,
which blurs: of the energy at 0.4 to 0.5 cycles a pixel of the result it leaves 96 % in a crop that is then 4 times as
large, 94 % at 3 times, 91 % at 2.5, 87 % at 2, 82 % at 1.6"""


def decode_train(
    data: bytes | memoryview,
    size: int,
    draw: Callable[[], float],
    scale: Sequence[float] = (0.9, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random crop, resized: uint8 [3, size, size].

    Bicubic with antialiasing, of all of the crop's pixels: what torchvision's RandomResizedCrop makes of a picture of
    Pillow's, as open_clip uses it, but for rounding. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves
    a crop at least `_LEFT` times as large as `size`.

    `draw` gives numbers in [0, 1); scale is the crop's share of the area, ratio its width over height (both as in
    torchvision's RandomResizedCrop). BadImage if the image does not decode.
    """
    data = bytes(data)
    header = _jpeg_header(data)
    if header is None:
        pixels = np.array(decode_rgb(data))
        turns, mirrored = 0, False
        height, width = pixels.shape[:2]
        left, top, crop_width, crop_height = crop_box(width, height, draw, scale, ratio)
    else:
        height, width = header
        turns, mirrored = _TURNS.get(_jpeg_orientation(data), (0, False))
        shown = (height, width) if turns % 2 else (width, height)
        box = crop_box(*shown, draw, scale, ratio)
        left, top, crop_width, crop_height = _stored_box(box, width, height, turns, mirrored)
        pixels = _decode_jpeg(data, width, height, min(crop_width, crop_height) / (_LEFT * size))
        shrunk_x, shrunk_y = pixels.shape[1] / width, pixels.shape[0] / height
        left, crop_width = round(left * shrunk_x), max(1, round(crop_width * shrunk_x))
        top, crop_height = round(top * shrunk_y), max(1, round(crop_height * shrunk_y))
    crop = torch.from_numpy(pixels[top : top + crop_height, left : left + crop_width]).permute(2, 0, 1)[None]
    square = functional.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    if turns:
        square = np.rot90(square, turns)
    if mirrored:
        square = square[:, ::-1]
    return square.transpose(2, 0, 1)


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
    if jpeg_header(data)[0] not in FAST_FRAMES:
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # the latter for the sampling 4:4:1, of which simplejpeg has no name
        return None
    return (height, width) if color in ("YCbCr", "Gray", "RGB") else None


def _decode_jpeg(data: bytes, width: int, height: int, most: float) -> np.ndarray:
    """RGB [H, W, 3], as it lies, each side divided by 1, 2, 4 or 8: by no more than `most`, where that is above 1.

    What the fast decoder does not read Pillow may, which `probe` asks last. BadImage if neither does.

    libjpeg-turbo has the scales between (7/8, 3/4, 5/8, 3/8) too, but not in vector instructions: a picture at 7/8
    takes it twice as long as the whole one.
    """
    scale = max((scale for scale in (2, 4, 8) if scale <= most), default=1)
    smallest = {"min_width": -(-width // scale), "min_height": -(-height // scale)} if scale > 1 else {}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **smallest)
    except ValueError:
        pass
    try:
        return np.array(open_image(data).convert("RGB"))
    except DAMAGE as error:
        raise BadImage(f"a JPEG that does not decode: {error}") from None


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation, 1 if there is none. Only the header is looked at; pixels are not decoded."""
    head = data[: jpeg_header(data)[1]]
    if b"Exif\0\0" not in head and b":Orientation" not in head:  # the second in XMP, where Pillow looks, too
        return 1
    try:
        return orientation(open_image(data))
    except DAMAGE:
        return 1
