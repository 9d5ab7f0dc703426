"""One HTML page: its texts, images and headings in reading order, without what is not its content.

Three kinds of elements are skipped. Navigation: by tag, role, or the class and id words that the common tools write.
Hidden ones: by attribute, style, or class. And, where the page marks its main part (`main`, `role="main"`, or a single
`article`) and this holds enough of the text to be believed, all that stands outside of it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

import lxml.etree
import regex

from megatron_lcl.data.corpus.document import Image
from megatron_lcl.data.corpus.drops import SAMPLE_CHARACTERS

_MAIN_SHARE, _ARTICLE_SHARE = 0.2, 0.5
"""of the text that is not navigation: less, and the landmark is not believed. HTML says that `main` is the dominant
content; an `article` need not be more than a part of it"""
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_BLOCKS = _HEADINGS | frozenset(
    "address article aside blockquote body br caption center dd details dialog dir div dl dt fieldset figcaption "  # noqa: SIM905
    "figure footer form header hgroup hr html legend li main menu nav ol option p pre search section summary table "
    "tbody tfoot thead tr ul".split()
)
_SKIPPED = frozenset(
    "audio button canvas datalist embed head iframe input map math meter noscript object progress rp rt rtc script "  # noqa: SIM905
    "select style svg template textarea title video".split()
)
"""what is no text; of a ruby annotation the reading (rt, rtc), which would stand inside a word, with its parentheses"""
_LISTS = frozenset(("dl", "ol", "table", "ul"))
_CELLS = frozenset(("td", "th"))
_CELL = "\v"
"""stands before a cell: white space that is no line end of the source, nor beside one"""
_SKIPPED_ROLES = frozenset(("navigation", "banner", "contentinfo", "search", "menu", "menubar", "toolbar", "doc-toc"))


def _words(*patterns: str) -> re.Pattern[str]:
    """Any of the patterns as a word of a class or id."""
    return re.compile(rf"(?:^|\s)(?:{'|'.join(patterns)})(?:\s|$)", re.IGNORECASE)


# class or id words of navigation, by the tool that writes them
_NAVIGATION = _words(
    r"nav|navbar\S*|navheader|navfooter|navigation|nav-?links|navtree|side-?nav|bread-?crumbs?|related",
    r"toc|table-?of-?contents|local-?toc|page-?toc|pagination|pager|footer|site-?footer|page-?footer|site-?header",
    r"cookie\S*|reportbug|headerlink|back-to-top",
    r"sphinxsidebar|toctree-wrapper|viewcode-(?:link|back)",  # Sphinx
    r"sidebar-drawer|toc-drawer|related-pages|bottom-of-page|mobile-header|content-icon-container",  # Furo
    r"bd-(?:sidebar|header|footer|toc)\S*|prev-next-\S+",  # PyData
    r"wy-nav-(?:side|top)|wy-breadcrumbs\S*|rst-footer-buttons|rst-versions",  # Read the Docs
    r"md-(?:nav|sidebar|header|footer|tabs|search|source|top|dialog|consent|content__button)(?:[-_]\S*)?",  # Material
    r"bs-sidebar",  # MkDocs
    r"theme-doc-(?:sidebar|breadcrumbs|toc)\S*|theme-edit-this-page|pagination-nav\S*",  # Docusaurus
    r"titlebar-nav|doxygen-nav|titlearea|main-nav|nav-path|navpath|navrow\d|tabs\d?|nav-tree|MSearch\S+",  # Doxygen
    r"mw-navigation|mw-editsection|vector-toc|mw-head|mw-panel|mw-portlet\S*|mw-indicators",  # MediaWiki
    r"siteSub|contentSub\d?|jump-to-nav|printfooter|catlinks|navbox\S*",
)
_SIDEBAR = _words(r"side-?bar\S*")
_HIDDEN_CLASS = _words(
    r"visually-?hidden\S*|sr-only\S*|screen-?reader-?(?:text|only)\S*|a11y-hidden|hidden-visually|assistive-text",
    r"skip-?(?:link|nav|to-|content)\S*|md-skip|mw-jump-link",
)
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_REFRESH = re.compile(r"\s*[\d.]+\s*[;,]?\s*(?:url\s*=\s*)?[\"']?([^\"']*)", re.IGNORECASE)
"""the value of a refresh: seconds, and the page that is shown then (HTML standard, declarative refresh)"""
_ROLE_MAIN = lxml.etree.XPath("//*[@role='main']")
_DOCBOOK = _words(r"chapter|sect[1-5]|appendix|preface|refentry")
_LETTER = re.compile(r"\w")
_SOFT_HYPHEN = "\u00ad"
_SHOWN = re.compile(r"[^\s\u00ad\u200b\ufeff]")
_WIDE = r"[[\p{EA=W}\p{EA=F}\p{EA=H}]--\p{Hangul}]"
_LINE_END = regex.compile(rf"(?<={_WIDE})[ \t\f]*[\r\n][ \t\f\r\n]*(?={_WIDE})", regex.VERSION1)
"""of the source, that is no space: between characters of scripts that are written without (CSS Text Module Level 3,
section 4.1.3: East Asian Width wide, full or half, and not Hangul)"""

NAVIGATION, HIDDEN, OUTSIDE = "navigation", "hidden", "outside of the page's main part"
"""why a text is left out"""

Event = tuple[str, "str | Image"]
"""("text" | "link" | "verbatim", characters), ("break", ""), ("heading", tag) where one begins, ("title", "") for the
page's title from outside of its main part, ("image", source, or the image itself)"""


class Block(NamedTuple):
    """A paragraph or an image, as it stands among the others of a page."""

    kind: str
    """"heading", "title", "text" or "image"""
    value: Any
    """the characters, or what the image's event held"""
    links: tuple[str, ...] = ()
    """the parts of a text that is links and nothing else"""


@dataclass
class Page:
    """What is on a page, in order, and what was skipped."""

    events: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(why, the beginning of the text) of each element of navigation, hidden element that has a text, and text outside
    of the main part"""
    redirect: bool = False
    noted: list[str] = field(default_factory=list)
    """what is to be known of how it was read"""
    fault: str = ""
    """why a page that is bad, and holds nothing, could not be read"""


def split_url(url: str) -> SplitResult | None:
    """The parts of a URL; None for what is none, such as `http://[host]/`.

    A backslash before the query is a slash, as in browsers (WHATWG URL Standard, special URLs)."""
    end = next((found.start() for found in re.finditer(r"[?#]", url)), len(url))
    try:
        return urlsplit(url[:end].replace("\\", "/") + url[end:])
    except ValueError:
        return None


def file_path(url: SplitResult) -> str:
    """The path of a file that a URL means, which need not be UTF-8: as Python has names of files."""
    return unquote(url.path, errors="surrogateescape")


def parse_page(text: str, name: str) -> Page:
    """The page with the path `name`, of the characters `text`; an empty one where nothing can be read.

    Raises lxml.etree.LxmlError or ValueError for some of what is no HTML at all.
    """
    parser = lxml.etree.HTMLParser(huge_tree=True, remove_comments=True, remove_pis=True, encoding="utf-8")
    tree = lxml.etree.fromstring(text.encode(), parser) if text.strip() else None
    if tree is None:
        return Page()
    mains, needed_share = _main_part(tree)
    page = _read(tree, mains, needed_share) if mains else None
    if page is None:
        page = Page()
        _Walker(page).walk(tree)
    page.redirect = _is_redirect(tree, name)
    given = next((href for node in tree.iter("base") if (href := node.get("href")) is not None), "")
    base = split_url(given.strip())
    # where a copy of a site has its other folders, or those of its host, is not known: there images count from the page
    if base is not None and not (base.scheme or base.netloc) and re.match(r"/$|[^/]", base.path):
        page.events = [(kind, _based(value, base.path) if kind == "image" else value) for kind, value in page.events]
    return page


def _based(source: str, base: str) -> str:
    """The URL of an image on a page that gives the path from which its relative ones count (HTML standard, `base`)."""
    url = split_url(source)
    if url is None or url.scheme or url.netloc or url.path[:1] == "/":
        return source
    return posixpath.join(posixpath.dirname(base), source)


def _is_redirect(tree: Any, name: str) -> bool:
    """Whether a browser with scripts goes on from the page to another one by itself; not where it loads it again."""
    for meta in tree.iter("meta"):
        unused = next(meta.iterancestors("noscript", "template"), None) is not None
        if (meta.get("http-equiv") or "").lower() == "refresh" and not unused:
            found = _REFRESH.match(meta.get("content") or "")
            if (target := split_url(found[1].strip() if found else "")) is None:
                continue
            path = posixpath.normpath(posixpath.join("/", posixpath.dirname(name), file_path(target)))
            if target.netloc or (target.path and path != f"/{name}"):
                return True
    return False


# --- the main part -----------------------------------------------------------------------------------------------


def _main_part(tree: Any) -> tuple[list[Any], float]:
    """The outermost elements that the page marks as its content, none where it does not; the text they must hold."""
    mains = _outermost([*tree.iter("main"), *_ROLE_MAIN(tree)])
    if mains:
        return mains, _MAIN_SHARE
    articles = _outermost(tree.iter("article"))
    return (articles if len(articles) == 1 else []), _ARTICLE_SHARE


def _outermost(nodes: Iterable[Any]) -> list[Any]:
    """Those that lie in no other."""
    found = dict.fromkeys(nodes)
    return [node for node in found if not any(ancestor in found for ancestor in node.iterancestors())]


def _read(tree: Any, mains: list[Any], needed_share: float) -> Page | None:
    """The page of these elements; None where they hold too little of the text to be the content."""
    page = Page()
    walker = _Walker(page, mains)
    walker.walk(tree)
    inside: list[tuple[str, str]] = []
    outside: list[tuple[str, str]] = []
    last = 0
    for start, end in walker.ranges:
        outside += page.events[last:start]
        inside += [*page.events[start:end], ("break", "")]
        last = end
    before = page.events[: walker.ranges[0][0]] if walker.ranges else []
    outside += page.events[last:]
    inner, outer = _num_characters(inside), _num_characters(outside)
    if not inner or inner < needed_share * (inner + outer):
        return None
    texts_outside = [block.value for block in assemble(outside) if block.kind != "image"]
    titles = [] if ("heading", "h1") in inside else list(_titles(before))
    if len(titles) == 1:
        texts_outside.remove(_collapsed(titles[0]))
        inside = [("title", ""), ("text", titles[0]), ("break", ""), *inside]
    page.left_out += [(OUTSIDE, text) for text in texts_outside]
    page.events = inside
    return page


def _num_characters(events: Iterable[tuple[str, str]]) -> int:
    return sum(sum(map(len, value.split())) for kind, value in events if kind in ("text", "link", "verbatim"))


def _titles(events: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The texts of h1 headings."""
    parts: list[str] | None = None
    for kind, value in [*events, ("break", "")]:
        if kind in ("text", "link"):
            if parts is not None:
                parts.append(value)
            continue
        if parts and _SHOWN.search(title := "".join(parts)):
            yield title
        parts = [] if (kind, value) == ("heading", "h1") else None


class _Walker:
    """Reads a tree in document order into a page's events."""

    def __init__(self, page: Page, mains: Iterable[Any] = ()) -> None:
        self._page = page
        self._mains = set(mains)
        self._around = {ancestor for main in self._mains for ancestor in (main, *main.iterancestors())}
        self._main: Any = None
        self._lists_of_links: dict[Any, bool] = {}
        """which lists are one, of those in a list that was asked for"""
        self._preformatted = self._links = 0
        self._sources: str | None = None
        """in a `picture` the first of its `source` elements so far, which stand before its `img`"""
        self.ranges: list[tuple[int, int]] = []
        """first and last event, exclusive, of each main element that was read"""

    def walk(self, root: Any) -> None:
        start = 0
        skipped: Any = None
        nodes = lxml.etree.iterwalk(root, events=("start", "end"))
        for event, node in nodes:
            if event == "start":
                if skipped is None:
                    if not self._enter(node):
                        skipped = node
                        nodes.skip_subtree()
                        continue
                    if node in self._mains:
                        self._main, start = node, len(self._page.events)
                    if node.text:
                        self._add("text", node.text)
            elif skipped in (None, node):
                if skipped is None:
                    self._leave(node)
                    if node is self._main:
                        self._main = None
                        self.ranges.append((start, len(self._page.events)))
                skipped = None
                if node is not root and node.tail:
                    self._add("text", node.tail)

    def _enter(self, node: Any) -> bool:
        """False where the element and all in it is skipped."""
        tag = node.tag
        if not isinstance(tag, str) or tag in _SKIPPED:
            return False
        attributes = dict(node.items())
        if _is_hidden(tag, attributes):
            if text := _beginning(node):
                self._page.left_out.append((HIDDEN, text))
            return False
        if node not in self._around and self._is_navigation(node, attributes):
            self._page.left_out.append((NAVIGATION, _beginning(node)))
            if tag in _BLOCKS:
                self._add("break")
            return False
        if tag == "img":
            self._add("image", _source(attributes, self._sources or ""))
        elif tag == "picture":
            self._sources = ""
        elif tag == "source" and self._sources == "":
            self._sources = _first_source(attributes, "data-srcset", "srcset")
        elif tag in _HEADINGS:
            self._add("heading", tag)
        elif tag in _BLOCKS:
            self._add("break")
        elif tag in _CELLS:
            self._add("text", " " if self._preformatted else _CELL)
        self._preformatted += tag == "pre"
        self._links += tag == "a" and "href" in attributes
        return True

    def _leave(self, node: Any) -> None:
        tag = node.tag
        self._preformatted -= tag == "pre"
        self._links -= tag == "a" and node.get("href") is not None
        if tag == "picture":
            self._sources = None
        if tag in _BLOCKS:
            self._add("break")

    def _add(self, kind: str, value: str = "") -> None:
        events = self._page.events
        if kind == "text" and self._preformatted:
            for number, line in enumerate(value.split("\n")):
                if number:
                    events.append(("break", ""))
                events.append(("verbatim", line))
        elif kind in ("text", "image"):
            if value:
                events.append(("link" if kind == "text" and self._links else kind, value))
        elif kind == "heading" or not events or events[-1][0] != kind:
            events.append((kind, value))

    def _is_navigation(self, node: Any, attributes: dict[str, str]) -> bool:
        tag = node.tag
        if tag == "nav" or attributes.get("role", "").lower() in _SKIPPED_ROLES:
            return True
        if tag in ("header", "footer") and node.getparent() is not None and node.getparent().tag in ("body", "div"):
            # of the page, not of an article or section; a page's own title may stand in its header
            return tag == "footer" or not any(True for _ in node.iter("h1", "h2", "h3"))
        if tag in ("body", "html", "main", "article"):
            return False
        if tag == "aside" and self._mains and self._main is None:
            return True
        names, identity = attributes.get("class"), attributes.get("id")
        if names and (_NAVIGATION.search(names) or (_SIDEBAR.search(names) and not _is_authors_box(node))):
            return True
        if identity and (_NAVIGATION.search(identity) or _SIDEBAR.search(identity)) and not _is_titled(node):
            return True
        # in the main part a list of links is the author's: tools mark theirs
        if tag not in _LISTS or self._main is not None:
            return False
        if node not in self._lists_of_links:
            self._lists_of_links.update(_lists_of_links(node))
        if not self._lists_of_links[node]:
            return False
        return not any(_DOCBOOK.search(ancestor.get("class") or "") for ancestor in node.iterancestors("div"))


def _beginning(node: Any) -> str:
    """Of an element's text, enough for a sample; "" where it has none."""
    parts: list[str] = []
    size = 0
    for part in node.itertext():
        if part.strip():
            parts.append(part)
            size += len(part)
            if size >= SAMPLE_CHARACTERS:
                break
    return " ".join(parts)


def _source(attributes: dict[str, str], others: str) -> str:
    """What is shown for `img`: its own source, or what a script loads in the place of a data: URL, or, without both,
    the first of several sources, its own before `others`."""
    source = attributes.get("src", "").strip()
    lazy = (attributes.get("data-src") or attributes.get("data-original") or "").strip()
    lazy = lazy or _first_source(attributes, "data-srcset")
    if lazy and (not source or source.startswith("data:")):
        return lazy
    return source or _first_source(attributes, "srcset") or others


def _first_source(attributes: dict[str, str], *names: str) -> str:
    """The first URL in one of these attributes, each a `srcset`; "" where there is none."""
    found = (attributes.get(name, "").lstrip(" \t\r\n\f,").split(maxsplit=1) for name in names)
    return next((words[0].rstrip(",") for words in found if words), "")


def _is_hidden(tag: str, attributes: dict[str, str]) -> bool:
    if tag == "dialog" and "open" not in attributes:
        return True
    if not attributes or tag in ("html", "body"):  # a hidden body is shown by a script once all is loaded
        return False
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or bool(_HIDDEN_STYLE.search(attributes.get("style", "")))
        or bool(_HIDDEN_CLASS.search(attributes.get("class", "")))
    )


def _is_titled(node: Any) -> bool:
    """A heading, or a section that begins with its own: tools make its id of its words, be they "Navigation"."""
    if node.tag in _HEADINGS:
        return True
    if node.tag != "section" and "section" not in (node.get("class") or "").split():
        return False
    first = next((child for child in node if child.tag not in ("a", "span")), None)
    return first is not None and first.tag in _HEADINGS


def _is_authors_box(node: Any) -> bool:
    """A box beside the text as docutils writes it (or the title in one), which is no navigation."""
    return any("sidebar-title" in (part.get("class") or "").split() for part in (node, *node))


def _lists_of_links(top: Any) -> Iterator[tuple[Any, bool]]:
    """Whether each list in `top`, itself one, is a table of contents under any name: six links or more, to the same
    site, hold nearly all of its text.

    In one pass, as lists lie in lists: each is what was counted from its start to its end.
    """
    size = links = local = in_links = 0
    before: list[tuple[int, int, int, int]] = []
    for event, node in lxml.etree.iterwalk(top, events=("start", "end")):
        counted = node.tag == "a" or node.tag in _LISTS
        if event == "start":
            if counted:
                before.append((size, links, local, in_links))
            size += _size(node.text)
            continue
        if counted:
            size_before, links_before, local_before, in_links_before = before.pop()
            if node.tag in _LISTS:
                links_here = links - links_before
                mostly_local = local - local_before > 0.8 * links_here
                yield node, links_here >= 6 and mostly_local and in_links - in_links_before > 0.8 * (size - size_before)
            elif (href := node.get("href")) and (url := split_url(href)) is not None:
                links += 1
                local += not url.netloc
                in_links += size - size_before
        size += _size(node.tail)


def _size(text: str | None) -> int:
    """Characters, without white space."""
    return sum(map(len, text.split())) if text else 0


# --- paragraphs --------------------------------------------------------------------------------------------------


def assemble(events: Iterable[Event]) -> Iterator[Block]:
    """The paragraphs and images of a page's events, without blank ones."""
    parts: list[tuple[str, str]] = []
    kind = "text"
    for event, value in [*events, ("break", "")]:
        if isinstance(value, str) and event in ("text", "link", "verbatim"):
            parts.append((event, value))
            continue
        if parts:
            raw = "".join([part for _, part in parts])
            paragraph = raw.replace(_SOFT_HYPHEN, "").rstrip() if parts[-1][0] == "verbatim" else _collapsed(raw)
            if _SHOWN.search(paragraph):
                yield Block(kind, paragraph, _only_links(parts))
                kind = "text"
            parts = []
        if event in ("heading", "title"):
            kind = event
        if event == "image":
            yield Block("image", value)


def _collapsed(raw: str) -> str:
    """Characters of the source as browsers show them: without soft hyphens, and with less white space."""
    if not raw.isascii():
        raw = _LINE_END.sub("", raw.replace(_SOFT_HYPHEN, ""))
    return " ".join(raw.split())


def _only_links(parts: list[tuple[str, str]]) -> tuple[str, ...]:
    """The texts of a paragraph's links where nothing but punctuation is between them, else none."""
    if all(kind == "link" or not _LETTER.search(text) for kind, text in parts):
        return tuple(text for kind, text in parts if kind == "link" and _LETTER.search(text))
    return ()
