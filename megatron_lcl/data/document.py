"""What a document is: texts and images in reading order. Importers yield it, a corpus gives it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Text:
    """A text segment. Special-token strings inside it are plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it came: encoded bytes, never decoded pixels."""

    data: bytes = field(repr=False)
    name: str = ""
    """where it came from, for messages: a path inside the source, or a URL"""
    similarity: float | None = None
    """similarity to its text segment, for sources that match images to segments (MMC4); None in natural order"""
    matched_text: int | None = None
    """index, among the document's texts, of the segment it is matched to; None in natural order"""


@dataclass(frozen=True, slots=True)
class Document:
    """Texts and images, in order. `name` says where it came from; `metadata` is JSON-able and kept only in logs."""

    items: tuple[Text | Image, ...]
    name: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[Text]:
        return [item for item in self.items if isinstance(item, Text)]

    @property
    def images(self) -> list[Image]:
        return [item for item in self.items if isinstance(item, Image)]
