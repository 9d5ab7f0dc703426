"""The HTML importer on pages made for the purpose, and importers of other packages."""

from __future__ import annotations

import base64
import os
import unicodedata
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pytest
from data.helpers import TOKENIZER
from data.writers import picture

from megatron_lcl import plugins
from megatron_lcl.data.corpus.document import Document, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare import importers
from megatron_lcl.data.prepare.budget import Unusable
from megatron_lcl.data.prepare.importers import Importer, Unit, create
from megatron_lcl.data.prepare.importers.html import HtmlImporter
from megatron_lcl.data.prepare.importers.html_page import parse_page
from megatron_lcl.data.prepare.preprocess import preprocess

LARGE, OTHER, ICON, WIDE = picture(0, 80, 70), picture(1, 90, 80), picture(2, 16, 16), picture(3, 900, 70)


def read(folder: Path, pages: dict[str, str], files: dict[str, bytes] | None = None, **options: Any) -> tuple[
    list[list[str]], Drops
]:  # fmt: skip
    """Documents as lists of texts and image names in brackets."""
    for name, data in {**(files or {}), **{k: v.encode() for k, v in pages.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    importer, drops = create("html", folder, None, options), Drops()
    documents = [d for unit in importer.units() for d in importer.documents(unit, drops)]
    return [[i.text if isinstance(i, Text) else f"[{i.name[:20]}]" for i in d.items] for d in documents], drops


def test_sentences_and_reading_order(tmp_path: Path) -> None:
    page = """<html><head><title>not this</title><style>p {}</style></head><body><h1>The  title</h1>
    <p>A <b>bold</b>&nbsp;word, an icon <img src="icon.png"> in the
    sentence<br>and a line.</p><script>no()</script><table><tr><td>one</td><td>two</td></tr></table>
    Loose text <a href="x">linked</a>, <figure><img src="large.png" alt="no"><figcaption>Caption</figcaption></figure>
    <ul><li>first</li><li>second<p>paragraph</p></li></ul><pre>  two
      lines</pre><!-- no --><p hidden>no</p><p style="display: none">no</p>end&amp;</body></html>"""
    documents, drops = read(tmp_path, {"a.html": page}, {"large.png": LARGE, "icon.png": ICON})
    assert documents == [
        [
            "The title\nA bold word, an icon in the sentence\nand a line.\none two\nLoose text linked,",
            "[large.png]",
            "Caption\nfirst\nsecond\nparagraph\n  two\n      lines\nend&",
        ]
    ]
    assert drops.left_out_counts == {"image: under 64 pixels on a side": 1, "text: hidden": 2}


@pytest.mark.parametrize(
    "navigation",
    [
        "<nav>NAV <img src=other.png></nav>",
        "<div class=navheader>NAV</div>",
        "<div class='x navfooter'>NAV</div>",
        "<div role=navigation>NAV</div>",
        "<footer>NAV</footer>",
        "<header><p>NAV</p></header>",
        "<div id=toc>NAV</div>",
        "<div class=sphinxsidebar>NAV</div>",
        "<div class=related role=x><h3>Navigation</h3>NAV</div>",
        "<div id=toc><h2>Contents</h2>NAV</div>",
        "<section id=navigation><p>NAV</p></section>",
        "<ul>" + "".join(f"<li><a href='p{k}.html'>NAV {k}</a></li>" for k in range(8)) + "</ul>",
    ],
)
def test_navigation_is_left_out(tmp_path: Path, navigation: str) -> None:
    page = f"<body>{navigation}<article><header><h1>Title</h1></header><p>Text.<img src=large.png></article></body>"
    documents, drops = read(tmp_path, {"a.html": page}, {"large.png": LARGE, "other.png": OTHER})
    assert documents == [["Title\nText.", "[large.png]"]]
    assert drops.left_out_counts == {"text: navigation": 1}


@pytest.mark.parametrize(
    "section",
    [
        "<section id=navigation><h2>Navigation</h2>{}</section>",
        "<section id=footer><span id=id1></span><h3>Footer</h3>{}</section>",
        "<div class=section id=related><h1>Related</h1>{}</div>",
        "<div class='section level2' id=toc><h2>Toc</h2>{}</div>",
        "<h2 id=navigation>Navigation</h2>{}",
    ],
)
def test_a_section_named_so_by_its_own_heading_is_text(tmp_path: Path, section: str) -> None:
    page = f"<body>{section.format('<p>How to steer.</p><img src=large.png>')}</body>"
    documents, drops = read(tmp_path, {"a.html": page}, {"large.png": LARGE})
    assert len(documents) == 1
    assert [documents[0][0].split("\n")[1], documents[0][1]] == ["How to steer.", "[large.png]"]
    assert drops.left_out_counts == {}


@pytest.mark.parametrize(("number", "stays"), [(5, True), (6, False)])
def test_so_many_links_are_a_table_of_contents(tmp_path: Path, number: int, stays: bool) -> None:
    links = "".join(f"<li><a href={k}.html>chapter {k}</a>" for k in range(number))
    page = f"<p>text<img src=large.png></p><ul>{links}</ul>"
    (document,), _ = read(tmp_path, {"a.html": page}, {"large.png": LARGE})
    assert (len(document) == 3) == stays


def test_lists_with_links_are_text(tmp_path: Path) -> None:
    items = "".join(f"<li><a href='http://x/{k}'>Name {k}</a>, who wrote about it at length</li>" for k in range(8))
    documents, _ = read(tmp_path, {"a.html": f"<ul>{items}</ul><img src=large.png>"}, {"large.png": LARGE})
    assert documents[0][0].count("who wrote") == 8


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("\u6f22\u5b57\n  \u6f22\u5b57\u3002 \r\n\u304b\n\uff71", "\u6f22\u5b57\u6f22\u5b57\u3002\u304b\uff71"),
        ("\u6f22<b>\n\u5b57</b>\n<i>\u6f22</i>", "\u6f22\u5b57\u6f22"),
        ("\u6f22\u5b57 \u6f22\u5b57\u3000\u6f22", "\u6f22\u5b57 \u6f22\u5b57 \u6f22"),  # no line end
        ("\u6f22\nword\n\u6f22", "\u6f22 word \u6f22"),
        ("\ud55c\uad6d\n\ubb38\uc7a5\n\u6f22", "\ud55c\uad6d \ubb38\uc7a5 \u6f22"),  # Hangul has spaces
        ("\u6f22<br>\n\u5b57", "\u6f22\n\u5b57"),
        ("<table><tr><td>\u6f22</td>\n<td>\u5b57</td></tr></table>", "\u6f22 \u5b57"),
        ("<pre>\u6f22\n\u5b57</pre>", "\u6f22\n\u5b57"),
        ("<ruby>\u732b<rp>(</rp><rt>\u306d\u3053</rt><rp>)</rp></ruby>\u3067\u3042\u308b", "\u732b\u3067\u3042\u308b"),
        ("<ruby><rb>\u6771</rb><rtc><rt>tou</rt></rtc></ruby>x", "\u6771x"),
        ("Donau&shy;dampf&shy;schiff<pre>a&shy;b</pre>", "Donaudampfschiff\nab"),
        ("a<p>\u200b</p><p>\ufeff \u200b</p><p>&shy;</p>b \u200bc", "a\nb \u200bc"),
    ],
)
def test_characters_as_browsers_show_them(tmp_path: Path, source: str, shown: str) -> None:
    """Line ends between characters of scripts without spaces, readings, and what has no width."""
    documents, _ = read(
        tmp_path, {"a.html": f"<meta charset=utf-8><body>{source}<img src=large.png>"}, {"large.png": LARGE}
    )
    assert documents == [[shown, "[large.png]"]]


@pytest.mark.parametrize("title", ["Donau&shy;dampf", "\u6f22\n\u5b57", "\u200b", "&shy;"])
def test_a_title_before_the_main_part_of_any_characters(tmp_path: Path, title: str) -> None:
    page = f"<meta charset=utf-8><body><h1>{title}</h1><main>Text.<img src=large.png></main>"
    documents, _ = read(tmp_path, {"a.html": page}, {"large.png": LARGE})
    shown = title.replace("&shy;", "").replace("\n", "").replace("\u200b", "")
    assert documents == [[f"{shown}\nText.".strip(), "[large.png]"]]


def test_image_sources(tmp_path: Path) -> None:
    inside = "data:image/png;base64," + base64.b64encode(OTHER).decode()
    sources = [
        "../img/a%20b.png?v=1#x",
        "/root.png",
        inside,
        "http://elsewhere/x.png",
        "../../out.png",
        "gone.png",
        "v.svg",
    ]
    page = "text" + "".join(f'<p><img src="{s}"></p>' for s in sources) + '<img src="data:," data-src="/lazy.png">'
    (tmp_path / "out.png").write_bytes(LARGE)
    files = {"img/a b.png": LARGE, "root.png": picture(5, 70, 70), "lazy.png": picture(6, 70, 70)}
    documents, drops = read(tmp_path / "site", {"sub/a.html": page}, files)
    assert documents == [["text", "[../img/a%20b.png?v=1]", "[/root.png]", f"[{inside[:20]}]", "[/lazy.png]"]]
    assert drops.bad_counts == {"image: on another host": 1, "image: outside the folder": 1, "image: file missing": 1}
    assert drops.left_out_counts == {"image: vector graphics": 1}


def test_backslashes_in_sources_are_slashes(tmp_path: Path) -> None:
    r"""Up to the query, as in browsers; one that is encoded is a character of the name."""
    sources = [r"img\a.png", r"\img\b.png?x=\y", r"\\host\c.png", r"img%5Ca.png"]
    page = "text" + "".join(f'<p><img src="{source}"></p>' for source in sources)
    documents, drops = read(tmp_path, {"sub/a.html": page}, {"sub/img/a.png": LARGE, "img/b.png": OTHER})
    assert documents == [["text", "[img\\a.png]", "[\\img\\b.png?x=\\y]"]]
    assert drops.bad_counts == {"image: on another host": 1, "image: file missing": 1}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_files_in_another_normal_form(tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    asked = [unicodedata.normalize(other, "caf\u00e9/\u00fc.png") for other in ("NFC", "NFD")]
    page = f"text<img src='{asked[0]}'>" + f"more<img src='{quote(asked[1])}?x'>"
    files = {unicodedata.normalize(form, "caf\u00e9/\u00fc.png"): LARGE}
    documents, drops = read(tmp_path, {"a.html": f"<meta charset=utf-8>{page}"}, files)
    assert documents == [["text", f"[{asked[0]}]", "more"]]  # twice on the page
    assert drops.bad_counts == {}


def test_names_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    """What such a name is, percent-encoded, on a page; the corpus has the source as the page writes it."""
    try:
        (tmp_path / os.fsdecode(b"bild\xfc.png")).write_bytes(LARGE)
    except OSError as error:
        pytest.skip(f"this file system has no such names: {error}")
    moved = "<meta http-equiv=refresh content='300; url=seite%FC.html'>"
    pages = {"a.html": "text<img src=bild%FC.png>", os.fsdecode(b"seite\xfc.html"): f"{moved}itself"}
    documents, drops = read(tmp_path, pages, {}, text_pages="yes")
    assert documents == [["text", "[bild%FC.png]"], ["itself"]]
    assert (drops.bad_counts, drops.left_out_counts) == ({}, {})


@pytest.mark.parametrize(
    ("base", "source", "shown"),
    [
        ("img/", "a.png", "img/a.png"),
        ("img/page.html", "a.png?v=1", "img/a.png?v=1"),
        ("../img/", "a.png", "../img/a.png"),
        ("/", "img/a.png", "/img/a.png"),
        ("/docs/", "a.png", "a.png"),
        ("img/", "/img/a.png", "/img/a.png"),
        ("img", "a.png", "a.png"),
        ("", "a.png", "a.png"),
        ("//[", "a.png", "a.png"),
        ("img/", "http://[host]/x", "http://[host]/x"),
        ("img/", "data:,", "data:,"),
        ("img\\", "a.png", "img/a.png"),
        ("img/", "\\img\\a.png", "\\img\\a.png"),
        ("https://x.org/b/c.html", "a.png", "a.png"),
        ("//x.org/b/", "a.png", "a.png"),
    ],
)
def test_a_base_for_the_sources(base: str, source: str, shown: str) -> None:
    page = parse_page(f"<head><base target=x><base href='{base}'></head><img src='{source}'>", "sub/a.html")
    assert [value for kind, value in page.events if kind == "image"] == [shown]


def test_images_by_a_base(tmp_path: Path) -> None:
    page = "<base href=../img/>text<img src=large.png>"
    files = {"img/large.png": LARGE, "img/b.png": OTHER}
    pages = {"sub/a.html": page, "sub/b.html": "<base href=https://x.org/img/>other<img src=../img/b.png>"}
    documents, drops = read(tmp_path, pages, files)
    assert documents == [["text", "[../img/large.png]"], ["other", "[../img/b.png]"]]
    assert not drops.bad_counts


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        ("<img src=a.png srcset='b.png 2x'>", "a.png"),
        ("<img srcset='a,b.png 1x, b.png 2x'>", "a,b.png"),
        ("<img srcset=' , a.png, b.png'>", "a.png"),
        ("<img data-srcset='a.png 1x' srcset='data:, 1x'>", "a.png"),
        ("<img src='data:,' data-srcset='a.png 1x'>", "a.png"),
        ("<img src='data:,' srcset='a.png 1x'>", "data:,"),
        ("<img src='data:,' data-src=a.png data-srcset='b.png 1x'>", "a.png"),
        ("<picture><source srcset='a.png 2x, b.png'><source srcset=c.png><img></picture>", "a.png"),
        ("<picture><source type=x /><source data-srcset=a.png><img alt=x></picture>", "a.png"),
        ("<picture><source srcset=b.png><img srcset=a.png></picture>", "a.png"),
        ("<picture><source srcset=b.png></picture><source srcset=c.png><img>", None),
        ("<img srcset=' , '>", None),
    ],
)
def test_several_sources(image: str, shown: str | None) -> None:
    found = [value for kind, value in parse_page(f"<p>{image}", "a.html").events if kind == "image"]
    assert found == ([shown] if shown else [])


def test_images_in_an_archive_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.html").write_text("<p>text<img src=a.png>")
    archive = tmp_path / "images.tar"
    archive.write_bytes(b"")
    with pytest.raises(ValueError, match=r"--images .*images\.tar is a file; unpack it"):
        HtmlImporter(tmp_path / "site", archive)


NO_URLS = ("http://[host]/x", "http://[::1", "//[", "//]", "http://\u2100/x.svg")
"""none of which `urlsplit` splits; a port that is no number it leaves as it is"""


def test_sources_that_are_no_urls(tmp_path: Path) -> None:
    page = "text<img src=large.png>" + "".join(f"<img src='{source}'>" for source in (*NO_URLS, "http://a:x/y"))
    documents, drops = read(tmp_path, {"a.html": page}, {"large.png": LARGE})
    assert documents == [["text", "[large.png]"]]
    assert drops.bad_counts == {"image: source is no URL": len(NO_URLS), "image: on another host": 1}
    assert drops.names["image: source is no URL"] == [f"a.html: {source}" for source in NO_URLS]


@pytest.mark.parametrize("url", [*NO_URLS, "//a:x/y"])
def test_links_that_are_no_urls(tmp_path: Path, url: str) -> None:
    """They are not counted among the links of a list, and lead to no other page."""
    head = f"<meta http-equiv=refresh content='0; url={url}'>" if url in NO_URLS else ""
    lists = [[url] * 8, [*(f"p{k}.html" for k in range(8)), url]]
    items = ["<ul>" + "".join(f"<li><a href='{link}'>Name</a>" for link in links) + "</ul>" for links in lists]
    documents, drops = read(
        tmp_path, {"a.html": f"{head}text<img src=large.png>{''.join(items)}"}, {"large.png": LARGE}
    )
    assert documents == [["text", "[large.png]", "\n".join(["Name"] * 8)]]
    assert drops.left_out_counts == {"text: navigation": 1}


def test_sizes_repeats_and_decoration(tmp_path: Path) -> None:
    pages = {
        f"{k:02d}.html": f"<p>page {k}</p><img src=logo.png><img src=wide.png><img src=own{k}.png><img src=own{k}.png>"
        + ("<img src=often.png>" if k < 3 else "")
        for k in range(80)
    }
    files = {"logo.png": LARGE, "wide.png": WIDE, "often.png": OTHER}
    files |= {f"own{k}.png": picture(100 + k, 64, 64 if k else 512) for k in range(80)}  # the least that stay
    documents, drops = read(tmp_path, pages, files, max_repeats=2)
    assert len(documents) == 80
    assert documents[2] == ["page 2", "[own2.png]"]
    assert [d[1:] for d in documents[:2]] == [["[own0.png]", "[often.png]"], ["[own1.png]", "[often.png]"]]
    assert drops.left_out_counts == {
        "image: stands on over 5% of the pages": 80,
        "image: aspect above 8": 80,
        "image: repeated (on a page, or on more than 2 pages)": 81,
    }


def test_of_no_repeats_no_image_stays(tmp_path: Path) -> None:
    documents, drops = read(tmp_path, {"a.html": "<p>a<img src=large.png>"}, {"large.png": LARGE}, max_repeats=0)
    assert documents == []
    assert drops.left_out_counts == {
        "image: repeated (on a page, or on more than 0 pages)": 1,
        "document: page whose images were all left out": 1,
    }


@pytest.mark.parametrize(
    ("head", "redirects"),
    [
        ("<meta http-equiv=refresh content='0; url=b.html'>", True),
        ("<META HTTP-EQUIV=Refresh CONTENT=\"0;URL='b.html'\">", True),
        ("<meta content=0;b.html http-equiv=refresh>", True),
        ("<meta http-equiv=refresh content='0; url=https://elsewhere/s/a.html'>", True),
        ("<meta http-equiv=refresh content='0; url=/a.html'>", True),
        ("<noscript><meta http-equiv=refresh content='0; url=b.html'></noscript>", False),
        ("<meta http-equiv=refresh content=300>", False),
        ("<meta http-equiv=refresh content='300; url=a.html?again#top'>", False),
        ("<meta http-equiv=refresh content='300; url=../s/a.html'>", False),
        ("<meta http-equiv=refresh content='300; url=?again'>", False),
        ("<meta name=refresh content='0; url=b.html'>", False),
    ],
)
def test_what_is_a_redirect(tmp_path: Path, head: str, redirects: bool) -> None:
    page = f"<html><head>{head}</head><body><p>text <code>&lt;meta http-equiv=refresh&gt;</code><img src=large.png>"
    documents, drops = read(tmp_path, {"s/a.html": page}, {"s/large.png": LARGE})
    assert (documents == []) == redirects
    assert drops.left_out_counts == ({"document: redirect": 1} if redirects else {})


def test_pages_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are bad, each of them; none is an empty page, which repeats none of them."""
    for name in "abcd":
        (tmp_path / f"{name}.html").write_text("" if name == "c" else f"page {name}<img src=large.png>")
    (tmp_path / "large.png").write_bytes(LARGE)
    whole = HtmlImporter.page_html

    def page_html(importer: HtmlImporter, name: str) -> bytes:
        if name in ("a.html", "b.html"):
            raise PermissionError(name)
        return whole(importer, name)

    monkeypatch.setattr(HtmlImporter, "page_html", page_html)
    with pytest.raises(Unusable, match=r"2 of 3 documents are bad, 67%: mostly document: page that cannot be read, 2"):
        preprocess("html", tmp_path, tmp_path.parent / "out", tokenizer=TOKENIZER)
    documents, drops = read(tmp_path, {})
    assert documents == [["page d", "[large.png]"]]
    assert drops.bad_counts == {"document: page that cannot be read": 2}
    assert drops.names["document: page that cannot be read"] == ["a.html", "b.html"]
    assert drops.left_out_counts == {"document: empty page": 1}


def test_redirects_duplicates_and_pages_without_images(tmp_path: Path) -> None:
    page = "<p>same</p><img src=large.png>"
    pages = {"a.html": page, "b.html": page, "c.html": "<p>only text</p>",
             "d.html": "<meta http-equiv='refresh' content='0; url=a.html'>moved<img src=large.png>"}  # fmt: skip
    documents, drops = read(tmp_path, pages, {"large.png": LARGE})
    assert documents == [["same", "[large.png]"]]
    assert drops.left_out_counts == {
        "document: repeats another page": 1, "document: page without images": 1, "document: redirect": 1,
    }  # fmt: skip
    documents, _ = read(tmp_path, {}, text_pages=True)
    assert documents == [["same", "[large.png]"], ["only text"]]


def test_long_pages_are_cut_at_headings(tmp_path: Path) -> None:
    sections = "".join(f"<h2>Heading {k}</h2><p>{'word ' * 400}</p><p>end {k}</p>" for k in range(5))
    pages = {"a.html": f"<p>intro<img src=large.png></p>{sections}"}
    documents, _ = read(tmp_path, pages, {"large.png": LARGE})
    assert documents == read(tmp_path, pages, {}, max_words=809)[0] != read(tmp_path, pages, {}, max_words=808)[0]
    assert [len(" ".join(t for t in d if t[0] != "[").split()) for d in documents] == [809, 808, 404]
    assert documents[0][:2] == ["intro", "[large.png]"]
    assert [d[0].split("\n")[0] for d in documents[1:]] == ["Heading 2", "Heading 4"]


def test_long_pages_are_cut_at_headings_in_any_script(tmp_path: Path) -> None:
    """In Chinese white space separates no words, so such a page was one document, however long it was."""
    section = "\u6f22\u5b57\uff0c" * 200 + "\u3002"
    page = "<meta charset=utf-8>" + "".join(
        f"<h2>\u7ae0{k}</h2><p>{section}</p><img src=large{k}.png>" for k in range(5)
    )
    images = {f"large{k}.png": picture(k, 80, 70) for k in range(5)}
    documents, _ = read(tmp_path, {"a.html": page}, images)
    assert [document[0].split("\n")[0] for document in documents] == ["\u7ae00", "\u7ae02", "\u7ae04"]


def test_encodings_and_broken_markup(tmp_path: Path) -> None:
    files = {
        "a.html": '<meta charset="iso-8859-1"><p>caf\xe9<img src=large.png>'.encode("latin-1"),
        "b.html": "<p>na\xefve<b><i>x</b></i></div></p></p><img src=large.png><table><td>z".encode(),
        "c.html": b"", "d.html": b"\xff\xfe\0\0\x01<<<>>>", "e.html": b"<" * 5000, "f.html": b"<div>" * 3000 + b"deep",
        "large.png": LARGE,
    }  # fmt: skip
    documents, _ = read(tmp_path, {}, files)
    assert documents[:2] == [["café", "[large.png]"], ["naïvex", "[large.png]", "z"]]


# --- importers of other packages ---------------------------------------------------------------------------------


class HaikuImporter(Importer):
    """Three lines a document."""

    def __init__(self, input: Path, images: Path | None = None) -> None:
        self.input = input

    def signature(self) -> str:
        return importers.files_signature([self.input], self.input.parent)

    def units(self) -> list[Unit]:
        return [Unit(self.input.name, self.input.stat().st_size)]

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        lines = self.input.read_text().splitlines()
        for k in range(0, len(lines), 3):
            yield Document(tuple(map(Text, lines[k : k + 3])), name=f"haiku {k // 3}")


def test_another_packages_importer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("haiku", f"{__name__}:HaikuImporter", importers.ENTRY_POINTS)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == importers.ENTRY_POINTS else [])
    assert "haiku" in importers.formats()
    (tmp_path / "h.txt").write_text("an old silent pond\na frog jumps into the pond\nsplash! silence again\n")
    importer = create("haiku", tmp_path / "h.txt", None, {})
    (document,) = importer.documents(importer.units()[0], Drops())
    assert len(document.texts) == 3
