"""Texts at the edges of many pages: the rule by itself, through the importer, and as a property."""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path

import pytest
from data.prepare.test_html import LARGE, picture, read
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl.data.prepare.importers import html_repeats
from megatron_lcl.data.prepare.importers.html import HtmlImporter
from megatron_lcl.data.prepare.importers.html_page import Block
from megatron_lcl.data.prepare.importers.html_repeats import MIN_PAGES, EdgeTexts, edge_keys, without_repeated
from megatron_lcl.data.prepare.preprocess import preprocess

REASON = "text: repeated at the edges of many pages"


def pages_of(count: int, page: str, others: int = 0) -> dict[str, str]:
    """`count` pages with NUMBER filled in, and others without anything in common."""
    names = [f"{k:04d}.html" for k in range(count + others)]
    bodies = [
        page if k < count else "<p>the only words of page number NUMBER</p><img src=NUMBER.png>"
        for k in range(len(names))
    ]
    return {name: body.replace("NUMBER", f"n{k}") for k, (name, body) in enumerate(zip(names, bodies, strict=True))}


def images_of(pages: dict[str, str]) -> dict[str, bytes]:
    return {f"n{k}.png": picture(1000 + k, 64, 64) for k in range(len(pages))}


PAGE = """<h1>Topic NUMBER</h1><div>From the wiki of panoramas</div><h2>NAME</h2><p>What NUMBER is for</p>
<img src=NUMBER.png><p>Original image</p>
<p>All commands take the option verbose</p><p>The end of NUMBER</p><h2>SOURCE CODE</h2>
<p>Made on Monday 24 at 17:52:NUMBER</p>
<p><a href=i>Main index</a> | <a href=n>Index of NUMBER</a> | <a href=k>Keywords</a></p>
<p>&copy; the authors of the manual</p>"""


def test_edges_lose_what_many_pages_repeat(tmp_path: Path) -> None:
    pages = {name: page.replace("52:n", "52:") for name, page in pages_of(12, PAGE).items()}
    documents, drops = read(tmp_path, pages, images_of(pages))
    for k, document in enumerate(documents):
        assert document == [
            f"Topic n{k}\nNAME\nWhat n{k} is for", f"[n{k}.png]",
            f"Original image\nAll commands take the option verbose\nThe end of n{k}",
        ]  # fmt: skip
    assert drops.left_out_counts == {REASON: 12 * 5}  # the line of the wiki, SOURCE CODE, date, links, authors
    assert drops.names[REASON][0] == "0000.html"
    assert ("SOURCE CODE", "0000.html") in drops.samples[REASON]


@pytest.mark.parametrize(
    ("foot", "gone"),
    [
        ("\u7248\u6743\u6240\u6709", True),  # Chinese and Thai letters count as words
        ("\u0e2a\u0e07\u0e27\u0e19", True),
        ("\uc6d0\ubcf8 \uc774\ubbf8\uc9c0", False),  # two words, "original image" as above: Korean has spaces
    ],
)
def test_how_long_a_repeated_text_is_in_other_scripts(tmp_path: Path, foot: str, gone: bool) -> None:
    pages = pages_of(MIN_PAGES, f"<meta charset=utf-8><p>Words of NUMBER</p><img src=NUMBER.png><p>{foot}</p>")
    documents, _ = read(tmp_path, pages, images_of(pages))
    assert all((foot in document[-1]) != gone for document in documents)


@pytest.mark.parametrize(("count", "others", "gone"), [
    (3, 0, False), (MIN_PAGES - 1, 0, False), (MIN_PAGES, 0, True), (MIN_PAGES, 29, True), (MIN_PAGES, 30, False),
])  # fmt: skip
def test_from_which_share_of_the_pages_on(tmp_path: Path, count: int, others: int, gone: bool) -> None:
    page = "<p>Warning: this feature is experimental</p><p>Words of NUMBER</p><img src=NUMBER.png>"
    pages = pages_of(count, page, others)
    documents, drops = read(tmp_path, pages, images_of(pages))
    assert ("Warning" not in documents[0][0]) == gone
    assert drops.left_out_counts == ({REASON: count} if gone else {})


def test_the_share_is_an_option_and_repeated_pages_do_not_count(tmp_path: Path) -> None:
    page = "<p>Words of NUMBER</p><img src=NUMBER.png><p>The foot of every page</p>"
    pages = pages_of(20, page)
    documents, _ = read(tmp_path / "a", pages, images_of(pages), max_text_share=1.0)
    assert all("The foot of every page" in d[-1] for d in documents)
    same = pages_of(30, "<p>All alike here</p><img src=n0.png><p>The foot of every page</p>")
    documents, drops = read(tmp_path / "b", same, images_of(same))
    assert documents == [["All alike here", "[n0.png]", "The foot of every page"]]
    assert REASON not in drops.left_out_counts


def test_a_title_of_the_whole_site_before_the_main_part_goes(tmp_path: Path) -> None:
    page = "<h1>Panoramas</h1><main><p>Words of NUMBER</p><img src=NUMBER.png></main>"
    pages = pages_of(12, page)
    documents, _ = read(tmp_path, pages, images_of(pages))
    assert documents[3] == ["Words of n3", "[n3.png]"]


def blocks() -> st.SearchStrategy[list[Block]]:
    text = st.sampled_from("abcdefgh").map(lambda c: f"the text called {c}")
    return st.lists(
        st.one_of(
            st.builds(lambda kind, t: Block(kind, t), st.sampled_from(["text", "text", "heading"]), text),
            st.builds(lambda data: Block("image", data), st.binary(max_size=1)),
            st.builds(lambda t: Block("text", t, (t,)), text),
        ),
        max_size=6,
    )


def test_empty_links_say_nothing_of_their_line() -> None:
    pages = [[Block("text", f"What stands on page {i} alone.", ("", " "))] for i in range(2 * MIN_PAGES)]
    texts = EdgeTexts()
    for page in pages:
        texts.add(page)
    assert [without_repeated(page, texts.repeated(0.25)) for page in pages] == [(page, []) for page in pages]


@pytest.mark.timeout(60)
def test_a_number_of_a_million_digits() -> None:
    """It takes milliseconds; tried from each of its digits, hours. A stamp behind it is one all the same."""
    digits = "7" * 1_000_000
    a, b, other = (edge_keys([Block("text", f"{digits} at {time}")]) for time in ("17:52", "9:05", "noon"))
    assert a == b != other


@settings(max_examples=300)
@given(st.text("1²٣-:./a\n", max_size=40))
def test_stamps_are_what_begins_at_any_digit(text: str) -> None:
    slow = re.sub(r"\d+(?:[-:./]\d+)+", "0", text.strip())
    assert edge_keys([Block("text", text)]) == edge_keys([Block("text", slow)])


@settings(max_examples=80)
@given(st.lists(blocks(), min_size=MIN_PAGES, max_size=25), st.floats(0.05, 1))
def test_only_a_run_at_an_edge_can_go(pages: list[list[Block]], share: float) -> None:
    texts = EdgeTexts()
    for page in pages:
        texts.add(page)
    repeated = texts.repeated(share)
    for page in pages:
        kept, gone = without_repeated(page, repeated)
        assert sorted(map(repr, kept + gone)) == sorted(map(repr, page))
        assert [b for b in kept if b.kind == "image"] == [b for b in page if b.kind == "image"]
        for block in gone:  # by an independent count
            holders = sum(any(b.kind != "image" and b.value == block.value for b in other) for other in pages)
            assert holders >= MIN_PAGES
            assert holders > share * len(pages)
        ids = [any(b is g for g in gone) for b in page]
        own = [i for i, b in enumerate(page) if b.kind == "image" or (b.kind == "text" and not ids[i])]
        if own:  # between a page's first and last own block all stands as it stood
            assert not any(ids[own[0] : own[-1]])


def test_counts_stay_bounded_and_right_over_many_pages() -> None:
    """More pages than the counting remembers one by one, against plain arithmetic."""
    texts, draw, most = EdgeTexts(), random.Random(0), 0
    for k in range(20_000):
        page = [Block("text", f"words that only {k} and {j} hold") for j in range(4)]
        page += [Block("text", "on a third of all pages")] * (k % 3 == 0) + [Block("text", "on a fifth of them")] * (
            k % 5 == 0
        )
        page += [Block("text", "only late, on half of all pages")] * (k >= 10_000)
        draw.shuffle(page)
        texts.add(page)
        most = max(most, len(texts._counts))
    assert most < 6_000  # of 80,000
    assert len(texts.repeated(0.25)) == 2
    assert len(texts.repeated(0.35)) == 1
    assert len(texts.repeated(0.15)) == 3


# --- corpora -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 pages, three units: a footer that each unit alone shows as well, one that only the first 60 have."""
    folder = tmp_path_factory.mktemp("site")
    pages = pages_of(150, "<p>Words of NUMBER</p><img src=NUMBER.png>EARLY<p>The foot of every page</p>")
    for k, (name, page) in enumerate(pages.items()):
        (folder / name).write_text(page.replace("EARLY", "<p>The earlier pages say this</p>" * (k < 60)))
        (folder / f"n{k}.png").write_bytes(picture(1000 + k, 64, 64))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_text_that_begins_on_a_late_page_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had been forgotten after each window of pages before."""
    monkeypatch.setattr(html_repeats, "_WINDOW", 4)
    texts = EdgeTexts()
    for page in range(400):
        texts.add([1] * (page >= 40 and page % 2))
    assert texts.repeated(0.25) == {1}


def test_workers_do_not_matter(site: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        preprocess("html", site, tmp_path / f"{workers}", tokenizer="clip", workers=workers, task_bytes=1)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert b'"text: repeated at the edges of many pages": 210' in contents(tmp_path / "1")["corpus.json"]


def test_an_unfinished_run_of_earlier_rules_is_not_continued(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HtmlImporter, "rules", 1)  # a recipe without them, as earlier versions wrote it
    preprocess("html", site, tmp_path / "out", tokenizer="clip", job=(0, 2), task_bytes=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="by another version's rules; finish it with the release that began it"):
        preprocess("html", site, tmp_path / "out", tokenizer="clip", job=(1, 2), task_bytes=1)


def test_a_finished_corpus_of_earlier_rules_is_recognized_and_said(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(HtmlImporter, "rules", 1)
    preprocess("html", site, tmp_path / "out", tokenizer="clip", held_out=tmp_path / "held")
    monkeypatch.undo()
    before = contents(tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        summary = preprocess("html", site, tmp_path / "out", tokenizer="clip", held_out=tmp_path / "held")
    assert summary.reused
    assert contents(tmp_path / "out") == before
    assert "another version's rules for html" in caplog.text
    with pytest.raises(ValueError, match="another version's rules"):  # half of it is no half of what would be made now
        preprocess("html", site, tmp_path / "out", tokenizer="clip", held_out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_large_image_is_no_reason(tmp_path: Path) -> None:
    """An image that all pages hold at their start is decoration and does not shield the text behind it."""
    pages = pages_of(12, "<img src=logo.png><p>The head of every page</p><p>Words of NUMBER</p><img src=NUMBER.png>")
    documents, _ = read(tmp_path, pages, images_of(pages) | {"logo.png": LARGE})
    assert documents[5] == ["Words of n5", "[n5.png]"]
