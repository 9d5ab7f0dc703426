"""The generic form: one document a line, `{"items": [{"text": "…"}, {"image": "relative/path.jpg"}, …]}`.

Image items may have "similarity" (a number) and "matched_text_index" (its segment's index among the line's text items).
A line may say its "kind": "matched", "natural" or "pairs"; option `kind` says it for the lines that do not.
Images are found below `images`, else below the folder of the input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from megatron_lcl.data.corpus.document import KINDS, Document, Image, Kind, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Importer, Unit, files_signature
from megatron_lcl.data.prepare.importers.lines import SUFFIXES, LineNumbers, find_files, line_units, typed_lines
from megatron_lcl.data.prepare.importers.sources import ImageSource, index_or_none, number_or_none, text_item
from megatron_lcl.errors import UserError


class _TextsOnly(msgspec.Struct):
    """A line that is nothing but texts, as most are of a text corpus: read without a look at each item in Python."""

    items: tuple[Text, ...]
    kind: Kind | None = None


class JsonlImporter(Importer):
    """`input`: a file or a folder of .jsonl, .jsonl.gz, .jsonl.zst files."""

    options: ClassVar[dict[str, str]] = {
        "kind": f"kind of the documents whose line does not say it: {', '.join(KINDS)}; default: matched if any of "
        "them has similarities, else natural",
    }

    def __init__(self, input: Path, images: Path | None = None, kind: str = "") -> None:
        if kind not in ("", *KINDS):
            raise UserError(f"kind is {kind!r}; give {', '.join(KINDS)}")
        self.kind = kind or None  # type: ignore[assignment]
        self.root = input if input.is_dir() else input.parent
        self.files = find_files(input, SUFFIXES)
        if not self.files:
            raise UserError(f"no {', '.join(SUFFIXES)} files in {input}")
        self.images = ImageSource(images or self.root)

    def signature(self) -> str:
        return files_signature([*self.files, *self.images.tars], self.root)

    def units(self) -> list[Unit]:
        return line_units(self.files)

    @functools.cached_property
    def _lines(self) -> LineNumbers:
        return LineNumbers(self.units())

    def place(self, name: str) -> str:
        return self._lines.name(name)

    def prepare(self, folder: Path) -> None:
        self.images.prepare(folder)

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        near = (unit.payload[0].name.split(".")[0],)
        for name, line in typed_lines(unit, drops, _TextsOnly):
            if isinstance(line, _TextsOnly):
                yield Document(line.items, name=name, kind=line.kind)
            elif (kind := line.get("kind")) is not None and kind not in KINDS:
                drops.bad("document", f"its kind is none of {', '.join(KINDS)}", name)
            elif isinstance(items := line.get("items"), list):
                yield Document(tuple(self._items(items, near, name, drops)), name=name, kind=kind)
            else:
                drops.bad("document", 'no list "items"', name)

    def _items(self, items: list[Any], near: tuple[str], name: str, drops: Drops) -> Iterator[Text | Image]:
        for item in items:
            if not isinstance(item, dict) or ("text" in item) == ("image" in item):
                drops.bad("text", 'an item without one of "text" and "image"', name)
            elif "text" in item:
                yield text_item(item["text"], name, drops)
            elif not isinstance(item["image"], str):
                drops.bad("image", "no name", name)
            else:
                try:
                    data = self.images.read(item["image"], near)
                except BadImage as error:
                    drops.bad("image", str(error), f"{name}: {item['image'][:200]}")
                    continue
                yield Image(
                    data,
                    name=item["image"],
                    similarity=number_or_none(item.get("similarity")),
                    matched_text=index_or_none(item.get("matched_text_index")),
                )
