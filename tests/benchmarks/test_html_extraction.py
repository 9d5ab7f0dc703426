"""What benchmarks/html_extraction.py counts: blocks, what is foreign, images beside the same text."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = 12


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("html_extraction")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pages of four blocks with a picture of their own and a sign; an index, and a page without a picture."""
    draw = np.random.default_rng(0)
    Image.new("RGB", (16, 16)).save(tmp_path / "sign.png")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    frame = "<html><body><div class='navbar'>All pages of this site</div><main>{}</main></body></html>"
    for k in range(PAGES):
        Image.fromarray(draw.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
        (tmp_path / f"page{k:02}.html").write_text(frame.format(
            f"<h1>Page number {k}</h1><img src='sign.png'><p>Some <b>words</b> that stand before picture {k}.</p>"
            f"<img src='{k}.png'><p>Others that stand after it, on {k}.</p><ul><li>one <a href='#'>link</a></li></ul>"
            "<img src='drawing.svg'><img src='missing.png'><button>Copy</button>"
        ))  # fmt: skip
    (tmp_path / "index.html").write_text(frame.format("<a href='page00.html'>Page number 0</a><img src='0.png'>"))
    (tmp_path / "plain.html").write_text(frame.format("<p>Words without a picture.</p>"))
    return tmp_path


def test_what_is_found_what_is_foreign_and_images_beside_the_same_text(
    program: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def everything(page: bytes, flow: Any) -> None:
        """With the navigation, and all images at the end."""
        tree = program.html.fromstring(page)
        for line in tree.itertext():
            flow.add_text(line)
        for image in tree.iter("img"):
            flow.add_image(image.get("src"))

    def half(page: bytes, flow: Any) -> None:
        """Nothing but the first words and their pictures, twice."""
        tree = program.html.fromstring(page).find(".//main")
        for node in tree.xpath("h1|p[1]|img"):
            flow.add_tree(node)
        flow.images += flow.images

    every = {"ours": program.ours}
    for name, extract in (("everything", everything), ("half", half)):
        every[name] = lambda root, names, extract=extract: program.each(extract, root, names)
    rows = program.measured(folder, "//main", "", 200, every)
    said = capsys.readouterr().out
    assert said.startswith(f"{PAGES} pages, {4 * PAGES} blocks, {PAGES} images\n")
    own, whole, part = rows["ours"], rows["everything"], rows["half"]
    assert own[:3] == (1.0, 0.0, PAGES)
    assert whole.blocks == 1.0
    assert 0.1 < whole.foreign < 0.4
    assert whole.images == 0
    assert part[:3] == (0.5, 0.0, PAGES)
    assert all(program.claims("these", {"ours": own, "half": part}).values())
    assert list(program.claims("these", {"ours": whole, "half": part}).values()) == [True, False, False]


def test_pages_are_spread_evenly_and_peers_that_are_not_there_are_named(
    program: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for peer in ("trafilatura", "resiliparse.extract.html2text"):
        monkeypatch.setitem(sys.modules, peer, None)
    assert list(program.pages_with_images(folder, "//main", "", 3)) == ["page00.html", "page04.html", "page08.html"]
    monkeypatch.setattr(sys, "argv", ["", str(folder), "--without", "//h1", "--pages", "3"])
    program.main()
    said = capsys.readouterr().out
    assert "trafilatura is left out" in said
    assert "resiliparse is left out" in said
    assert "3 pages, 9 blocks, 3 images" in said
    assert [line.split()[0] for line in said.splitlines()[-1:]] == ["ours"]
