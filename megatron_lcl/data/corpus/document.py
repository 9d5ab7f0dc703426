"""What a document is: texts and images in reading order. Importers yield it, a corpus gives it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import msgspec

Kind = Literal["matched", "natural", "pairs", "captions"]
"""how images stand to texts: matched to one of them by similarity, and selected by it; in reading order; one image and
one text that belong together, in any order; or one image and several texts, each of which makes such a pair with it"""
KINDS: tuple[Kind, ...] = get_args(Kind)
CAPTIONED: tuple[Kind, ...] = ("pairs", "captions")
"""those whose texts are alternatives, and do not follow each other"""


class Text(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A text segment. Special-token strings inside it are plain text."""

    text: Annotated[str, msgspec.Meta(min_length=1)]
    """never empty where it is decoded from JSON; an importer that counted it as unusable keeps its place with "" """


@dataclass(frozen=True, slots=True)
class Image:
    """An image as the source has it: encoded bytes, never decoded pixels."""

    data: bytes = field(repr=False)
    name: str = ""
    """where it came from, for messages: a path inside the source, or a URL"""
    similarity: float | None = None
    """similarity to its text segment, for sources that match images to segments (MMC4); None in natural order"""
    matched_text: int | None = None
    """index, among the document's texts, of the segment it is matched to; None in natural order"""


class Document(msgspec.Struct, frozen=True):
    """Texts and images, in order. `name` says where it came from: file, relative to the input, and place in it.

    `metadata` is JSON-able: "id", what the source itself calls the document, such as its URL; "group", documents that
    are held out together, and "shares", hashes of images that join groups; "lost_images", how many could not be read.
    """

    items: tuple[Text | Image, ...]
    name: str = ""
    metadata: dict[str, Any] = {}
    kind: Kind | None = None
    """None: that of its source"""

    @property
    def source(self) -> str:
        """The name that the corpus keeps: where the document lies, and what its source calls it."""
        if not self.metadata:
            return self.name
        own = self.metadata.get("id")
        return f"{self.name} {own}" if own else self.name

    @property
    def texts(self) -> list[Text]:
        return [item for item in self.items if isinstance(item, Text)]

    @property
    def images(self) -> list[Image]:
        return [item for item in self.items if isinstance(item, Image)]
