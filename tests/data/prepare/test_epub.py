"""Protects EPUB books: the pages of the spine in its order, with the images inside the book."""

from __future__ import annotations

import unicodedata
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest
from data.helpers import TOKENIZER, documents_of, plain, spaced
from data.writers import picture

from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

IMAGES = [picture(k, 90, 80) for k in range(4)]
CONTAINER = """<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles>
</container>"""
ENCRYPTION = """<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"
 xmlns:enc="http://www.w3.org/2001/04/xmlenc#"><enc:EncryptedData><enc:CipherData>
 <enc:CipherReference URI="OEBPS/text/two.xhtml"/></enc:CipherData></enc:EncryptedData></encryption>"""


def xhtml(body: str) -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"><head><title/>'
        f'</head><body><a id="top"/>{body}</body></html>'
    )


def write_book(file: Path, number: int = 0, **others: str) -> None:
    """Two pages, listed in an order of which neither names nor the manifest tell; a cover that is not linear."""
    file.parent.mkdir(exist_ok=True)
    opf = f"""<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="i">
    <metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>T</dc:title>
      <dc:identifier id="i">urn:isbn:{number}</dc:identifier></metadata>
    <manifest>
      <item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
      <item id="cover" href="cover.xhtml" media-type="application/xhtml+xml"/>
      <item id="a" href="text/two.xhtml" media-type="application/xhtml+xml"/>
      <item id="b" href="text/one%20.xhtml" media-type="application/xhtml+xml"/>
      <item id="p" href="images/0.png" media-type="image/png"/>
    </manifest>
    <spine><itemref idref="cover" linear="no"/><itemref idref="nav"/><itemref idref="b"/><itemref idref="a"/>
      <itemref idref="p"/><itemref idref="gone"/></spine></package>"""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr("OEBPS/content.opf", opf)
        for name in ("nav", "cover"):
            book.writestr(f"OEBPS/{name}.xhtml", xhtml(f'<p>{name}</p><img src="images/3.png"/>'))
        first = f'<h1>One {number}</h1><p>Before&#160;it.</p><img alt="" src="../images/{number}.png"/><p>After.</p>'
        second = '<p>Two</p><img src="../images/%32.png"/><img src="../../../x.png"/><img src="gone.png"/><p>End</p>'
        book.writestr("OEBPS/text/one .xhtml", xhtml(first))
        book.writestr("OEBPS/text/two.xhtml", xhtml(second.replace("Two", f'Two {number}<img src="//["/>')))
        for k, data in enumerate(IMAGES):
            book.writestr(f"OEBPS/images/{k}.png", data)
        for name, text in others.items():
            book.writestr(name.replace("__", "/").replace("_xml", ".xml").replace("_INF", "-INF"), text)


def shown(number: int) -> list[list[object]]:
    return [
        [f"One {number}\nBefore it.", (IMAGES[number], None, None), "After."],
        [f"Two {number}", (IMAGES[2], None, None), "End"],
    ]


def test_books(tmp_path: Path) -> None:
    for number in (0, 1):
        write_book(tmp_path / f"in/shelf {number}.epub", number)
    found, drops = documents_of(create("epub", tmp_path / "in", None, {}))
    assert plain(found) == [*shown(0), *shown(1)]
    assert [d.metadata["group"] for d in found] == ["shelf 0.epub"] * 2 + ["shelf 1.epub"] * 2
    assert found[2].source == "shelf 1.epub/OEBPS/text/one .xhtml urn:isbn:1"
    assert drops.bad_counts == {
        "image: outside the folder": 2, "image: file missing": 2, "image: source is no URL": 2,
    }  # fmt: skip
    summary = preprocess(
        "epub", tmp_path / "in/shelf 0.epub", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1
    )
    assert plain(list(open_corpus(summary.path))) == plain(spaced(found[:2], "\n"))


@pytest.mark.parametrize("name", ["İnce.epub", "shelf.epub/B.EPUB", "a.epub/b.epub/c.epub"])
def test_names_that_a_book_may_have(tmp_path: Path, name: str) -> None:
    """A letter that is two in lower case; a folder that is named like a book."""
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    write_book(tmp_path / "in" / name)
    write_book(tmp_path / "in/z.epub", 1)
    found, _ = documents_of(create("epub", tmp_path / "in", None, {}))
    assert sorted(map(str, plain(found))) == sorted(map(str, [*shown(0), *shown(1)]))
    assert {d.metadata["group"] for d in found} == {name, "z.epub"}


class WithoutFlag(zipfile.ZipInfo):
    """A member whose name is UTF-8, or in another charset, and not said to be UTF-8."""

    charset = "utf-8"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(self.charset), self.flag_bits & ~0x800  # which later Pythons set before


class Cp437(WithoutFlag):
    charset = "cp437"


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (zipfile.ZipInfo, "\u7ae0\u00e9"),
        (WithoutFlag, "\u7ae0\u00e9"),
        (WithoutFlag, "cafe\u0301"),  # as macOS has it
        (Cp437, "caf\u00e9"),
    ],
)
def test_names_of_members(tmp_path: Path, member: type[zipfile.ZipInfo], name: str) -> None:
    (tmp_path / "in").mkdir()
    listed = unicodedata.normalize("NFC", name)
    opf = f"""<package><metadata/><manifest><item id="a" href="{listed}.xhtml" media-type="application/xhtml+xml"/>
    </manifest><spine><itemref idref="a"/></spine></package>"""
    with zipfile.ZipFile(tmp_path / "in/a.epub", "w") as book:
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr("OEBPS/content.opf", opf)
        book.writestr(member(f"OEBPS/{name}.xhtml"), xhtml(f'<p>Text.</p><img src="{quote(listed)}.png"/>'))
        book.writestr(member(f"OEBPS/{name}.png"), IMAGES[0])
    found, drops = documents_of(create("epub", tmp_path / "in", None, {}))
    assert plain(found) == [["Text.", (IMAGES[0], None, None)]]
    assert drops.bad_counts == {}


def test_what_is_bad(tmp_path: Path) -> None:
    write_book(tmp_path / "in/a.epub", 0, META_INF__encryption_xml=ENCRYPTION)
    (tmp_path / "in/b.epub").write_bytes((tmp_path / "in/a.epub").read_bytes()[:2000])
    with zipfile.ZipFile(tmp_path / "in/c.epub", "w") as book:
        book.writestr("other", "")
    with zipfile.ZipFile(tmp_path / "in/d.epub", "w") as book:
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr("OEBPS/content.opf", "<package><manifest/><spine/></package>")
    raw = bytearray((tmp_path / "in/a.epub").read_bytes())
    at = raw.index(b"OEBPS/images/0.png") + 40
    raw[at : at + 50] = b"\0" * 50
    (tmp_path / "in/a.epub").write_bytes(raw)
    found, drops = documents_of(create("epub", tmp_path / "in", None, {"text_pages": True}))
    assert plain(found) == [["One 0\nBefore it.\nAfter."]]
    assert drops.bad_counts == {
        "document: damaged book, or no EPUB": 3, "document: encrypted page": 1, "image: file missing": 1,
    }  # fmt: skip
    assert drops.names["document: encrypted page"] == ["a.epub/OEBPS/text/two.xhtml"]
    with pytest.raises(UserError, match="has its images in the books"):
        create("epub", tmp_path / "in", tmp_path, {})


def test_pages_that_are_lost(tmp_path: Path) -> None:
    """Bad, each of them: one that the archive does not hold, and two, alike in that, whose bytes are damaged."""
    write_book(tmp_path / "in/b.epub", 1)
    with zipfile.ZipFile(tmp_path / "in/b.epub") as whole, zipfile.ZipFile(tmp_path / "in/a.epub", "w") as book:
        for name in whole.namelist():
            if name != "OEBPS/text/two.xhtml":
                book.writestr(name, whole.read(name))
    raw = bytearray((tmp_path / "in/b.epub").read_bytes())
    for member in (b"OEBPS/text/one .xhtml", b"OEBPS/text/two.xhtml"):
        at = raw.index(member) + len(member)
        raw[at : at + 20] = b"\xff" * 20
    (tmp_path / "in/b.epub").write_bytes(raw)
    found, drops = documents_of(create("epub", tmp_path / "in", None, {}))
    assert plain(found) == [shown(1)[0]]
    missing, unread = "document: page that the book lists and does not hold", "document: page that cannot be read"
    assert drops.bad_counts == {missing: 1, unread: 2}
    assert drops.names[missing] == ["a.epub/OEBPS/text/two.xhtml"]
    assert drops.names[unread] == ["b.epub/OEBPS/text/one .xhtml", "b.epub/OEBPS/text/two.xhtml"]
    assert drops.left_out_counts == {}
