"""Whole manuals from Debian's packages, by other tools than the GIMP manual's: all of the content, no furniture.

MEGATRON_LCL_PACKAGES names a folder that holds the .deb files; else the smaller ones are downloaded with apt-get.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from lxml import html

from megatron_lcl.data.corpus.document import Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import create

pytestmark = pytest.mark.slow

LEAVES = ("p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "td", "th", "figcaption", "pre")
# package, what of it, its pages, their content, what of that is none, what no document may hold
PACKAGES = {
    "blender-doc": (
        ["*/html/modeling/modifiers/*", "*/html/_images/modeling_modifiers*"], "usr/share/doc/blender-doc/html",
        '//article[@role="main"]', '//*[contains(@class,"headerlink") or contains(@class,"toctree-wrapper")]',
        ["Hide table of contents sidebar", "Skip to content", "Back to top", "On this page", "Made with"],
    ),
    "grass-doc": (
        ["*/html/*"], "usr/share/doc/grass-doc/html",
        '//div[@id="container"]', '//hr[@class="header"][last()]/following-sibling::*[not(.//h2)][position()>last()-2]'
        '|//div[@class="toc"]|//p[starts-with(normalize-space(.),"Accessed:")]',
        ["GRASS Development Team, GRASS GIS 8", "Main index | ", "Accessed: "],
    ),
    "hugin-data": (
        ["*/help_en_EN/*"], "usr/share/hugin/xrc/data/help_en_EN",
        '//div[@id="mw-content-text"]', '//*[@id="toc"]|//math',
        ["From PanoTools.org Wiki", "Retrieved from \"http"],
    ),
}  # fmt: skip


def unpack(package: str, patterns: list[str], folder: Path) -> None:
    given = os.environ.get("MEGATRON_LCL_PACKAGES")
    found = sorted(Path(given).glob(f"{package}_*.deb")) if given else []
    if not found:
        if package == "blender-doc":
            pytest.skip("blender-doc, 233 MB, is not in the folder that MEGATRON_LCL_PACKAGES names")
        try:
            subprocess.run(
                ["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True, timeout=300
            )
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"{package} cannot be downloaded: {error}")
        found = sorted(folder.glob("*.deb"))
    tar = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(found[0])], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(folder), "--wildcards", *patterns], stdin=tar.stdout, check=True)
    assert tar.wait() == 0


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_content_stays_and_furniture_goes(package: str, tmp_path: Path) -> None:
    patterns, root, content, none, furniture = PACKAGES[package]
    unpack(package, patterns, tmp_path)
    importer, drops = create("html", tmp_path / root, None, {}), Drops()
    pages: dict[str, str] = {}
    for document in (d for unit in importer.units() for d in importer.documents(unit, drops)):
        texts = "\n".join(item.text for item in document.items if isinstance(item, Text))
        for words in furniture:
            assert words not in texts, (document.name, words)
        pages[document.metadata["group"]] = pages.get(document.metadata["group"], "") + "\n" + texts
    assert len(pages) >= 40
    num_blocks, lost = 0, []
    for name, text in pages.items():
        source = re.sub(rb"^<\?xml[^>]*>", b"", (tmp_path / root / name).read_bytes())
        tree, held = html.fromstring(source), squeezed(text)
        for node in tree.xpath("//script|//style|//svg|//noscript|//button|//video|//iframe|" + none):
            node.drop_tree()
        for node in (n for top in tree.xpath(content) for n in top.iter(*LEAVES)):
            words = squeezed(node.text_content())
            if words and not any(True for _ in node.iterdescendants(*LEAVES, "ul", "ol", "dl", "table", "div")):
                num_blocks += 1
                if words not in held:
                    lost.append((name, node.tag, words[:80]))
    assert num_blocks > 1000
    # a list of eight links under "See also" on a page that marks no main part
    assert [entry for entry in lost if (package, entry[0]) != ("grass-doc", "raster3dintro.html")] == []
