"""Whole manuals from Debian's packages, by other tools than the GIMP manual's: all of the content, no furniture.

MEGATRON_LCL_PACKAGES names a folder that holds the .deb files; else the smaller ones are downloaded with apt-get.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_lcl.data.corpus.document import Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import create

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
# what no document may hold
FURNITURE = {
    "blender-doc": [
        "Hide table of contents sidebar", "Skip to content", "Back to top", "On this page", "Made with",
    ],
    "grass-doc": ["GRASS Development Team, GRASS GIS 8", "Main index | ", "Accessed: "],
    "hugin-data": ["From PanoTools.org Wiki", 'Retrieved from "http'],
}  # fmt: skip


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is content of each manual."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("html_extraction")


@pytest.mark.parametrize("package", FURNITURE)
def test_content_stays_and_furniture_goes(package: str, program: Any, tmp_path: Path) -> None:
    given = os.environ.get("MEGATRON_LCL_PACKAGES")
    try:
        root = program.unpack(package, tmp_path, Path(given) if given else None)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    importer, drops = create("html", root, None, {}), Drops()
    pages: dict[str, str] = {}
    for document in (d for unit in importer.units() for d in importer.documents(unit, drops)):
        texts = "\n".join(item.text for item in document.items if isinstance(item, Text))
        for words in FURNITURE[package]:
            assert words not in texts, (document.name, words)
        pages[document.metadata["group"]] = pages.get(document.metadata["group"], "") + "\n" + texts
    assert len(pages) >= 40
    manual, num_blocks, lost = program.MANUALS[package], 0, []
    for name, text in pages.items():
        blocks, _, _ = program.content_of((root / name).read_bytes(), manual.content, manual.none)
        held = program.squeezed(text)
        num_blocks += len(blocks)
        lost += [(name, words[:80]) for words in blocks if words not in held]
    assert num_blocks > 1000
    # a list of eight links under "See also" on a page that marks no main part
    assert [entry for entry in lost if (package, entry[0]) != ("grass-doc", "raster3dintro.html")] == []
