"""OBELICS (Laurençon et al. 2023) and OmniCorpus (Li et al. 2024): parquet rows of two lists, `images` and `texts`.

At each position exactly one of the two is not null. The images are URLs; their files are found by a naming rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from megatron_lcl.data.corpus.document import Document, Image
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.row_groups import ParquetImporter, rows_of_unit
from megatron_lcl.data.prepare.importers.sources import ImagesByName, as_text, interleaved, its_id
from megatron_lcl.data.prepare.importers.urls import is_url
from megatron_lcl.errors import UserError

_EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")
_EXAMPLE = {"sha256": "0" * 64, "sha1": "0" * 40, "md5": "0" * 32, "file": "a", "row": 0, "position": 0, "number": 0}
_ABOUT = "general_metadata"
"""column that says where a row's page is: {"url": …}"""


class ObelicsImporter(ImagesByName, ParquetImporter):
    """A parquet file or a folder of them; a row group is a unit."""

    kind = "natural"
    rules = 2
    separator = "\n\n"  # as build_obelics/13_final_processing.py joins texts whose image it has removed
    reads = (
        ".parquet with columns images (URLs) and texts; images in --images, as `fetch` stores them, or named by the "
        "option image_name"
    )
    needed = ("images", "texts")

    def __init__(
        self,
        input: Path,
        images: Path | None = None,
        image_name: Annotated[
            str,
            "name of an image's file, without or with extension, of {sha256}, {sha1}, {md5} of its URL, {file} (the "
            "parquet file's name without extension), {row}, {position} (in the lists), {number} (among the row's "
            "images)",
        ] = "{sha256}",
    ) -> None:
        super().__init__(input)
        try:
            image_name.format(**_EXAMPLE)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError, MemoryError, OverflowError):
            known = ", ".join("{" + field + "}" for field in _EXAMPLE)
            raise UserError(f"--option image_name={image_name}: it may use {known}") from None
        self.image_name = image_name
        self.look_in(images)

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        file = unit.payload[0]
        for row, values in rows_of_unit(unit, self.found.name(file), self.needed, drops, _ABOUT.__eq__):
            document = self._document(values["images"], values["texts"], values.get(_ABOUT), file, row, drops)
            if document is not None:
                yield document

    def _document(self, images: Any, texts: Any, about: Any, file: Path, row: int, drops: Drops) -> Document | None:
        name = f"{self.found.name(file)}:{row}"
        if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
            drops.bad("document", "images and texts are not lists of one length", name, sample=str(texts))
            return None
        items, lost = interleaved(images, texts, self._images(images, file, row, name, drops), name, drops)
        record = _record(as_text(about, name, drops))
        return Document(items, name=name, metadata={**its_id(record, name, drops), "lost_images": lost})

    def _images(self, urls: list[Any], file: Path, row: int, name: str, drops: Drops) -> Iterator[Image | None]:
        given = ((position, str(as_text(url, name, drops))) for position, url in enumerate(urls) if url is not None)
        for number, (position, url) in enumerate(given):
            try:
                data = self.images.read(self._candidates(url, file, row, position, number), near=(file.stem,))
                yield Image(data, name=url)
            except BadImage as error:
                drops.bad("image", str(error), f"{name}: {url[:200]}")
                yield None

    def _candidates(self, url: str, file: Path, row: int, position: int, number: int) -> list[str]:
        raw = url.encode(errors="replace")
        name = self.image_name.format(
            sha256=hashlib.sha256(raw).hexdigest(),
            sha1=hashlib.sha1(raw, usedforsecurity=False).hexdigest(),
            md5=hashlib.md5(raw, usedforsecurity=False).hexdigest(),
            file=file.stem,
            row=row,
            position=position,
            number=number,
        )
        return [*(name + extension for extension in _EXTENSIONS), *([url] if is_url(url) else [])]


def _record(about: Any) -> Any:
    """What is said of a row, a struct or JSON."""
    if isinstance(about, str):
        try:
            return msgspec.json.decode(about)
        except (msgspec.DecodeError, RecursionError):
            return None
    return about


class OmniCorpusImporter(ObelicsImporter):
    """The same lists as OBELICS."""

    separator = " "  # as its own loader joins them (mllm_llava/llava/train/datasets.py)
