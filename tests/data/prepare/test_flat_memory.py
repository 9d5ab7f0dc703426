"""Protects: what the importers keep in memory does not grow with the number of documents, but for their files' names.

Measured at two sizes, in this process: what Python has allocated at most, and, of a mapped file, what the system counts
as this process's.
"""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from data.writers import picture

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import create, hf, html, html_repeats
from megatron_lcl.data.prepare.importers.files import Names

PNG = picture(0, 70, 66)
SIZES = (300, 600)  # from some 300 pages on, what is kept of the last ones is full
BYTES_A_PAGE = 200
"""measured: 50 to 77; where each page's path, images and hashes were kept, 690 to 1,070"""


def html_pages(folder: Path, number: int, suffix: str = ".html", page: str = "<p>{k} a word<img src={k}.png>") -> None:
    for k in range(number):
        below = folder / f"{k // 50}"
        below.mkdir(exist_ok=True)
        (below / f"{k}.png").write_bytes(PNG + b"%d" % k)
        (below / f"{k}{suffix}").write_text(page.format(k=k))


def markdown(folder: Path, number: int) -> None:
    html_pages(folder, number, ".md", "{k} a word\n\n![]({k}.png)\n")


def epub(folder: Path, number: int) -> None:
    """Books of 50 pages."""
    for first in range(0, number, 50):
        with zipfile.ZipFile(folder / f"{first}.epub", "w") as book:
            book.writestr("META-INF/container.xml", '<container><rootfile full-path="a.opf"/></container>')
            items = ""
            for k in range(first, first + 50):
                book.writestr(f"{k}.xhtml", f"<html><body><p>{k} a word</p><img src='{k}.png'/></body></html>")
                book.writestr(f"{k}.png", PNG + b"%d" % k)
                items += f'<item id="i{k}" href="{k}.xhtml" media-type="application/xhtml+xml"/><itemref idref="i{k}"/>'
            book.writestr("a.opf", f"<package>{items}</package>")


def peak(format: str, folder: Path, number: int) -> int:
    """Bytes allocated at most, above those before, while all documents are read."""
    tracemalloc.start()
    try:
        importer, found = create(format, folder, None, {}), 0
        for unit in importer.units():
            for document in importer.documents(unit, Drops()):
                found += len(document.images)
        assert found == number
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("format", "write"), [("html", html_pages), ("markdown", markdown), ("epub", epub)])
def test_pages(
    format: str, write: Callable[[Path, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_repeats, "_WINDOW", 64)
    monkeypatch.setattr(html, "_IMAGES_KNOWN", 64)
    peaks = []
    for number in SIZES:
        folder = tmp_path / f"{number}"
        folder.mkdir()
        write(folder, number)
        # twice: modules are loaded once, and Python's table of interned strings grows now and then
        peaks.append(min(peak(format, folder, number) for _ in range(2)))
    assert (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0]) < BYTES_A_PAGE


def test_names_are_those_put_in() -> None:
    given = ["a", "", "ä/\udcff.html", "b" * 1000]
    names = Names(given)
    assert (list(names), len(names), names[-1], names[1:3]) == (given, 4, given[-1], given[1:3])
    with pytest.raises(IndexError):
        names[4]


def mapped() -> int:
    """Bytes of files that the system counts as this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) << 10


@pytest.mark.parametrize("rows", [4, 64], ids=["many batches", "one batch"])
def test_an_arrow_file(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_MAPPED_BYTES", 8 << 20)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("text", pa.string())])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for first in range(0, 64, rows):
            row = [
                {"image": {"bytes": bytes(1 << 20), "path": "x"}, "text": f"{k}"} for k in range(first, first + rows)
            ]
            writer.write_table(pa.Table.from_pylist(row, schema))
    importer = create("hf", tmp_path, None, {})
    (unit,) = importer.units()
    before, most, texts = mapped(), 0, []
    for document in importer.documents(unit, Drops()):
        texts.append(document.texts[0].text)
        most = max(most, mapped() - before)
    assert texts == [f"{k}" for k in range(64)]
    assert most < 32 << 20  # of 64 MiB
