"""MINT-1T's PDF part (Awadalla et al. 2024): tars of `<key>.json` and multi-frame `<key>.tiff`, or of single images.

The JSON file has lists `texts` and `images`, one of them not null at each position. Where an entry of `images` is what
stands behind the key in the name of a file, that file is the image, as in the samples that Megatron Energon's
documentation has for interleaved data, and in those of `export-corpus`. Else the images are frames (experimental): that
frame k of the TIFF is the k-th image that is not null is inferred, not documented; where the counts differ, the
document's images are dropped. Frames are stored as PNG.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from typing import Any

from PIL import Image as Pillow

from megatron_lcl.data.corpus.document import Document, Image
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import DAMAGE, MAX_PIXELS, eight_bits, is_negative
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.sources import decoded_file, interleaved, its_id
from megatron_lcl.data.prepare.importers.tars import TarImporter, tar_samples
from megatron_lcl.errors import UserError

MAX_FRAMES = 10_000
"""of a TIFF: Pillow looks for each among all before it; a document of the data set has some tens"""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Mint1tImporter(TarImporter):
    format, kind = "mint1t", "natural"
    rules = 3
    separator = " "
    reads = (
        ".tar, .tar.gz with .json (lists texts and images) and the images that it names, or one multi-frame .tiff "
        "(experimental), under each key"
    )

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        for sample in tar_samples(unit, drops):
            name = f"{unit.name}:{sample['__key__']}"
            try:
                record = json.loads(decoded_file(sample["json"], name, drops))
                texts, images = record["texts"], record["images"]
            except (KeyError, ValueError, TypeError, RecursionError):
                drops.bad("document", "no lists texts and images", name)
                continue
            if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
                drops.bad("document", "texts and images are not lists of one length", name, sample=str(texts))
                continue
            found = self._images(images, sample, name, drops)
            items, lost = interleaved(images, texts, found, name, drops)
            yield Document(items, name=name, metadata={**its_id(record, name, drops), "lost_images": lost})

    def _images(self, images: list[Any], sample: dict[str, Any], name: str, drops: Drops) -> Iterator[Image | None]:
        num_images = sum(image is not None for image in images)
        frames: Iterator[bytes | None] = iter(())
        files = [_file(sample, image) for image in images if image is not None]
        data = sample.get("tiff", sample.get("tif", b""))
        found = _num_frames(data) if data else 0
        if any(files):
            if missing := files.count(b""):
                drops.bad("image", "no file of this name in the tar", name, missing)
            frames = iter(files)
        elif found != num_images or (data and not found):
            reason = "no TIFF, or not readable" if found == 0 else "TIFF with another number of frames"
            drops.bad("image", reason, f"{name}: {found} frames, {num_images} images", num_images or found or 1)
        elif found:
            frames = _frames(data, found)
        for position in (k for k, image in enumerate(images) if image is not None):
            frame = next(frames, b"")  # empty where it was counted above
            if frame is None:
                drops.bad("image", "truncated or damaged", f"{name}: position {position}")
            yield Image(frame, name=f"{name}#{position}") if frame else None


def _file(sample: dict[str, Any], image: Any) -> bytes:
    """The file of the sample with this name behind its key; empty where there is none."""
    data = sample.get(image.lower()) if isinstance(image, str) else None
    return data if isinstance(data, bytes) else b""


def _num_frames(data: bytes) -> int:
    """0 where there is no TIFF, or one of more than MAX_FRAMES."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Pillow.open(io.BytesIO(data), formats=["TIFF"]) as image:
                for number in range(MAX_FRAMES + 1):
                    try:
                        image.seek(number)
                    except EOFError:
                        return number
                return 0
        except DAMAGE:
            return 0


def _frames(data: bytes, num: int) -> Iterator[bytes | None]:
    """Each of the `num` frames as PNG; None for one that does not decode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Pillow.open(io.BytesIO(data), formats=["TIFF"]) as image:
            for number in range(num):
                out = io.BytesIO()
                try:
                    image.seek(number)
                    if image.width * image.height > MAX_PIXELS:
                        raise UserError("too many pixels")
                    as_it_is = image.mode in _PNG_MODES and not is_negative(image)
                    frame = image if as_it_is else eight_bits(image).convert("RGB")
                    frame.save(out, "PNG")
                    yield out.getvalue()
                except DAMAGE:
                    yield None
