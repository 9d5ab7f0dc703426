"""Images by their URL: how an image store (`megatron-lcl fetch`, docs/fetching.md) names its members."""

from __future__ import annotations

import hashlib
import re

EXTENSIONS = {
    "JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "AVIF": ".avif", "BMP": ".bmp", "TIFF": ".tif",
    "MPO": ".jpg", "ICO": ".ico", "PPM": ".ppm", "JPEG2000": ".jp2",
}  # fmt: skip
"""Pillow's name of a format → the extension of its members, the frequent ones first"""
TABLE_SUFFIX = ".images.parquet"
"""of files of a store in parquet (`image_tables.py`)"""
_URL = re.compile(r"https?://", re.I)


def is_url(name: str) -> bool:
    """Whether an image is named by where it was on the web."""
    return _URL.match(name) is not None


def url_key(url: str) -> str:
    """SHA-256 of the URL exactly as the data have it, in UTF-8, hexadecimal."""
    return hashlib.sha256(url.encode(errors="replace")).hexdigest()


def names_of_url(url: str) -> list[str]:
    """The names under which a store may have the image of a URL: in parquet the key, in tars with an extension."""
    key = url_key(url)
    return [key, *(key + extension for extension in dict.fromkeys(EXTENSIONS.values()))]
