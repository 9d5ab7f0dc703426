"""OBELICS (Laurençon et al. 2023) and OmniCorpus (Li et al. 2024): parquet rows of two lists, `images` and `texts`.

At each position exactly one of the two is not null. The images are URLs; their files are found by a naming rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Importer, Unit, files_signature
from megatron_lcl.data.prepare.importers.lines import find_files
from megatron_lcl.data.prepare.importers.sources import ImageSource, decoded, text_item
from megatron_lcl.errors import UserError

_EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")
_EXAMPLE = {"sha256": "0" * 64, "sha1": "0" * 40, "md5": "0" * 32, "file": "a", "row": 0, "position": 0, "number": 0}
_BATCH = 64


class ObelicsImporter(Importer):
    """`input`: a parquet file or a folder of them; a row group is a unit."""

    kind = "natural"

    options: ClassVar[dict[str, str]] = {
        "image_name": "name of an image's file, without or with extension, of {sha256}, {sha1}, {md5} of its URL, "
        "{file} (the parquet file's name without extension), {row}, {position} (in the lists), {number} (among the "
        "row's images); default {sha256}",
    }

    def __init__(self, input: Path, images: Path | None = None, image_name: str = "{sha256}") -> None:
        self.root = input if input.is_dir() else input.parent
        self.files = find_files(input, (".parquet",))
        if not self.files:
            raise UserError(f"no .parquet files in {input}")
        try:
            image_name.format(**_EXAMPLE)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError, MemoryError, OverflowError):
            known = ", ".join("{" + field + "}" for field in _EXAMPLE)
            raise UserError(f"image_name is {image_name!r}; it may use {known}") from None
        self.image_name = image_name
        self.images = ImageSource(images)

    def signature(self) -> str:
        return files_signature(self.files, self.root)

    def units(self) -> list[Unit]:
        """Payload: (path, row group, its first row, its last + 1); row group -1 for a file that cannot be read."""
        units = []
        for file in self.files:
            size = file.stat().st_size
            try:
                metadata = pq.read_metadata(file)
                num_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            except (pa.ArrowException, OSError, ValueError):
                units.append(Unit(file.name, size, (file, -1, 0, 0)))
                continue
            for group in range(len(num_rows)):
                first = sum(num_rows[:group])
                payload = (file, group, first, first + num_rows[group])
                units.append(Unit(f"{file.name}:{first}", size // len(num_rows), payload))
        return units

    def prepare(self, folder: Path) -> None:
        self.images.prepare(folder)

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        file, group, row, stop = unit.payload
        if group < 0:
            drops.bad("document", "damaged parquet file", file.name)
            return
        try:
            # buffered: else a row group's column is read whole, however large
            with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as source:
                names = source.schema_arrow.names
                if names.count("images") != 1 or names.count("texts") != 1:
                    drops.bad("document", "no columns images and texts", file.name)
                    return
                for batch in source.iter_batches(_BATCH, [group], columns=["images", "texts"], use_threads=False):
                    for images, texts in zip(_lists(batch["images"]), _lists(batch["texts"]), strict=True):
                        yield from self._document(images, texts, file, row, drops)
                        row += 1
        except (pa.ArrowException, OSError, ValueError):
            drops.bad("document", "lost in a damaged parquet file", f"{file.name}:{row}", max(1, stop - row))

    def _document(self, images: Any, texts: Any, file: Path, row: int, drops: Drops) -> Iterator[Document]:
        name = f"{file.name}:{row}"
        if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
            drops.bad("document", "images and texts are not lists of one length", name)
            return
        items: list[Text | Image] = []
        number = 0
        for position, (url, text) in enumerate(zip(images, texts, strict=True)):
            url, text = (decoded(x, name, drops) if isinstance(x, bytes) else x for x in (url, text))
            if url is not None and text is not None:
                drops.bad("text", "both image and text at one position", name)
            if url is None:
                items.append(text_item(text, name, drops))
                continue
            try:
                data = self.images.read(self._candidates(str(url), file, row, position, number), near=(file.stem,))
                items.append(Image(data, name=str(url)))
            except BadImage as error:
                drops.bad("image", str(error), f"{name}: {str(url)[:200]}")
            number += 1
        yield Document(tuple(items), name=name)

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
        return [name + extension for extension in _EXTENSIONS]


def _lists(column: pa.Array) -> list[Any]:
    """The column's rows; where a string is not UTF-8, all as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.large_list(pa.large_binary())).to_pylist()


class OmniCorpusImporter(ObelicsImporter):
    """The same lists; image files are named by the SHA-256 of their URL, without extension."""
