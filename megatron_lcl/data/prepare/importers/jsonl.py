"""The generic form: one document a line, `{"items": [{"text": "…"}, {"image": "relative/path.jpg"}, …]}`.

Image items may have "similarity" (a number) and "matched_text_index" (its segment's index among the line's text items).
A line may say its "kind": "matched", "natural" or "pairs"; option `kind` says it for the lines that do not. Its "url",
else its "id", is kept with the document's name. Texts stay exactly as they are given: nothing is put between them.
Images are found below `images`, else below the folder of the input; those named by a URL, in what `fetch` stored there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from megatron_lcl.data.corpus.document import KINDS, Document, Image, Kind, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.lines import JSON, NDJSON, LinesImporter, typed_lines
from megatron_lcl.data.prepare.importers.sources import ImagesByName, index_or_none, its_id, number_or_none, text_item
from megatron_lcl.errors import UserError


class _TextsOnly(msgspec.Struct):
    """A line that is nothing but texts, as most are of a text corpus: read without a look at each item in Python."""

    items: tuple[Text, ...]
    kind: Kind | None = None
    url: Any = None
    id: Any = None


class JsonlImporter(ImagesByName, LinesImporter):
    """JSON lines, a document each: see the file's head."""

    reads = (
        '.jsonl (.gz, .zst, .zip), else .ndjson, else .json (.gz, .zst) of lines {"kind": …, "items": [{"text": …}, '
        '{"image": path or URL, "similarity": …, "matched_text_index": …}]}; images in --images, a folder or tars, '
        "else beside the input"
    )
    later = (NDJSON, JSON)

    def __init__(
        self,
        input: Path,
        images: Path | None = None,
        kind: Annotated[
            str,
            f"kind of the documents whose line does not say it: {', '.join(KINDS)}; empty: matched if any of them has "
            "similarities, else natural",
        ] = "",
    ) -> None:
        if kind not in ("", *KINDS):
            raise UserError(f"--option kind={kind}: give {', '.join(KINDS)}")
        super().__init__(input)
        self.kind = kind or None  # type: ignore[assignment]
        self.look_in(images, self.root)
        self.beside = self.images.archives

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        near = (self.stem(unit.payload[0]),)
        for name, line in typed_lines(unit, drops, _TextsOnly):
            if isinstance(line, _TextsOnly):
                said = line.url is not None or line.id is not None
                named = its_id({"url": line.url, "id": line.id}, name, drops) if said else {}
                yield Document(line.items, name=name, kind=line.kind, metadata=named)
            elif (kind := line.get("kind")) is not None and kind not in KINDS:
                drops.bad("document", f"its kind is none of {', '.join(KINDS)}", name, sample=str(line))
            elif isinstance(items := line.get("items"), list):
                read = tuple(self._items(items, near, name, drops))
                lost = sum(isinstance(item, dict) and "image" in item and "text" not in item for item in items)
                lost -= sum(isinstance(item, Image) for item in read)
                yield Document(read, name=name, kind=kind, metadata={**its_id(line, name, drops), "lost_images": lost})
            else:
                drops.bad("document", 'no list "items"', name, sample=str(line))

    def _items(self, items: list[Any], near: tuple[str], name: str, drops: Drops) -> Iterator[Text | Image]:
        for item in items:
            if not isinstance(item, dict) or ("text" in item) == ("image" in item):
                drops.bad("text", 'an item without one of "text" and "image"', name, sample=str(item))
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
