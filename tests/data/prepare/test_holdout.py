"""Protects the choice of held-out documents where there are few: one at least, never all."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from data.helpers import TOKENIZER
from data.writers import picture
from PIL import Image as Pillow
from PIL import ImageOps

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.thumbnails import EXACT
from megatron_lcl.data.prepare import holdout
from megatron_lcl.data.prepare.holdout import Described, Describer, Grouping
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError


def grouping(images: list[int]) -> Grouping:
    """A document for each image, which its number tells apart."""
    found, describer = Grouping(), Describer()
    for k, image in enumerate(images):
        found.add(describer.describe(Document((Text("text"), Image(picture(image, 80, 70))), name=str(k))))
    return found


@pytest.mark.parametrize("num", [2, 3, 4, 9])
def test_of_a_few_pages_one_is_held_out(num: int) -> None:
    assert len(grouping(list(range(num))).held_out(0.13)) == 1


def test_something_stays_in_training() -> None:
    assert len(grouping([0, 1, 2]).held_out(0.99)) == 2
    for images in ([0], [0, 0], [0, 0, 0]):
        why = f"join all {len(images)} documents .* into one group" if images[1:] else "there is one document alone"
        with pytest.raises(
            ValueError, match=f"nothing to hold out: .*{why}.*; give more or other documents, or leave out"
        ):
            grouping(images).held_out(0.13)
    book = Grouping()
    for k in range(300):
        book.add(Described("book", [], [(bytes([k % 256, k // 256]), None)]))
    said = "nothing to hold out: there is one document alone, or all are of one page, book or image;"
    with pytest.raises(UserError, match=said):
        book.held_out(0.13)


@pytest.mark.parametrize(("num", "enough"), [(400, 0.05), (150, 0.14), (40, 0.5), (21, 0.96), (20, None)])
def test_groups_that_are_too_large_for_the_fraction(num: int, enough: float | None) -> None:
    """The error names a fraction that is enough for the smallest, if there is one."""
    found = Grouping()
    for k in range(num):
        found.add(Described(str(k), [bytes([min(k // 2, 1)])], []))  # two documents, and all others
    said = "documents .* into 2 groups, the smallest of 2; with a fraction of .* only groups of up to 1 .* documents"
    with pytest.raises(UserError, match=said) as caught:
        found.held_out(min(0.9 * (enough or 1), 15 / num))
    larger = f", or a larger --held-out-fraction ({enough:g})" if enough else ""
    assert str(caught.value) == f"{caught.value.said()}{larger}, or leave out --held-out"
    if enough:
        assert len(found.held_out(enough)) == 2


def test_as_many_as_asked_for_and_no_group_divided() -> None:
    """60 pairs and 80 documents alone, of which a tenth is asked for: where one is left to choose, no pair is."""
    found = Grouping()
    for pair in range(60):
        for side in "ab":
            found.add(Described(f"{pair}{side}", [bytes([pair])], []))
    for k in range(80):
        found.add(Described(f"alone {k}", [], []))
    for seed in range(20):
        chosen = found.held_out(0.1, seed)
        assert len(chosen) == 20
        assert all((f"{pair}a" in chosen) == (f"{pair}b" in chosen) for pair in range(60))


def test_an_image_on_several_pages_has_near_duplicates_too() -> None:
    """Pages name an image that others have as well by its hash; a near-duplicate on a third page is joined to both."""
    shown, again = picture(0, 80, 70), picture(0, 80, 70, "JPEG")
    shared = {"shares": [xxhash.xxh3_128_hexdigest(shown)]}
    pages = [
        Document((Text("named only"), Image(picture(1, 80, 70))), name="a", metadata=shared),
        Document((Text("first"), Image(shown)), name="b", metadata=shared),
        Document((Text("second"), Image(shown)), name="c", metadata=shared),
        Document((Text("near-duplicate"), Image(again)), name="d"),
        Document((Text("another"), Image(picture(2, 80, 70))), name="e"),
    ]
    found, describer = Grouping(), Describer()
    for page in pages:
        found.add(describer.describe(page))
    assert found.groups() == [["a", "b", "c", "d"], ["e"]]


def test_more_images_than_can_be_compared_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Different ones: those that occur again are compared once."""
    monkeypatch.setattr(holdout, "MAX_IMAGES", 3)
    assert len(grouping([0, 1, 2, 1, 0]).groups()) == 3
    with pytest.raises(
        UserError, match=r"over 3 different images are too many .*--held-out.*\(docs/data\.md\)"
    ) as caught:
        grouping([0, 1, 2, 1, 3])
    assert caught.value.said().endswith("compared with all; take fewer documents")


def test_all_comparisons_are_of_whole_numbers_that_float32_has() -> None:
    """So their sums are the same in any order, and on any processor."""
    flat = Pillow.new("RGB", (80, 70), "teal")
    content = io.BytesIO()
    flat.save(content, "PNG")
    documents = [Document((Image(data),)) for data in (*(picture(k, 80, 70) for k in range(6)), content.getvalue())]
    features = [found for document in documents for _, found in Describer().describe(document).images if found]
    assert len(features) == 7
    for rows in map(np.stack, zip(*features, strict=True)):
        assert rows.dtype == np.float32
        assert (rows == np.rint(rows)).all()
        assert np.einsum("ij,ij->i", rows, rows, dtype=np.float64).max() < EXACT
    assert not features[-1].edges.any()
    for found in features[:-1]:
        assert np.linalg.norm(found.edges) == pytest.approx(4000, abs=1)


def grouped(images: list[bytes]) -> list[list[str]]:
    """Groups of documents with an image each, named by its place, largest first."""
    found, describer = Grouping(), Describer()
    for k, image in enumerate(images):
        found.add(describer.describe(Document((Image(image),), name=f"{k:02d}")))
    return found.groups()


@pytest.mark.parametrize("block", [1, 3, 19, 2048])
def test_near_duplicates_are_found_however_far_apart(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Images are compared some at a time; one that does not decode has a number, but is compared with none."""
    monkeypatch.setattr(holdout, "_BLOCK", block)
    images = [picture(k, 80, 70) for k in range(20)]
    images[1] = images[1][:60]
    planted = [["02", "07", "13", "19"], ["00", "18"], ["04", "05"]]
    for first, *others in planted:
        for name, quality in zip(others, (95, 90, 85), strict=False):
            out = io.BytesIO()
            Pillow.open(io.BytesIO(images[int(first)])).save(out, "JPEG", quality=quality)
            images[int(name)] = out.getvalue()
    alone = [[f"{k:02d}"] for k in range(20) if not any(f"{k:02d}" in names for names in planted)]
    assert grouped(images) == planted + alone


def means(pixels: np.ndarray, side: int) -> np.ndarray:
    """Of squares of so many pixels."""
    return pixels.reshape(64 // side, side, 64 // side, side).mean((1, 3))


def rises(pixels: np.ndarray) -> np.ndarray:
    """Of a picture as 9 by 8 pixels: where the right one of two neighbors is brighter."""
    sums = np.pad(pixels.reshape(8, 8, 64).sum(1).cumsum(1), ((0, 0), (1, 0)))
    edges = [np.interp(np.arange(10) * 64 / 9, np.arange(65), row) for row in sums]
    return np.diff(np.diff(edges)) > 0


def strengths(pixels: np.ndarray) -> np.ndarray:
    vertical, horizontal = np.gradient(pixels)
    return means(np.hypot(vertical, horizontal), 2).ravel()


def noise(seed: int, side: int, most: float) -> np.ndarray:
    """Squares of so many pixels, each up to so much brighter or darker."""
    return np.kron(np.random.default_rng(seed).uniform(-most, most, (64 // side,) * 2), np.ones((side, side)))


def alike_in_color(shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Gray with other noise, and so much brighter."""
    return 120 + noise(1, 1, 9), 120 + shift + noise(2, 1, 9)


def alike_in_hash(num: float) -> tuple[np.ndarray, np.ndarray]:
    """A chessboard of 9 by 8 fields, brighter, with other noise, and with the last fields of some rows inverted, which
    inverts more of the differences between rows."""
    board = (-1.0) ** np.add.outer(np.arange(8), np.arange(9))
    other = board.copy()
    other[[0, 2, 4, 6, 1, 3][: int(num)], 8] *= -3
    first, second = (110 + 14 * np.repeat(b, 8, 0)[:, np.arange(64) * 9 // 64] for b in (board, other))
    return first + noise(3, 1, 40), second + 25 + noise(4, 1, 40)


def alike_in_edges(more: float) -> tuple[np.ndarray, np.ndarray]:
    """Squares, and their negative with some of another pattern."""
    return 128 + noise(5, 4, 45), 128 - noise(5, 4, 45) + noise(6, 4, more)


@pytest.mark.parametrize(
    ("pair", "criterion", "near", "beyond"),
    [(alike_in_color, 0, 10.5, 11.2), (alike_in_hash, 1, 5, 6), (alike_in_edges, 2, 20, 21)],
)
def test_each_criterion_alone_joins_two_images(
    pair: Callable[[float], tuple[np.ndarray, np.ndarray]], criterion: int, near: float, beyond: float
) -> None:
    """Up to its limit, and not beyond it, where the other two are far from theirs."""
    for given, joined in ((near, True), (beyond, False)):
        images = [np.rint(pixels) for pixels in pair(given)]
        a, b = images
        measured = (
            np.sqrt(((means(a, 4) - means(b, 4)) ** 2).mean()),
            (rises(a) != rises(b)).sum(),
            -np.corrcoef(strengths(a), strengths(b))[0, 1],
        )
        limits, margins = (11.0, 5, -0.75), (0.5, 1, 0.03)
        over = np.subtract(measured, limits)
        assert (over[criterion] <= 0) == joined, measured
        assert abs(over[criterion]) <= margins[criterion], "near the limit"
        assert all(value > 4 * margin for k, (value, margin) in enumerate(zip(over, margins, strict=True))
                   if k != criterion)  # fmt: skip
        files = []
        for pixels in images:
            out = io.BytesIO()
            Pillow.fromarray(pixels.astype(np.uint8)).convert("RGB").save(out, "PNG")
            files.append(out.getvalue())
        assert grouped(files) == ([["00", "01"]] if joined else [["00"], ["01"]])


def test_transparent_pictures_are_compared_on_white() -> None:
    """Black ink on nothing, as of drawings, is the drawing on white, and another drawing is another."""
    files = []
    for seed, mode in ((1, "RGBA"), (2, "RGBA"), (1, "RGB")):
        ink = np.rint(128 + noise(seed, 4, 120)).astype(np.uint8)
        drawing = Pillow.fromarray(255 - ink)
        if mode == "RGBA":
            drawing = Pillow.merge("LA", (Pillow.new("L", (64, 64), 0), Pillow.fromarray(ink)))
        out = io.BytesIO()
        drawing.convert(mode).save(out, "PNG")
        files.append(out.getvalue())
    assert grouped(files) == [["00", "02"], ["01"]]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_copy_is_a_near_duplicate(orientation: int) -> None:
    """A photograph that EXIF turns, and the file of a program that has turned its pixels."""
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    files = []
    for seed in (1, 2):
        out = io.BytesIO()
        Pillow.fromarray(np.rint(noise(seed, 4, 120) + 128).astype(np.uint8)).save(out, "JPEG", quality=95, exif=exif)
        copied = io.BytesIO()
        ImageOps.exif_transpose(Pillow.open(out)).save(copied, "PNG")
        files += [out.getvalue(), copied.getvalue()]
    assert grouped(files) == [["00", "01"], ["02", "03"]]


@pytest.mark.parametrize("deep", ["16 bits", "floats"])
def test_levels_of_more_than_8_bits_are_compared_as_those_of_8(deep: str) -> None:
    files = []
    for seed in (1, 2):
        gray = np.rint(noise(seed, 4, 120) + 128).astype(np.uint8)
        levels = gray.astype(np.uint16) * 257 if deep == "16 bits" else gray.astype(np.float32) / 255
        for pixels, format in ((levels, "TIFF"), (gray, "PNG")):
            out = io.BytesIO()
            Pillow.fromarray(pixels).save(out, format)
            files.append(out.getvalue())
    assert grouped(files) == [["00", "01"], ["02", "03"]]


def test_parts_of_a_page_stay_together(tmp_path: Path) -> None:
    """Without images, which would join them as well."""
    (tmp_path / "in").mkdir()
    for page in range(12):
        parts = (f"<h1>Part {part}</h1><p>{'words ' * 30}{page} {part}</p>" for part in range(3))
        (tmp_path / f"in/{page}.html").write_text("<html><body>" + "".join(parts) + "</body></html>")
    folders = [tmp_path / "training", tmp_path / "held-out"]
    preprocess("html", tmp_path / "in", folders[0], held_out=folders[1], held_out_fraction=0.3, tokenizer=TOKENIZER,
               options={"max_words": 40, "text_pages": True})  # fmt: skip
    training, held_out = ([opened.name(k).partition("#")[0] for k in range(len(opened))]
                          for opened in map(open_corpus, folders))  # fmt: skip
    assert (len(training), len(held_out)) == (24, 12)
    assert len(set(training)) == 8
    assert set(training).isdisjoint(held_out)
