"""Protects the choice of held-out documents where there are few: one at least, never all."""

from __future__ import annotations

import pytest
import xxhash
from data.writers import picture

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.prepare import holdout
from megatron_lcl.data.prepare.holdout import Describer, Grouping
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
        with pytest.raises(ValueError, match=f"nothing to hold out: .* join {len(images)} pages into 1 groups"):
            grouping(images).held_out(0.13)


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
    with pytest.raises(UserError, match=r"over 3 different images are too many for --held-out.*\(docs/data\.md\)"):
        grouping([0, 1, 2, 1, 3])
