"""Perceptual hashes of pictures: pictures that look alike have hashes that differ in few bits."""

from __future__ import annotations

import numpy as np
from PIL import Image as Pillow
from scipy.fft import dct

_OVERSAMPLING = 4
"""pixels to a coefficient that is kept, along each side"""


def perceptual_hash(image: Pillow.Image, side: int = 8, margin: float = 0.0) -> np.ndarray:
    """bool [side²]: whether a coefficient of the side x side lowest of the cosine transform is above their median, by
    more than a margin (in the scale of scipy's `dct`: white noise of one level gives coefficients of 8·side levels).

    Of 4·side x 4·side gray pixels; the same bits as `phash` of the library ImageHash with `hash_size=side` (Zauner,
    "Implementation and benchmarking of perceptual image hash functions", 2010).
    """
    size = _OVERSAMPLING * side
    gray = np.asarray(image.convert("L").resize((size, size), Pillow.Resampling.LANCZOS))
    low = dct(dct(gray, axis=0), axis=1)[:side, :side]
    return (low > np.median(low) + margin).ravel()
