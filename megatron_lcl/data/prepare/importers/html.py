"""A folder of HTML pages: texts and images in reading order, without navigation and decoration.

A page becomes one document, a long one several, cut at headings. Consecutive paragraphs are joined by line ends; a
segment ends where an image stands. Images are found relative to their page (or to `images`), inside the folder only.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import lxml.etree
import lxml.html
import xxhash

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage, probe
from megatron_lcl.data.prepare.importers import Importer, Unit, files_signature
from megatron_lcl.errors import UserError

_PAGES_PER_UNIT = 64
_DECORATION = 1 / 3
"""an image on a larger share of the pages, a site's logo, says nothing about which pages belong together"""
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_BLOCKS = _HEADINGS | frozenset(
    "address article aside blockquote body br caption center dd details dialog dir div dl dt fieldset figcaption "  # noqa: SIM905
    "figure form hr html legend li main menu ol option p pre section summary table tbody tfoot thead tr ul".split()
)
_SKIPPED = frozenset(
    "audio button canvas datalist embed head iframe input map math meter noscript object progress script select "  # noqa: SIM905
    "style svg template textarea title video".split()
)
_CELLS = frozenset(("td", "th"))
_SKIPPED_ROLES = frozenset(("navigation", "banner", "contentinfo", "search", "menu", "menubar", "toolbar", "doc-toc"))
# class or id words of navigation, as DocBook, Sphinx, MediaWiki, Doxygen, MkDocs and Bootstrap write them
_NAVIGATION = re.compile(
    r"(?:^|\s)(?:nav|navbar\S*|navheader|navfooter|navigation|nav-?links|navtree|side-?nav|side-?bar\S*|sphinxsidebar|"
    r"bread-?crumbs?|related|toc|table-?of-?contents|local-?toc|page-?toc|mw-navigation|mw-editsection|vector-toc|headerlink|"
    r"reportbug|skip-?link|pagination|pager|footer|site-?footer|page-?footer|site-?header|cookie\S*|"
    r"titlebar-nav|doxygen-nav)(?:\s|$)",
    re.IGNORECASE,
)
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_REFRESH = re.compile(r"\s*[\d.]+\s*[;,]?\s*(?:url\s*=\s*)?[\"']?([^\"']*)", re.IGNORECASE)
"""the value of a refresh: seconds, and the page that is shown then (HTML standard, declarative refresh)"""
_SPACE = re.compile(r"\s+")


@dataclass
class _Page:
    """What is on a page, in order: texts, image sources, headings."""

    events: list[tuple[str, str]] = field(default_factory=list)
    """("text" | "verbatim", characters), ("break", ""), ("heading", "") where one begins, ("image", source)"""
    num_navigation: int = 0
    redirect: bool = False


@dataclass(frozen=True, slots=True)
class _Rules:
    """What the first pass found out about the whole folder: what later passes do with each page and image."""

    duplicates: dict[str, str]
    """page → the page it repeats"""
    unwanted: dict[bytes, str]
    """content hash → why the image is left out everywhere"""
    first_pages: dict[bytes, list[str]]
    """content hash of an image that stands more often than allowed → pages on which it stays"""
    num_pages: dict[bytes, int]
    """content hash of an image that stands on several pages → their number"""


class HtmlImporter(Importer):
    """`input` is the folder (or one page); every .html, .htm and .xhtml below it is a page, in the order of names."""

    kind = "natural"

    options: ClassVar[dict[str, str]] = {
        "min_side": "images with a shorter side are left out, pixels (64)",
        "max_aspect": "images with a longer to a shorter side above this are left out (8)",
        "max_page_share": "images that stand on a larger share of the pages, and on more than 2, are decoration (0.05)",
        "max_repeats": "pages on which one image may stay (8)",
        "max_words": "longer pages are split at headings, words (1000)",
        "text_pages": "keep pages without any image (False)",
    }

    def __init__(
        self,
        input: Path,
        images: Path | None = None,
        min_side: int = 64,
        max_aspect: float = 8,
        max_page_share: float = 0.05,
        max_repeats: int = 8,
        max_words: int = 1000,
        text_pages: bool = False,
    ) -> None:
        self.root = input if input.is_dir() else input.parent
        self.image_root = (images or self.root).resolve()
        self.min_side, self.max_aspect = min_side, max_aspect
        self.max_page_share, self.max_repeats = max_page_share, max_repeats
        self.max_words, self.text_pages = max_words, text_pages
        suffixes = {".html", ".htm", ".xhtml"}
        files = [input] if input.is_file() else sorted(p for p in input.rglob("*") if p.suffix.lower() in suffixes)
        self.pages = [f.relative_to(self.root).as_posix() for f in files if f.is_file()]
        if not self.pages:
            raise UserError(f"no HTML pages (.html, .htm, .xhtml) in {input}; give the folder that holds them")
        self._rules: _Rules | None = None
        self._facts: dict[str, tuple[bytes, str]] = {}

    def signature(self) -> str:
        return files_signature([self.root / page for page in self.pages], self.root)

    def units(self) -> list[Unit]:
        if self._rules is None:
            self._rules = self._survey()
        groups = [self.pages[i : i + _PAGES_PER_UNIT] for i in range(0, len(self.pages), _PAGES_PER_UNIT)]
        return [Unit(group[0], sum((self.root / p).stat().st_size for p in group), group) for group in groups]

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        for name in unit.payload:
            yield from self._page_documents(name, drops)

    # --- the first pass: what repeats ------------------------------------------------------------------------

    def _survey(self) -> _Rules:
        contents: dict[bytes, str] = {}
        duplicates: dict[str, str] = {}
        pages_of: dict[bytes, list[str]] = {}
        for name in self.pages:
            page = self._parse(name)
            digest = xxhash.xxh3_128_digest(repr(page.events).encode())
            original = contents.setdefault(digest, name)
            if original != name:
                duplicates[name] = original
                continue
            found = (self._fact(name, source)[0] for kind, source in page.events if kind == "image")
            for image in dict.fromkeys(digest for digest in found if digest):
                pages_of.setdefault(image, []).append(name)
        limit = max(2, self.max_page_share * len(self.pages))
        share = f"stands on over {self.max_page_share:.0%} of the pages"
        return _Rules(
            duplicates,
            unwanted={image: share for image, pages in pages_of.items() if len(pages) > limit},
            first_pages={
                image: pages[: self.max_repeats] for image, pages in pages_of.items() if len(pages) > self.max_repeats
            },
            num_pages={image: len(pages) for image, pages in pages_of.items() if len(pages) > 1},
        )

    def _fact(self, page: str, source: str) -> tuple[bytes, str]:
        """(content hash, why it is unwanted by itself) of an image; the hash is empty for one that is not there."""
        key = f"{page}\0{source}" if source.startswith("data:") else str(self._locate(page, source))
        if key not in self._facts:
            try:
                data = self._read(page, source)
            except BadImage:
                self._facts[key] = (b"", "")
            else:
                self._facts[key] = (xxhash.xxh3_128_digest(data), self._unwanted(data))
        return self._facts[key]

    def _unwanted(self, data: bytes) -> str:
        try:
            size = probe(data)
        except BadImage:
            return ""
        if min(size.width, size.height) < self.min_side:
            return f"under {self.min_side} pixels on a side"
        if max(size.width, size.height) > self.max_aspect * min(size.width, size.height):
            return f"aspect above {self.max_aspect:g}"
        return ""

    # --- one page --------------------------------------------------------------------------------------------

    def _page_documents(self, name: str, drops: Drops) -> Iterator[Document]:
        assert self._rules is not None, "units() comes first"
        page = self._parse(name)
        if page.num_navigation:
            drops.left_out("text", "navigation", name, page.num_navigation)
        if page.redirect:
            drops.left_out("document", "redirect", name)
            return
        if name in self._rules.duplicates:
            drops.left_out("document", "repeats another page", f"{name} = {self._rules.duplicates[name]}")
            return
        seen: set[bytes] = set()
        shares: set[str] = set()
        events: list[tuple[str, str | Image]] = []
        for kind, value in page.events:
            if kind != "image":
                events.append((kind, value))
            elif (image := self._image(name, value, seen, shares, drops)) is not None:
                events.append(("image", image))
        items = list(_assemble(events))
        if not items:
            drops.left_out("document", "empty page", name)
        elif not self.text_pages and not any(kind == "image" for kind, _ in items):
            drops.left_out("document", "page without images", name)
        else:
            parts = list(_split(items, self.max_words))
            for number, part in enumerate(parts):
                label = name if len(parts) == 1 else f"{name}#{number}"
                yield Document(_join(part), name=label, metadata={"group": name, "shares": sorted(shares)})

    def _image(self, page: str, source: str, seen: set[bytes], shares: set[str], drops: Drops) -> Image | None:
        """The image if it stays; else its drop is counted, and `shares` takes one that joins this page to others."""
        assert self._rules is not None
        label = f"{page}: {source[:100]}"
        if urlsplit(source).path.lower().endswith((".svg", ".svgz")) or source.startswith("data:image/svg"):
            drops.left_out("image", "vector graphics", label)
            return None
        try:
            data = self._read(page, source)
        except BadImage as error:
            drops.bad("image", str(error), label)
            return None
        digest, unwanted = self._fact(page, source)
        allowed = self._rules.first_pages.get(digest)
        if not unwanted and digest in self._rules.num_pages:
            unwanted = self._rules.unwanted.get(digest, "")
            if self._rules.num_pages[digest] <= _DECORATION * len(self.pages):
                shares.add(digest.hex())
        if not unwanted and (digest in seen or (allowed is not None and page not in allowed)):
            unwanted = f"repeated (on a page, or on more than {self.max_repeats} pages)"
        if unwanted:
            drops.left_out("image", unwanted, label)
            return None
        seen.add(digest)
        return Image(data, name=source[:200])

    def _locate(self, page: str, source: str) -> Path | None:
        """The file an image source means; None outside the folder or for another host's."""
        parts = urlsplit(source)
        if parts.scheme not in ("", "file") or parts.netloc:
            return None
        path = unquote(parts.path)
        base = self.image_root if path.startswith("/") else (self.image_root / page).parent
        try:
            file = (base / path.lstrip("/")).resolve()
        except (OSError, ValueError, RuntimeError):
            return None
        return file if file.is_relative_to(self.image_root) else None

    def _read(self, page: str, source: str) -> bytes:
        if source.startswith("data:"):
            return _data_url(source)
        file = self._locate(page, source)
        if file is None:
            remote = urlsplit(source).netloc
            raise BadImage("on another host" if remote else "outside the folder")
        try:
            return file.read_bytes()
        except (OSError, ValueError):
            raise BadImage("file missing") from None

    def _parse(self, name: str) -> _Page:
        page = _Page()
        try:
            tree = _parse_html((self.root / name).read_bytes())
        except (OSError, lxml.etree.LxmlError, ValueError):
            return page
        if tree is not None:
            page.redirect = _is_redirect(tree, name)
            _Walker(page).walk(tree)
        return page


def _parse_html(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        parser = lxml.html.HTMLParser(huge_tree=True, remove_comments=True, remove_pis=True)  # finds <meta charset>
        return lxml.etree.fromstring(raw, parser)
    parser = lxml.html.HTMLParser(huge_tree=True, remove_comments=True, remove_pis=True, encoding="utf-8")
    return lxml.etree.fromstring(text.encode("utf-8"), parser) if text.strip() else None


def _is_redirect(tree: Any, name: str) -> bool:
    """Whether a browser with scripts goes on from the page to another one by itself; not where it loads it again."""
    for meta in tree.iter("meta"):
        unused = next(meta.iterancestors("noscript", "template"), None) is not None
        if (meta.get("http-equiv") or "").lower() == "refresh" and not unused:
            found = _REFRESH.match(meta.get("content") or "")
            target = urlsplit(found[1].strip() if found else "")
            path = posixpath.normpath(posixpath.join("/", posixpath.dirname(name), unquote(target.path)))
            if target.netloc or (target.path and path != f"/{name}"):
                return True
    return False


class _Walker:
    """Reads a tree in document order into a `_Page`."""

    def __init__(self, page: _Page) -> None:
        self._page = page
        self._preformatted = 0

    def walk(self, root: Any) -> None:
        skipped: Any = None
        for event, node in lxml.etree.iterwalk(root, events=("start", "end")):
            if skipped is None and event == "start":
                if self._enter(node):
                    self._add("text", node.text)
                else:
                    skipped = node
            elif event == "end" and skipped in (None, node):
                if skipped is None:
                    self._leave(node.tag)
                skipped = None
                if node is not root:
                    self._add("text", node.tail)

    def _enter(self, node: Any) -> bool:
        """False where the element and all in it is to be left out."""
        tag = node.tag
        if not isinstance(tag, str) or tag in _SKIPPED or _is_hidden(node):
            return False
        if _is_navigation(node):
            self._page.num_navigation += 1
            self._add("break")
            return False
        if tag == "img":
            self._add("image", _source(node))
        elif tag in _HEADINGS:
            self._add("heading")
        elif tag in _BLOCKS:
            self._add("break")
        elif tag in _CELLS:
            self._add("text", " ")
        self._preformatted += tag == "pre"
        return True

    def _leave(self, tag: str) -> None:
        self._preformatted -= tag == "pre"
        if tag in _BLOCKS:
            self._add("break")

    def _add(self, kind: str, value: str | None = "") -> None:
        events = self._page.events
        if kind == "text" and self._preformatted:
            for number, line in enumerate((value or "").split("\n")):
                if number:
                    events.append(("break", ""))
                events.append(("verbatim", line))
        elif kind in ("text", "image"):
            if value:
                events.append((kind, value))
        elif not events or events[-1][0] != kind:
            events.append((kind, ""))


def _source(image: Any) -> str:
    source = (image.get("src") or "").strip()
    lazy = (image.get("data-src") or image.get("data-original") or "").strip()
    return lazy if lazy and (not source or source.startswith("data:")) else source


def _is_hidden(node: Any) -> bool:
    return (
        node.get("hidden") is not None
        or node.get("aria-hidden") == "true"
        or bool(_HIDDEN.search(node.get("style") or ""))
    )


def _is_navigation(node: Any) -> bool:
    tag = node.tag
    if tag == "nav" or (node.get("role") or "").lower() in _SKIPPED_ROLES:
        return True
    if tag in ("header", "footer") and node.getparent() is not None and node.getparent().tag in ("body", "div"):
        # of the page, not of an article or section; a page's own title may stand in its header
        return tag == "footer" or not any(True for _ in node.iter("h1", "h2", "h3"))
    if tag in ("body", "html", "main", "article"):
        return False
    if _NAVIGATION.search(node.get("class") or ""):
        return True
    if _NAVIGATION.search(node.get("id") or "") and not _is_titled(node):
        return True
    return tag in ("ul", "ol", "dl", "table") and _is_list_of_links(node)


def _is_titled(node: Any) -> bool:
    """A heading, or a section that begins with its own: tools make its id of its words, be they "Navigation"."""
    if node.tag in _HEADINGS:
        return True
    if node.tag != "section" and "section" not in (node.get("class") or "").split():
        return False
    first = next((child for child in node if child.tag not in ("a", "span")), None)
    return first is not None and first.tag in _HEADINGS


def _is_list_of_links(node: Any) -> bool:
    """A table of contents under any name: six links or more, to the same site, hold nearly all of its text."""
    links = [a for a in node.iter("a") if a.get("href")]
    if len(links) < 6:
        return False
    in_links = sum(len("".join("".join(a.itertext()).split())) for a in links)
    local = sum(not urlsplit(a.get("href")).netloc for a in links)
    return local > 0.8 * len(links) and in_links > 0.8 * len("".join("".join(node.itertext()).split()))


def _assemble(events: Iterable[tuple[str, str | Image]]) -> Iterator[tuple[str, Any]]:
    """("heading" | "text", a paragraph) and ("image", Image), from the events of a page."""
    parts: list[str] = []
    kind, verbatim = "text", False
    for event, value in [*events, ("break", "")]:
        if isinstance(value, str) and event in ("text", "verbatim"):
            parts.append(value)
            verbatim = event == "verbatim"
            continue
        raw = "".join(parts)
        paragraph = raw.rstrip() if verbatim else _SPACE.sub(" ", raw).strip()
        parts, verbatim = [], False
        if paragraph.strip():
            yield kind, paragraph
            kind = "text"
        if event == "heading":
            kind = "heading"
        if event == "image":
            yield "image", value


def _split(items: list[tuple[str, Any]], max_words: int) -> Iterator[list[tuple[str, Any]]]:
    """The items in parts of at most `max_words`, each starting at a heading; a section longer than that stays whole."""
    part: list[tuple[str, Any]] = []
    section: list[tuple[str, Any]] = []
    num_part = num_section = 0
    for kind, value in [*items, ("heading", "")]:
        if kind == "heading" and any(k != "heading" for k, _ in section):
            if part and num_part + num_section > max_words:
                yield part
                part, num_part = [], 0
            part, num_part = part + section, num_part + num_section
            section, num_section = [], 0
        section.append((kind, value))
        num_section += len(value.split()) if kind != "image" else 0
    part += section[:-1]
    if part:
        yield part


def _join(items: list[tuple[str, Any]]) -> tuple[Text | Image, ...]:
    """Consecutive paragraphs become one text segment."""
    result: list[Text | Image] = []
    paragraphs: list[str] = []
    for kind, value in [*items, ("image", None)]:
        if kind != "image":
            paragraphs.append(value)
            continue
        if paragraphs:
            result.append(Text("\n".join(paragraphs)))
            paragraphs = []
        if value is not None:
            result.append(value)
    return tuple(result)


def _data_url(source: str) -> bytes:
    header, _, body = source.partition(",")
    try:
        raw = unquote_to_bytes(body)
        return base64.b64decode(raw, validate=False) if header.endswith(";base64") else raw
    except (binascii.Error, ValueError):
        raise BadImage("damaged data: URL") from None
