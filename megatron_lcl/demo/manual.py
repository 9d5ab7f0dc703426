"""The GIMP manual: real documents that Debian and Ubuntu machines fetch without root (package gimp-help-en, GFDL)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lxml import html as lxml_html

from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.prepare.export_corpus import export_corpus
from megatron_lcl.data.prepare.preprocess import Summary, preprocess
from megatron_lcl.demo.licenses import LICENSES, License, license_text
from megatron_lcl.demo.packages import Fetched, Package, fetch, unpack_debian
from megatron_lcl.demo.write import DOCUMENTS, write_sources
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import below, exists, matching

PACKAGE = Package(
    "apt-get", "gimp-help-en", "3.0.0-4", "b18e0b0763de45eb66a65305c443cf2a03572ec42fc01d6bb2817c5b33e600bf"
)
LICENSE = "GFDL-1.2-or-later"
VOCAB_SIZE = 2048
CORPUS, HELD_OUT = "corpora/manual", "corpora/heldout"
"""folders of the output"""
_REMEDY = "give a folder of HTML pages with their images instead: --html DIR"


@dataclass(frozen=True, slots=True)
class Manual:
    """The unpacked manual: its folder of HTML, and what goes into a corpus manifest."""

    html: Path
    fetched: Fetched

    @property
    def source(self) -> dict[str, str]:
        return {**self.fetched.source, "license": LICENSE}


def fetch_manual(folder: str | Path, given: Path | None = None) -> Manual:
    """Download the package into `folder` (kept, and used again), or take that of `given`, and unpack it in `folder`.

    Raises UserError that says how to pass a folder of HTML instead where apt or dpkg is missing or the download fails.
    """
    folder = Path(folder).resolve()
    (fetched,) = fetch([PACKAGE], folder, given, _REMEDY)
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = folder / "unpacked"
    unpack_debian(fetched.file, unpacked)
    pages = sorted(below(unpacked, "index.html"), key=lambda p: len(p.parts))
    if not pages:
        raise UserError(f"{PACKAGE.name} holds no HTML; {_REMEDY}")
    return Manual(pages[0].parent, fetched)


def make(output: Path, folder: Path, given: Path | None, html: Path | None, workers: int) -> Summary:
    """Corpora of the manual, or of another folder of pages, in `output`: documents to train on and held-out ones.

    And the same documents in the generic format, LICENSES, and the sources.
    """
    source: dict[str, str] = {}
    if html is None:
        manual = fetch_manual(folder, given)
        html, source = manual.html, manual.source
        entry = _license(manual)
    else:
        entry = License(
            str(html), "not known", "Pages that were given: whose they are, and under what license, they say."
        )
    made = preprocess(
        "html",
        html,
        output / CORPUS,
        vocab_size=VOCAB_SIZE,
        held_out=output / HELD_OUT,
        source=source,
        workers=workers,
        progress=True,
    )
    assert made.held_out is not None
    for name in (CORPUS, HELD_OUT):
        documents = output / DOCUMENTS / Path(name).name
        if not exists(documents):
            export_corpus(output / name, documents)
    replace_text(output / LICENSES, license_text("manual", [entry]))
    sources = {"demo": "manual", "packages": [source] if source else [], "counts": made.counts}
    write_sources(output, {**sources, "held out": made.held_out.counts})
    return made


def _license(manual: Manual) -> License:
    """With the GNU Free Documentation License as it stands in the manual."""
    pages = matching(manual.html, "gfdl*.html")
    texts = [lxml_html.fromstring(page.read_bytes()).text_content() for page in pages]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    package = f"{PACKAGE.name} {manual.fetched.version}"
    about = "The GIMP manual, by the GIMP Documentation Team; its pages name the authors."
    return License(package, LICENSE, about, "\n".join(line for line in lines if line))
