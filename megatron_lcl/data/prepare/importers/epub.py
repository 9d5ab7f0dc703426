"""EPUB books: the XHTML pages of the spine, in reading order, with the images that the book holds.

A page is read as an HTML page is, with the same rules for what repeats over all books; the documents of a book are held
out together. Source: EPUB 3.3 (W3C), which EPUB 2 agrees with in what is read here.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote

import lxml.etree

from megatron_lcl.data.prepare.importers.files import MAX_FILE, Names, normal_forms
from megatron_lcl.data.prepare.importers.html import HtmlImporter
from megatron_lcl.data.prepare.importers.html_page import Page
from megatron_lcl.data.prepare.importers.zips import DAMAGE, open_member
from megatron_lcl.data.storage.paths import ObjectPath
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import raise_if_passing

_PAGES = ("application/xhtml+xml", "text/html")
_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"


class EpubImporter(HtmlImporter):
    """A folder of books, or one; in the order of their names."""

    rules = 4
    reads = "folder of EPUB books (.epub) without copy protection; pages and images are in the books"
    suffixes = (".epub",)
    _opened: tuple[str, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def list_pages(self) -> Sequence[str]:
        """`BOOK.epub/MEMBER`; a book that cannot be read is a page of its own name."""
        if self.image_root != self.root.resolve():
            raise UserError("format epub has its images in the books; leave out --images")
        self._faults: dict[str, str] = {}
        self._ids: dict[str, str] = {}
        """of the books that can be read, by their names"""
        pages = Names()
        for file in self.found.paths():
            book = self.found.name(file)
            try:
                if not book.lower().endswith(self.suffixes):
                    raise ValueError
                members, self._ids[book], faults = _spine(self._archive(book))
                if not members:
                    raise ValueError
            except (*DAMAGE, KeyError, lxml.etree.LxmlError, StopIteration, AttributeError, TypeError) as error:
                raise_if_passing(error, file)
                self._faults[book] = "damaged book, or no EPUB"
                pages.append(book)
                continue
            for member in members:
                page = f"{book}/{member}"
                pages.append(page)
                if member in faults:
                    self._faults[page] = faults[member]
        return pages

    def page_size(self, name: str) -> int:
        return 0 if name in self._faults else self._info(name).file_size

    def page_html(self, name: str) -> bytes:
        return self._member(name)

    def parse(self, name: str) -> Page:
        return Page(fault=self._faults[name]) if name in self._faults else super().parse(name)

    def about(self, name: str) -> dict[str, str]:
        book, _ = self._split(name)
        return {"group": book, "id": self._ids[book]}

    def locate(self, page: str, url: SplitResult) -> Path | None:
        book, member = self._split(page)
        if url.scheme or url.netloc:
            return None
        found = posixpath.normpath(posixpath.join(posixpath.dirname(member), unquote(url.path)))
        return None if found.startswith(("/", "..")) else Path(f"{book}/{found}")

    def image_bytes(self, file: Path) -> bytes:
        return self._member(file.as_posix())

    def _member(self, name: str) -> bytes:
        info = self._info(name)
        book, _ = self._split(name)
        try:
            return _read(self._archive(book), info)
        except DAMAGE as error:
            raise_if_passing(error, self.found.path(book))
            raise ValueError from error

    def _info(self, name: str) -> zipfile.ZipInfo:
        book, member = self._split(name)
        try:
            archive = self._archive(book)
            return archive.getinfo(_found(member, archive.NameToInfo) or member)
        except (*DAMAGE, KeyError) as error:
            raise_if_passing(error, self.found.path(book))
            raise ValueError from error

    def _split(self, name: str) -> tuple[str, str]:
        """(book, member). A book is a file, so none lies below another."""
        book = next(book for end in re.finditer("/", name) if (book := name[: end.start()]) in self._ids)
        return book, name[len(book) + 1 :]

    def _archive(self, book: str) -> zipfile.ZipFile:
        """The book, opened; the last one stays so."""
        if self._opened is None or self._opened[0] != book:
            if self._opened is not None:
                self._opened[1].close()
                self._opened = None
            file = self.found.path(book)
            self._opened = book, _opened(file.open("rb") if isinstance(file, ObjectPath) else file)
        return self._opened[1]


def _opened(file: Any) -> zipfile.ZipFile:
    """Names of members are UTF-8 (OCF 3.3, section 4.2.3), be it said of them or not; else as other zip files have
    them."""
    try:
        return zipfile.ZipFile(file, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(file)


def _spine(book: zipfile.ZipFile) -> tuple[list[str], str, dict[str, str]]:
    """The pages in reading order, the book's identifier or title, and the members that are not there or encrypted.

    One of several exceptions where the book does not say it.
    """
    names = set(book.namelist())
    path = unquote(next(_xml(book, _CONTAINER).iter("{*}rootfile")).get("full-path"))
    package = _xml(book, path)
    items = {item.get("id"): item for item in package.iter("{*}item")}
    pages = []
    for reference in package.iter("{*}itemref"):
        item = items.get(reference.get("idref"))
        if item is None or reference.get("linear") == "no" or item.get("media-type") not in _PAGES:
            continue
        member = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(item.get("href"))))
        if "nav" not in (item.get("properties") or "").split():
            pages.append(member)
    said = [*package.iter("{*}identifier"), *package.iter("{*}title")]
    identifier = next((text for element in said if (text := (element.text or "").strip())), "")
    faults = {page: "page that the book lists and does not hold" for page in pages if not _found(page, names)}
    if _ENCRYPTION in names:
        for element in _xml(book, _ENCRYPTION).iter("{*}CipherReference"):
            faults[unquote(element.get("URI") or "")] = "encrypted page"
    # each once, as EPUB 3.3 has it: else a small book is read thousands of times
    return list(dict.fromkeys(pages)), identifier, faults


def _found(member: str, names: Container[str]) -> str | None:
    """The name of a member: as it is given, else in another normal form of Unicode."""
    return next((name for name in normal_forms(member) if name in names), None)


def _xml(book: zipfile.ZipFile, member: str) -> Any:
    parser = lxml.etree.XMLParser(resolve_entities=False, no_network=True, recover=True)
    return lxml.etree.fromstring(_read(book, book.getinfo(member)), parser)


def _read(book: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member's content, of which no more is unpacked than the header says. Raises one of DAMAGE."""
    if info.file_size > MAX_FILE:
        raise ValueError
    with open_member(book, info) as member:
        return member.read(info.file_size + 1)
