"""What of HTML pages is kept, beside trafilatura and resiliparse, and the time it takes: on manuals of Debian packages.

    python benchmarks/html_extraction.py [PACKAGE | FOLDER …] [--packages DIR] [--pages 200]
                                         [--content XPATH] [--without XPATH]

The yardstick is the element that a tool writes its content into, without what an XPath says is none of it (tables of
contents, marks of links). In each manual: of its pages with an image there, without indexes (half of the text or more
is in links), at most --pages, evenly spaced

    blocks    share of the text blocks of this element (paragraphs, items, cells, headings) that are in the output
    foreign   share of the output's characters in lines that are not in this element
    images    number of its images that stand in the output beside the same text, before or after
    ms        CPU time of a page; ours reads all pages of the manual and their images, twice

White space does not count. Images are files that are there, no vector graphics, of 64 pixels or more on each side. Ours
leaves out those that repeat; they count as missing. resiliparse gives no images.

PACKAGE: default all of them, but blender-doc (233 MB) only where --packages has it; packages that it lacks are
downloaded by apt-get. FOLDER: any folder of pages, whose content --content finds. The peers are optional: `pip install
trafilatura resiliparse lxml_html_clean`.

Claim, for packages: at least 99.5 % of the blocks, at most 0.1 % foreign, and no less of the blocks and no fewer images
than a peer; exit code 1 where it does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from arguments import existing_folder, positive
from claims import exit_unless, exit_with
from lxml import etree, html
from PIL import Image as Pillow

from megatron_lcl.data.corpus.document import Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import create

LEAVES = ("p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "td", "th", "figcaption", "pre")
CONTEXT = 20
"""characters beside an image that have to be the same"""
SIDE = 64
"""pixels of an image, at least; smaller ones are signs and buttons"""


class Manual(NamedTuple):
    """Where the pages of a package are, and what of them is content."""

    patterns: list[str]
    """files to unpack"""
    root: str
    content: str
    none: str
    """what inside of the content is none"""


MANUALS = {
    "gimp-help-en": Manual(
        ["*/help/en/*"], "usr/share/gimp/3.0/help/en",
        '//body/div[not(contains(@class,"navheader") or contains(@class,"navfooter"))]', '//div[@class="toc"]',
    ),
    "blender-doc": Manual(
        ["*/html/modeling/modifiers/*", "*/html/_images/modeling_modifiers*"], "usr/share/doc/blender-doc/html",
        '//article[@role="main"]', '//*[contains(@class,"headerlink") or contains(@class,"toctree-wrapper")]',
    ),
    "grass-doc": Manual(
        ["*/html/*"], "usr/share/doc/grass-doc/html",
        '//div[@id="container"]', '//hr[@class="header"][last()]/following-sibling::*[not(.//h2)][position()>last()-2]'
        '|//div[@class="toc"]|//p[starts-with(normalize-space(.),"Accessed:")]|//a[@href="index.html"]/img',
    ),
    "hugin-data": Manual(
        ["*/help_en_EN/*"], "usr/share/hugin/xrc/data/help_en_EN",
        '//h1[@id="firstHeading"]|//div[@id="mw-content-text"]', '//*[@id="toc"]|//math',
    ),
}  # fmt: skip
LARGE = "blender-doc"


# --- the yardstick -----------------------------------------------------------------------------------------------


def unpack(package: str, folder: Path, packages: Path | None) -> Path:
    """The folder of a manual's pages. FileNotFoundError where it cannot be downloaded, or is too large to."""
    found = sorted(packages.glob(f"{package}_*.deb")) if packages else []
    if not found:
        if package == LARGE:
            raise FileNotFoundError(f"{package}, 233 MB, is not in the folder of packages")
        try:
            command = ["apt-get", "download", "-q", package]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise FileNotFoundError(f"{package} cannot be downloaded: {error}") from None
        found = sorted(folder.glob("*.deb"))
    tar = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(found[0])], stdout=subprocess.PIPE)
    patterns = MANUALS[package].patterns
    subprocess.run(["tar", "-x", "-C", str(folder), "--wildcards", *patterns], stdin=tar.stdout, check=True)
    assert tar.wait() == 0
    return folder / MANUALS[package].root


class Flow:
    """Texts and images in reading order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """without white space"""
        self.images: list[tuple[str, int]] = []
        """sources, and how many characters are before them"""
        self._length = 0

    @functools.cached_property
    def text(self) -> str:
        return "".join(self.lines)

    def add_text(self, text: str | None) -> None:
        if words := squeezed(text or ""):
            self.lines.append(words)
            self._length += len(words)

    def add_image(self, source: str) -> None:
        self.images.append((source, self._length))

    def add_tree(self, top: Any) -> None:
        """Its texts, and its images as HTML and trafilatura's XML have them."""
        for event, node in etree.iterwalk(top, events=("start", "end", "comment", "pi")):
            if event == "start":
                if node.tag in ("img", "graphic"):
                    self.add_image(node.get("src", ""))
                self.add_text(node.text)
            elif node is not top:
                self.add_text(node.tail)


def squeezed(text: str) -> str:
    return "".join(text.split())


@functools.cache
def is_picture(file: Path) -> bool:
    try:
        with Pillow.open(file) as image:
            return min(image.size) >= SIDE
    except OSError:  # not there, or vector graphics
        return False


def content_of(page: bytes, content: str, none: str) -> tuple[list[str], Flow, int]:
    """The text blocks of a page's content without white space, all of it, and how many characters are in links."""
    tree = html.fromstring(re.sub(rb"^<\?xml[^>]*>", b"", page))
    for node in tree.xpath("//script|//style|//svg|//noscript|//button|//video|//iframe" + (none and f"|{none}")):
        node.drop_tree()
    blocks, flow, in_links = [], Flow(), 0
    for top in tree.xpath(content):
        flow.add_tree(top)
        in_links += sum(len(squeezed(node.text_content())) for node in top.iter("a") if node.get("href"))
        for node in top.iter(*LEAVES):
            words = squeezed(node.text_content())
            if words and not any(True for _ in node.iterdescendants(*LEAVES, "ul", "ol", "dl", "table", "div")):
                blocks.append(words)
    return blocks, flow, in_links


def num_at_place(content: Flow, output: Flow) -> int:
    """Images of the content that the output has beside the same text: each of its own only once."""
    left, count = list(output.images), 0
    for source, at in content.images:
        before, after = content.text[max(0, at - CONTEXT) : at], content.text[at : at + CONTEXT]
        for image in left:
            text, place = output.text, image[1]
            same_before = text[:place].endswith(before) if before else place == 0
            same_after = text.startswith(after, place) if after else place == len(text)
            if image[0] == source and (same_before or same_after):
                left.remove(image)
                count += 1
                break
    return count


# --- what reads the pages ----------------------------------------------------------------------------------------

Way = Callable[[Path, list[str]], tuple[dict[str, Flow], float]]
"""pages of a folder to what is found on each, and CPU seconds for one"""


def ours(root: Path, names: list[str]) -> tuple[dict[str, Flow], float]:
    found: dict[str, Flow] = {name: Flow() for name in names}
    began = time.process_time()
    importer, drops = create("html", root, None, {"text_pages": True}), Drops()
    documents = [document for unit in importer.units() for document in importer.documents(unit, drops)]
    seconds = time.process_time() - began
    for document in documents:
        flow = found.get(document.metadata["group"], Flow())
        for item in document.items:
            if isinstance(item, Text):
                for line in item.text.split("\n"):
                    flow.add_text(line)
            elif isinstance(item, Image):
                flow.add_image(item.name or "")
    return found, seconds / len(importer.pages)  # type: ignore[attr-defined]


def each(extract: Callable[[bytes, Flow], None], root: Path, names: list[str]) -> tuple[dict[str, Flow], float]:
    """A library's function for one page, on all."""
    found: dict[str, Flow] = {name: Flow() for name in names}
    seconds = 0.0
    for name, flow in found.items():
        page = (root / name).read_bytes()
        began = time.process_time()
        extract(page, flow)
        seconds += time.process_time() - began
    return found, seconds / len(names)


def ways() -> Iterator[tuple[str, Way]]:
    """Ours, and the peers that are installed; says which are not."""
    yield "ours", ours
    try:
        import trafilatura

        def xml(recall: bool, page: bytes, flow: Flow) -> None:
            text = trafilatura.extract(page, output_format="xml", include_images=True, favor_recall=recall)
            if text:
                flow.add_tree(etree.fromstring(text))

        name = f"trafilatura {importlib.metadata.version('trafilatura')}"
        yield f"{name}, favor_recall", functools.partial(each, functools.partial(xml, True))
        yield name, functools.partial(each, functools.partial(xml, False))
    except ImportError as error:
        print(f"trafilatura is left out: {error}")
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding

        def plain(page: bytes, flow: Flow) -> None:
            text = bytes_to_str(page, detect_encoding(page))
            for line in extract_plain_text(text, main_content=True, list_bullets=False, alt_texts=False).split("\n"):
                flow.add_text(line)

        version = importlib.metadata.version("resiliparse")
        yield f"resiliparse {version}", functools.partial(each, plain)
    except ImportError as error:
        print(f"resiliparse is left out: {error}")


# --- the table ---------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    blocks: float
    foreign: float
    images: int
    seconds: float


def pages_with_images(root: Path, content: str, none: str, most: int) -> dict[str, tuple[list[str], Flow]]:
    """Content of at most so many pages, by their names below the folder; of its images those that are files."""
    found = {}
    for file in sorted(file for file in root.rglob("*") if file.suffix in (".html", ".htm", ".xhtml")):
        with contextlib.suppress(etree.LxmlError):
            blocks, flow, in_links = content_of(file.read_bytes(), content, none)
            flow.images = [image for image in flow.images if is_picture(file.parent / image[0])]
            if flow.images and in_links < len(flow.text) / 2:
                found[file.relative_to(root).as_posix()] = (blocks, flow)
    names = list(found)
    number = min(most, len(names))
    return {name: found[name] for name in (names[k * len(names) // number] for k in range(number))}


def measured(root: Path, content: str, none: str, most: int, every: dict[str, Way]) -> dict[str, Row]:
    """Print the table of one manual."""
    pages = pages_with_images(root, content, none, most)
    blocks = sum(len(own) for own, _ in pages.values())
    images = sum(len(flow.images) for _, flow in pages.values())
    print(f"{len(pages)} pages, {blocks:,} blocks, {images:,} images")
    print(f"  {'':<34}{'blocks':>9}{'foreign':>9}{'images':>9}{'ms':>8}")
    rows = {}
    for way, read in every.items():
        outputs, seconds = read(root, list(pages))
        found = foreign = length = at_place = 0
        for name, (own, flow) in pages.items():
            output = outputs[name]
            found += sum(words in output.text for words in own)
            foreign += sum(len(line) for line in output.lines if line not in flow.text)
            length += len(output.text)
            at_place += num_at_place(flow, output)
        row = rows[way] = Row(found / max(1, blocks), foreign / max(1, length), at_place, seconds)
        print(f"  {way:<34}{row.blocks:>9.1%}{row.foreign:>9.1%}{row.images:>9,}{1e3 * row.seconds:>8.1f}", flush=True)
    return rows


def claims(name: str, rows: dict[str, Row]) -> dict[str, bool]:
    own, peers = rows["ours"], [row for way, row in rows.items() if way != "ours"]
    return {
        f"{name}: at least 99.5 % of the blocks": own.blocks >= 0.995,
        f"{name}: at most 0.1 % foreign": own.foreign <= 0.001,
        f"{name}: no less of the blocks and no fewer images than a peer": all(
            own.blocks >= row.blocks and own.images >= row.images for row in peers
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="PACKAGE | FOLDER", help=f"packages: {', '.join(MANUALS)}")
    parser.add_argument("--packages", type=existing_folder, metavar="DIR", help="folder with .deb files")
    parser.add_argument("--pages", type=positive, default=200, help="of each, at most (%(default)s)")
    parser.add_argument("--content", metavar="XPATH", default="//main", help="of folders (%(default)s)")
    parser.add_argument("--without", metavar="XPATH", default="", help="what in the content of folders is none")
    options = parser.parse_args()
    if absent := [name for name in options.what if name not in MANUALS and not Path(name).is_dir()]:
        parser.error(f"{absent[0]!r} is neither a folder nor one of: {', '.join(MANUALS)}")
    packages = options.packages.resolve() if options.packages else None
    every = dict(ways())
    held: dict[str, bool] = {}
    for name in options.what or MANUALS:
        if name not in MANUALS:
            print(f"\n{name}: ", end="")
            measured(Path(name), options.content, options.without, options.pages, every)
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                root = unpack(name, Path(folder), packages)
            except FileNotFoundError as error:
                print(f"\n{name} is left out: {error}")
                continue
            print(f"\n{name}: ", end="")
            manual = MANUALS[name]
            held |= claims(name, measured(root, manual.content, manual.none, options.pages, every))
    exit_unless(held)


if __name__ == "__main__":
    exit_with(main)
