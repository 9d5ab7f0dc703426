"""Image-text pairs in WebDataset tars, as img2dataset writes LAION, CC3M and CC12M: `.jpg .txt .json` of one key.

Keys repeat from tar to tar; the image stands first, and a pair without caption is a document of one image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.sources import decoded, its_id, text_item
from megatron_lcl.data.prepare.importers.tars import TarImporter, tar_samples

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif", "tiff", "jp2", "ppm", "ico", "img")
_TEXTS = ("txt", "text", "caption")


class WebDatasetImporter(TarImporter):
    format, kind = "webdataset", "pairs"
    reads = ".tar, .tar.gz with an image (.jpg, .png, …), its text (.txt, or the caption in .json) under each key"

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        for sample in tar_samples(unit, drops):
            name = f"{unit.name}:{sample['__key__']}"
            items: list[Text | Image] = []
            image = next((sample[s] for s in _IMAGES if s in sample), None)
            if image is None:
                drops.bad("image", "no image in the sample", name)
            else:
                items.append(Image(image, name=name))
            record = _record(sample, name, drops)
            caption = _caption(sample, record, name, drops)
            if caption is None:
                drops.note("document", "no caption", name)
            else:
                items.append(text_item(caption, name, drops))
            yield Document(tuple(items), name=name, metadata={**its_id(record), "lost_images": int(image is None)})


def _record(sample: dict[str, Any], name: str, drops: Drops) -> Any:
    """The JSON file's content, or None."""
    try:
        return json.loads(decoded(sample.get("json", b"{}"), name, drops))
    except (ValueError, RecursionError):
        return None


def _caption(sample: dict[str, Any], record: Any, name: str, drops: Drops) -> str | None:
    """The text file's content, else the "caption" of the JSON file, else None."""
    for suffix in _TEXTS:
        if suffix in sample:
            return decoded(sample[suffix], name, drops)
    caption = record.get("caption") if isinstance(record, dict) else None
    return caption if isinstance(caption, str) else None
