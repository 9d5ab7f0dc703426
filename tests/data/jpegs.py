"""JPEGs put together from their segments (ITU-T T.81): one gray level everywhere, which takes zero bits alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def segment(marker: int, content: bytes, length: int | None = None) -> bytes:
    """A marker segment; `length`: what it says of itself, if not the truth."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2 if length is None else length) + content


def frame(marker: int, width: int, height: int, num: int, sampling: Sequence[tuple[int, int]] = ()) -> bytes:
    """The header of a frame of `num` components, of 8 bits; `sampling`: (horizontal, vertical) of the first ones."""
    factors = [*sampling, *[(1, 1)] * (num - len(sampling))]
    components = [bytes([i + 1, h << 4 | v, 0]) for i, (h, v) in enumerate(factors)]
    return segment(marker, struct.pack(">BHHB", 8, height, width, num) + b"".join(components))


def quantization() -> bytes:
    return segment(0xDB, b"\0" + bytes([1] * 64))


def huffman_tables() -> bytes:
    """Of one code each: a zero bit is category 0."""
    return b"".join(segment(0xC4, bytes([kind, 1, *[0] * 15, 0])) for kind in (0x00, 0x10))


def scan(num: int, lossless: bool) -> bytes:
    """The header of a scan of all components; of a lossless one the predictor is 1."""
    components = b"".join(bytes([i + 1, 0]) for i in range(num))
    return segment(0xDA, bytes([num]) + components + (b"\x01\0\0" if lossless else b"\0\x3f\0"))


def lossless(width: int, height: int, num: int) -> bytes:
    """A lossless JPEG of `num` components."""
    head = frame(0xC3, width, height, num) + huffman_tables() + scan(num, True)
    return b"\xff\xd8" + head + bytes(-(-width * height * num // 8)) + b"\xff\xd9"


def dct(width: int, height: int, sampling: Sequence[tuple[int, int]]) -> bytes:
    """A baseline JPEG whose components have these (horizontal, vertical) sampling factors."""
    num = len(sampling)
    across, down = (max(factor[i] for factor in sampling) if num > 1 else 1 for i in (0, 1))
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    bits = 2 * units * (sum(h * v for h, v in sampling) if num > 1 else 1)
    pixels = bytes(bits // 8) + (bytes([(1 << 8 - bits % 8) - 1]) if bits % 8 else b"")
    head = quantization() + frame(0xC0, width, height, num, sampling) + huffman_tables() + scan(num, False)
    return b"\xff\xd8" + head + pixels + b"\xff\xd9"
