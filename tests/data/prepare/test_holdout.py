"""Protects the choice of held-out documents where there are few: one at least, never all."""

from __future__ import annotations

import io

import numpy as np
import pytest
import xxhash
from data.writers import picture
from PIL import Image as Pillow

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.thumbnails import EXACT
from megatron_lcl.data.prepare import holdout
from megatron_lcl.data.prepare.holdout import Described, Describer, Grouping
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
