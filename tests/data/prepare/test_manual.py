"""Protects the whole GIMP manual: what the importer finds, what is held out; and every format, with a fourth of it."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.helpers import check_all_formats, plain, spaced
from lxml import html
from PIL import Image as Pillow
from scipy.fft import dctn

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.preprocess import Summary, preprocess
from megatron_lcl.demo.manual import Manual

pytestmark = pytest.mark.slow


Read = tuple[list[Document], Drops]


def test_finds_what_an_independent_count_finds(manual: Manual, manual_documents: Read) -> None:
    documents, drops = manual_documents
    pages, words, sources = 0, 0, Counter[str]()
    for file in sorted(manual.html.glob("*.html")):
        tree = html.fromstring(file.read_bytes())
        for node in tree.xpath(
            '//*[contains(@class,"navheader") or contains(@class,"navfooter")]|//script|//style|//head'
        ):
            node.drop_tree()
        large = Counter[str]()
        for source in tree.xpath("//img/@src"):
            path = manual.html / source
            if path.suffix != ".svg" and min(Pillow.open(path).size) >= 64:
                large[source] += 1
        if large:
            pages += 1
            words += len(tree.text_content().split())
            sources += large
    assert len({d.metadata["group"] for d in documents}) == pages
    ours = sum(len(t.text.split()) for d in documents for t in d.texts)
    assert ours == pytest.approx(words, rel=0.02)  # tables of contents and notes to report bugs are gone
    too_long = sum(n for s, n in sources.items() if max(size := Pillow.open(manual.html / s).size) > 8 * min(size))
    left_out = drops.left_out_counts
    assert left_out.get("image: aspect above 8", 0) == too_long
    gone = left_out["image: stands on over 5% of the pages"]
    assert gone == 96
    repeated = left_out["image: repeated (on a page, or on more than 8 pages)"]
    assert sum(len(d.images) for d in documents) == sources.total() - too_long - gone - repeated


def test_every_image_is_the_file_the_page_names(manual: Manual, manual_documents: Read) -> None:
    documents, _ = manual_documents
    for image in (i for d in documents for i in d.images):
        assert image.data == (manual.html / image.name).read_bytes()


def test_reading_order(manual_documents: Read) -> None:
    documents, _ = manual_documents
    page = next(d for d in documents if d.name == "gimp-filter-fractal-trace.html")
    kinds = [item.text.split("\n")[-1] if isinstance(item, Text) else item.name.split("/")[-1] for item in page.items]
    assert kinds[:5] == [
        "Figure 17.292. Fractal Trace", "kvitveis-orig.png", "Original image", "kvitveis-fractal.png",
        "Figure 17.293. “Fractal trace” filter options",
    ]  # fmt: skip
    assert "This filter is found in the main menu under Filters → Map → Fractal trace…." in page.texts[2].text.split(
        "\n"
    )


def near_duplicates(ours: list[bytes], others: list[bytes]) -> list[tuple[int, int]]:
    """Pairs that look alike by another measure than the one that grouped them: perceptual hashes and gray pixels."""

    def features(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        image = Pillow.open(io.BytesIO(data)).convert("RGBA")
        white = Pillow.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        gray = white.convert("L")
        spectrum = dctn(np.asarray(gray.resize((32, 32), Pillow.Resampling.LANCZOS), float))[:8, :8].ravel()[1:]
        return spectrum > np.median(spectrum), np.asarray(
            gray.resize((24, 24), Pillow.Resampling.LANCZOS), float
        ).ravel()

    a, b = ([np.stack(part) for part in zip(*map(features, images), strict=True)] for images in (ours, others))
    close = []
    for i in range(len(ours)):
        bits = (a[0][i] ^ b[0]).sum(1)
        level = np.abs(a[1][i] - b[1]).mean(1)
        close += [(i, int(j)) for j in np.flatnonzero((bits <= 2) | (level < 4) | ((bits <= 6) & (level < 10)))]
    return close


def test_held_out_images_have_no_near_duplicate_in_training(manual_corpus: Summary) -> None:
    assert manual_corpus.held_out is not None
    training, held_out = open_corpus(manual_corpus.path), open_corpus(manual_corpus.held_out.path)
    assert training.tokenizer.fingerprint == held_out.tokenizer.fingerprint
    images = [[i.data for d in corpus for i in d.images] for corpus in (held_out, training)]
    assert len(images[0]) >= 130
    close = near_duplicates(*images)
    assert not close, f"{len(close)} pairs"


def test_the_photograph_and_its_variants_stay_in_training(
    manual: Manual, manual_documents: Read, manual_corpus: Summary
) -> None:
    assert manual_corpus.held_out is not None
    held_out = {i.data for d in open_corpus(manual_corpus.held_out.path) for i in d.images}
    named = sorted(p for p in manual.html.rglob("*taj*") if p.suffix in (".jpg", ".png"))
    # a triangle that the filter drew over the whole photograph is no variant of it
    variants = [p for p in named if p.stem != "render-taj-ifscompose"]
    assert len(variants) > 120
    assert not [p.name for p in variants if p.read_bytes() in held_out]
    documents, _ = manual_documents
    photograph = [p for p in manual.html.glob("*.html") if "taj_orig.jpg" in p.read_text("utf-8")]
    pages = {d.metadata["group"]: d for d in documents}
    around = [i.data for p in photograph for i in (pages[p.name].images if p.name in pages else ())]
    assert not set(around) & held_out


def test_manual_through_every_format(manual_documents: Read, manual_corpus: Summary, tmp_path: Path) -> None:
    documents, _ = manual_documents
    tokenizer = open_corpus(manual_corpus.path).tokenizer
    check_all_formats([Document(d.items) for d in documents[::4]], tmp_path, tokenizer)


def test_corpus_holds_every_document_once(manual: Manual, manual_documents: Read, manual_corpus: Summary) -> None:
    documents, _ = manual_documents
    assert manual_corpus.held_out is not None
    stored = [*open_corpus(manual_corpus.path), *open_corpus(manual_corpus.held_out.path)]
    assert sorted(map(repr, plain(stored))) == sorted(map(repr, plain(spaced(documents, "\n"))))
    assert open_corpus(manual_corpus.path).manifest["source"]["sha256"] == manual.source["sha256"]


def test_clip_tokenizer_on_the_manual(manual: Manual, manual_documents: Read, tmp_path: Path) -> None:
    preprocess("html", manual.html, tmp_path / "clip", tokenizer="clip", limit=100)
    corpus = open_corpus(tmp_path / "clip")
    assert corpus.tokenizer.fingerprint == tokenizers.load("clip").fingerprint
    assert corpus.tokenizer.vocab_size == 49411
    assert [type(i) for i in corpus[0].items] == [type(i) for i in manual_documents[0][0].items]
    assert all(isinstance(i, Image | Text) for i in corpus[0].items)
