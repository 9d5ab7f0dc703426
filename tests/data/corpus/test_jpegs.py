"""JPEGs of frames that few programs write."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import simplejpeg
from data.jpegs import dct, frame, huffman_tables, lossless, quantization, scan, segment

from megatron_lcl.data.corpus.probe import BadImage, jpeg_header, open_image, probe, what_it_is

_LOOK = """
import sys
from data.jpegs import lossless
from megatron_lcl.data.corpus.probe import BadImage, downscale, probe
from megatron_lcl.data.loading.crops import decode_train
from megatron_lcl.data.loading.images import decode_eval

for size in ((600, 500), (2000, 1800)):
    for num in (1, 3):
        data = lossless(*size, num)
        for look in (
            probe, lambda d: decode_train(d, 32, lambda: 0.5), lambda d: decode_eval(d, 32), lambda d: downscale(d, 100)
        ):
            try:
                look(data)
            except BadImage:
                print("bad")
"""


def test_a_lossless_jpeg_is_refused_by_all() -> None:
    """simplejpeg writes behind its memory; therefore in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{_LOOK}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, ["bad"] * 16), done.stderr
    assert "lossless JPEG" in what_it_is(lossless(60, 50, 3))


@pytest.mark.parametrize("marker", [0xC3, 0xC7, 0xCB, 0xCF])
def test_lossless_frames_of_all_kinds_are_not_opened(marker: int) -> None:
    data = lossless(60, 50, 1).replace(b"\xff\xc3", bytes([0xFF, marker]))
    with pytest.raises(ValueError, match="lossless JPEG"):
        open_image(data)
    with pytest.raises(BadImage, match="lossless JPEG"):
        probe(data)


def _header(seed: int) -> bytes:
    """A JPEG whose header has what a header may not have, with 0, 1 or 2 frames, each of its own size."""
    drawn = random.Random(seed)
    num = drawn.choice((1, 3))

    def of_its_size(marker: int) -> bytes:
        side = 16 * (marker - 0xBF)
        return frame(marker, side, side, num)

    def other() -> bytes:
        kind = drawn.randrange(7)
        inner = of_its_size(drawn.choice((0xC0, 0xC3)))
        if kind == 0:  # a frame within a segment, whose length may be wrong
            length = drawn.choice((None, drawn.randrange(len(inner) + 6)))
            return segment(drawn.choice((0xE0, 0xE1, 0xE2, 0xEE, 0xFE, 0xDC)), inner, length)
        return (
            drawn.randbytes(drawn.randrange(6)),
            b"\xff" * drawn.randrange(1, 4),
            bytes([0xFF, drawn.choice((0x00, 0x01, 0xD0, 0xD7, drawn.randrange(256)))]),
            segment(drawn.choice((0xE0, 0xFE)), b"", drawn.randrange(4)),
            segment(drawn.choice((0xDE, 0xDF, 0xC8, 0xCC, 0xDD)), bytes(drawn.randrange(5))),
            inner[: drawn.randrange(len(inner))],
        )[kind - 1]

    frames = [drawn.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC7, 0xC9, 0xCB)) for _ in range(drawn.choice((0, 1, 1, 1, 1, 2)))]
    parts = [quantization(), huffman_tables(), *map(of_its_size, frames)]
    parts += [other() for _ in range(drawn.randrange(4))]
    drawn.shuffle(parts)
    behind = drawn.choice((b"", of_its_size(0xC3) + scan(num, True)))
    return b"\xff\xd8" + b"".join(parts) + scan(num, drawn.random() < 0.5) + bytes(50) + behind + b"\xff\xd9"


def test_the_frame_is_the_one_that_libjpeg_decodes() -> None:
    """Which it does not say; but each kind of frame has a size of its own here."""
    found = 0
    for seed in range(3000):
        data = _header(seed)
        try:
            side, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            continue
        marker, first_scan = jpeg_header(data)
        assert (side, width) == (16 * (marker - 0xBF),) * 2, seed
        assert data[first_scan : first_scan + 2] == b"\xff\xda"
        found += 1
    assert found > 500


def test_without_frame_or_scan_there_is_no_picture() -> None:
    data = dct(60, 50, [(1, 1)])
    assert jpeg_header(data)[0] == 0xC0
    start = data.index(b"\xff\xda")
    two_frames = data[:2] + frame(0xC3, 60, 50, 1) + data[2:]
    for damaged in (
        data[:start],
        data[1:],
        b"",
        data[:2],
        data[:4],
        data[:2] + data[start:],
        data[:2] + data,
        two_frames,
    ):
        assert jpeg_header(damaged) == (0, len(damaged))
