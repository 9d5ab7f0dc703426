"""A folder of HTML pages: texts and images in reading order, without navigation and decoration.

A page becomes one document, a long one several, cut at headings. Consecutive paragraphs are joined by line ends; a
segment ends where an image stands. Images are found relative to their page (or to `images`), inside the folder only.
What of a page is its content: `html_page.py`; which texts are the site's: `html_repeats.py`; which pages and
images repeat: `html_scan.py`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import posixpath
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar
from urllib.parse import SplitResult, unquote_to_bytes

import lxml.etree
import xxhash

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import DAMAGE, BadImage, open_image, probe
from megatron_lcl.data.corpus.words import spaced
from megatron_lcl.data.prepare.importers import Each, Unit
from megatron_lcl.data.prepare.importers.charsets import text_of_page
from megatron_lcl.data.prepare.importers.files import FilesImporter, TooLarge, normal_forms, whole_file
from megatron_lcl.data.prepare.importers.html_page import Block, Event, Page, assemble, file_path, parse_page, split_url
from megatron_lcl.data.prepare.importers.html_repeats import EdgeTexts, edge_keys, without_repeated
from megatron_lcl.data.prepare.importers.html_scan import Repeats, counting
from megatron_lcl.data.storage.paths import ObjectPath
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import below, is_file, raise_if_passing

_PAGES_PER_UNIT = 64
_PAGES_PER_LOOK = 16
"""pages that a process scans together"""
_IMAGES_KNOWN = 4096
_DECORATION = 1 / 3
"""an image on a larger share of the pages, a site's logo, says nothing about which pages belong together"""


@dataclass(frozen=True, slots=True)
class _Look:
    """What the scan sees on one page."""

    digest: bytes
    """of all that is on it"""
    edge_keys: set[int] | None
    """of its texts; None where it shows nothing, or another page"""
    images: list[bytes]
    """content hashes of its images that are there, each once"""
    num_bytes: int
    """of these images"""


class HtmlImporter(FilesImporter):
    """A folder of HTML pages, or one; in the order of their names."""

    kind = "natural"
    rules = 6
    separator = "\n"  # as between paragraphs
    reads_objects = True
    strict = False  # beside pages links to scripts of other packages are common
    reads = "folder of HTML pages (.html, .htm, .xhtml); images beside the pages (or in --images), or in data: URLs"
    suffixes: ClassVar[tuple[str, ...]] = (".html", ".htm", ".xhtml")

    def __init__(
        self,
        input: Path,
        images: Path | None = None,
        min_side: Annotated[int, "images with a shorter side are skipped, pixels"] = 64,
        max_aspect: Annotated[float, "images with a longer to a shorter side above this are skipped"] = 8.0,
        max_page_share: Annotated[
            float, "images that stand on a larger share of the pages, and on more than 2, are decoration"
        ] = 0.05,
        max_repeats: Annotated[int, "pages on which one image may stay"] = 8,
        max_text_share: Annotated[
            float, "texts at the start or end of a larger share of the pages, and of at least 10, go"
        ] = 0.25,
        max_words: Annotated[
            int, "longer pages are split at headings, words; of scripts without spaces, letters"
        ] = 1000,
        text_pages: Annotated[bool, "keep pages without any image"] = False,
    ) -> None:
        super().__init__(input)
        if images is not None and is_file(images):
            raise UserError(f"--images {images} is a file; unpack it, and name the folder that its images are in then")
        self.image_root = (images or self.root).resolve()
        self._images: dict[str, Path] | None = None
        """where they are objects that can be listed: by name below the folder"""
        if isinstance(self.image_root, ObjectPath) and self.image_root in (images, input):
            listed = below(self.image_root)
            self._images = {file.relative_to(self.image_root).as_posix(): file for file in listed} or None
        self.min_side, self.max_aspect = min_side, max_aspect
        self.max_page_share, self.max_repeats = max_page_share, max_repeats
        self.max_text_share, self.max_words, self.text_pages = max_text_share, max_words, text_pages
        self.pages = self.list_pages()
        self._repeats: Repeats | None = None
        self._repeated_texts: frozenset[int] = frozenset()
        """hashes of those that stand at the edges of many pages"""
        self._num_bytes = array("q")
        """of each page's images"""
        self._known: dict[bytes, str] = {}
        """of images seen lately, by their content hash: why one is skipped everywhere; empty for the others"""

    # --- what other kinds of pages replace -------------------------------------------------------------------

    def list_pages(self) -> Sequence[str]:
        """Names of all pages, in order."""
        return self.found.names

    def page_size(self, name: str) -> int:
        return self.found.path(name).stat().st_size

    def page_html(self, name: str) -> bytes:
        """OSError or ValueError where it cannot be read."""
        return whole_file(self.found.path(name))

    def page_text(self, name: str) -> tuple[str, list[str]]:
        """(a page's HTML, what to note of how it was read). Errors as of `page_html`."""
        return text_of_page(self.page_html(name))

    def parse(self, name: str) -> Page:
        """One with a `fault` where it cannot be read."""
        try:
            text, noted = self.page_text(name)
            return replace(parse_page(text, name), noted=noted)
        except (OSError, lxml.etree.LxmlError, ValueError) as error:
            raise_if_passing(error, self.found.path(name))
            return Page(fault="page that cannot be read")

    def about(self, name: str) -> dict[str, str]:
        """Metadata of a page's documents: "group", and, where the page says it, "id"."""
        return {"group": name}

    def locate(self, page: str, url: SplitResult) -> Path | None:
        """The file that the URL of an image means; None outside the folder or for another host's."""
        if url.scheme not in ("", "file") or url.netloc:
            return None
        path = file_path(url)
        name = posixpath.normpath(posixpath.join("" if path[:1] == "/" else posixpath.dirname(page), path.lstrip("/")))
        return None if name.split("/")[0] == ".." or "\0" in name else self.image_root / name

    def image_bytes(self, file: Path) -> bytes:
        """Of what `locate` found; OSError or ValueError where it is not there, TooLarge where it is over MAX_FILE."""
        name = file.relative_to(self.image_root).as_posix()
        for form in normal_forms(name):
            with contextlib.suppress(FileNotFoundError):
                return self._image_bytes(form)
        raise FileNotFoundError(name)

    def _image_bytes(self, name: str) -> bytes:
        if self._images is None:
            return whole_file(self.image_root / name)
        if name not in self._images:
            raise FileNotFoundError(name)
        return whole_file(self._images[name])

    # --- units -----------------------------------------------------------------------------------------------

    def units_of_files(self) -> list[Unit]:
        if self._repeats is None:
            self.scan(lambda function, items: (function(self, item) for item in items))
        units = []
        for start in range(0, len(self.pages), _PAGES_PER_UNIT):
            pages = range(start, min(start + _PAGES_PER_UNIT, len(self.pages)))
            size = sum(self.page_size(self.pages[page]) for page in pages)
            units.append(Unit(self.pages[start], size + sum(self._num_bytes[start : pages.stop]), pages))
        return units

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        """Payload: the pages' numbers."""
        for page in unit.payload:
            yield from self.documents_of_page(page, drops)

    # --- the scan: what repeats ------------------------------------------------------------------------------

    def scan(self, each: Each) -> None:
        num = len(self.pages)
        groups = [range(start, min(start + _PAGES_PER_LOOK, num)) for start in range(0, num, _PAGES_PER_LOOK)]
        edge_texts = EdgeTexts()
        with counting(self.max_repeats) as tally:
            for look in itertools.chain.from_iterable(each(HtmlImporter._look_at, groups)):
                self._num_bytes.append(look.num_bytes)
                if tally.add_page(look.digest):
                    tally.add_images(look.images)
                    if look.edge_keys is not None:
                        edge_texts.add(look.edge_keys)
            self._repeats = tally.repeats()
        self._repeated_texts = edge_texts.repeated(self.max_text_share)

    def _look_at(self, pages: range) -> list[_Look]:
        """What is on each page."""
        looks = []
        for name in (self.pages[page] for page in pages):
            page = self.parse(name)
            sizes: dict[bytes, int] = {}
            for kind, source in page.events:
                if kind == "image":
                    with contextlib.suppress(BadImage):
                        data = self._read(name, source)
                        digest = xxhash.xxh3_128_digest(data)
                        sizes[digest] = 0 if self._unwanted(digest, data) else len(data)
            shows = page.events and not page.redirect
            content = name if page.fault else page.events  # no page repeats one that could not be read
            looks.append(
                _Look(
                    xxhash.xxh3_128_digest(repr(content).encode()),
                    edge_keys(list(assemble(page.events))) if shows else None,
                    list(sizes),
                    sum(sizes.values()),
                )
            )
        return looks

    def _unwanted(self, digest: bytes, data: bytes) -> str:
        """Why an image is skipped everywhere, whatever the pages; "" where it is not, or is damaged."""
        if (reason := self._known.get(digest)) is None:
            if len(self._known) >= _IMAGES_KNOWN:
                self._known.clear()
            reason = self._known[digest] = self._unwanted_shape(data)
        return reason

    def _unwanted_shape(self, data: bytes) -> str:
        try:
            short, long = sorted(open_image(data).size)
            if short >= self.min_side and long <= self.max_aspect * short:
                return ""
            probe(data)  # which decodes it: one that is damaged is counted as such later
        except (BadImage, *DAMAGE):
            return ""
        return (
            f"under {self.min_side} pixels on a side" if short < self.min_side else f"aspect above {self.max_aspect:g}"
        )

    # --- one page --------------------------------------------------------------------------------------------

    def documents_of_page(self, number: int, drops: Drops) -> Iterator[Document]:
        assert self._repeats is not None, "units() comes first"
        name = self.pages[number]
        page = self.parse(name)
        if page.fault:
            drops.bad("document", page.fault, name)
            return
        for reason, text in page.left_out:
            drops.left_out("text", reason, name, sample=text)
        if page.redirect:
            drops.left_out("document", "redirect", name, sample=_text(assemble(page.events)))
            return
        if (original := self._repeats.original[number]) != number:
            drops.left_out("document", "repeats another page", f"{name} = {self.pages[original]}")
            return
        for reason in page.noted:
            drops.note("document", reason, name)
        seen: set[bytes] = set()
        shares: set[str] = set()
        events: list[Event] = []
        bad_before, num_named = drops.num_bad("image"), 0
        for kind, value in page.events:
            if kind != "image":
                events.append((kind, value))
                continue
            num_named += 1
            if (image := self._image(number, value, seen, shares, drops)) is not None:
                events.append(("image", image))
        num_lost = drops.num_bad("image") - bad_before
        items, repeated = without_repeated(list(assemble(events)), self._repeated_texts)
        for block in repeated:
            drops.left_out("text", "repeated at the edges of many pages", name, sample=block.value)
        if any(item.kind == "image" for item in items) or (items and self.text_pages):
            parts = list(_split(items, self.max_words))
            for number, part in enumerate(parts):
                label = name if len(parts) == 1 else f"{name}#{number}"
                about = {**self.about(name), "shares": sorted(shares), "lost_images": num_lost}
                yield Document(_join(part), name=label, metadata=about)
            return
        if num_named:
            reason = "page whose images are missing" if num_lost else "page whose images were all left out"
        else:
            reason = "page without images" if items else "empty page"
        drops.left_out("document", reason, name, sample=_text(items))

    def _image(self, number: int, source: str, seen: set[bytes], shares: set[str], drops: Drops) -> Image | None:
        """The image if it stays; else its drop is counted, and `shares` takes one that joins this page to others."""
        assert self._repeats is not None
        page = self.pages[number]
        label = f"{page}: {source[:100]}"
        url = split_url(source)
        if (url and url.path.lower().endswith((".svg", ".svgz"))) or source.startswith("data:image/svg"):
            drops.left_out("image", "vector graphics", label)
            return None
        try:
            data = self._read(page, source)
        except BadImage as error:
            drops.bad("image", str(error), label)
            return None
        digest = xxhash.xxh3_128_digest(data)
        unwanted = self._unwanted(digest, data)
        num_pages, may_stay = self._repeats.of_image(digest, number)
        if not unwanted and num_pages > 1:
            if num_pages > max(2, self.max_page_share * len(self.pages)):
                unwanted = f"stands on over {self.max_page_share:.0%} of the pages"
            if num_pages <= _DECORATION * len(self.pages):
                shares.add(digest.hex())
        if not unwanted and (digest in seen or not may_stay):
            unwanted = f"repeated (on a page, or on more than {self.max_repeats} pages)"
        if unwanted:
            drops.left_out("image", unwanted, label)
            return None
        seen.add(digest)
        return Image(data, name=source[:200])

    def _read(self, page: str, source: str) -> bytes:
        if source.startswith("data:"):
            return _data_url(source)
        if (url := split_url(source)) is None:
            raise BadImage("source is no URL")
        if (file := self.locate(page, url)) is None:
            raise BadImage("on another host" if url.netloc else "outside the folder")
        try:
            return self.image_bytes(file)
        except TooLarge as error:
            raise BadImage(str(error)) from None
        except (OSError, ValueError) as error:
            raise_if_passing(error, file)
            raise BadImage("file missing") from None


def _split(items: list[Block], max_words: int) -> Iterator[list[Block]]:
    """The items in parts of at most `max_words`, each starting at a heading; a section longer than that stays whole."""
    part: list[Block] = []
    section: list[Block] = []
    num_part = num_section = 0
    for item in [*items, Block("heading", "")]:
        if item.kind == "heading" and any(other.kind != "heading" for other in section):
            if part and num_part + num_section > max_words:
                yield part
                part, num_part = [], 0
            part, num_part = part + section, num_part + num_section
            section, num_section = [], 0
        section.append(item)
        num_section += len(spaced(item.value).split()) if item.kind != "image" else 0
    part += section[:-1]
    if part:
        yield part


def _text(items: Iterable[Block]) -> str:
    """The beginning of a page's text."""
    texts = (item.value for item in items if item.kind != "image")
    return " ".join(itertools.islice(texts, 8))


def _join(items: list[Block]) -> tuple[Text | Image, ...]:
    """Consecutive paragraphs become one text segment."""
    result: list[Text | Image] = []
    paragraphs: list[str] = []
    for item in [*items, Block("image", None)]:
        if item.kind != "image":
            paragraphs.append(item.value)
            continue
        if paragraphs:
            result.append(Text("\n".join(paragraphs)))
            paragraphs = []
        if item.value is not None:
            result.append(item.value)
    return tuple(result)


def _data_url(source: str) -> bytes:
    header, _, body = source.partition(",")
    try:
        raw = unquote_to_bytes(body)
        return base64.b64decode(raw, validate=False) if header.endswith(";base64") else raw
    except (binascii.Error, ValueError):
        raise BadImage("damaged data: URL") from None
