"""Protects perceptual hashes: they are those of the library ImageHash."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw

from megatron_lcl.data.corpus.perceptual_hash import perceptual_hash


def drawing(seed: int) -> Pillow.Image:
    """Rectangles on white."""
    rng = np.random.default_rng(seed)
    image = Pillow.new("RGB", (72, 72), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, width, height = (int(v) for v in rng.integers(4, 40, 4))
        draw.rectangle((x, y, x + width, y + height), fill="navy")
    return image


@pytest.mark.parametrize("side", [8, 16])
def test_the_hash_is_that_of_the_library_imagehash(side: int) -> None:
    imagehash = pytest.importorskip("imagehash")
    noise = Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    for image in (noise, *map(drawing, range(20))):
        assert (perceptual_hash(image, side) == imagehash.phash(image, hash_size=side).hash.ravel()).all()
