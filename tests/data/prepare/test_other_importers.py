"""Protects authors of importers: what theirs gives that is no document is told with importer, unit and document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data.helpers import TOKENIZER
from data.writers import picture

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import Importer, Unit
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

IMAGE = Image(picture(0), "0.png")
SOUND = [Document((Text(f"text {k}"), Image(picture(k), f"{k}.png")), f"sound {k}") for k in range(2)]


class Given(Importer):
    """Two sound documents, then others."""

    separator = " "
    change: Any = "1"

    def __init__(self, *documents: Any) -> None:
        self.of_unit = {"first": SOUND, "second": documents}

    def signature(self) -> str:
        return self.change

    def units(self) -> Iterator[Unit]:  # read as often as a list can be
        yield from (Unit(name, 1) for name in self.of_unit)

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        yield from self.of_unit[unit.name]


def one(*items: Any, **about: Any) -> Document:
    return Document(items or (Text("text"), IMAGE), **{"name": "the third", **about})


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"items": ()}, ": it is {'items': ()}, where Document belongs"),
        ("text", ": it is 'text', where Document belongs"),
        (one(Text(None)), ", 'the third': items[0].text is None, where str belongs"),
        (one(IMAGE, "text"), ", 'the third': items[1] is 'text', where Text or Image belongs"),
        (one(Image("/a/" + 100 * "x")), f"items[0].data is '/a/{53 * 'x'}... (str), where bytes or"),
        (one(Text("text"), Image(IMAGE.data, similarity="0.5")), "items[1].similarity is '0.5', where float or None"),
        (one(Text("text"), Image(IMAGE.data, matched_text=0.0)), "items[1].matched_text is 0.0, where int or None"),
        (one(name=3), ", 3: name is 3, where str belongs"),
        (one(metadata=None), "metadata is None, where Mapping belongs"),
        (one(metadata={"lost_images": "1"}), "metadata['lost_images'] is '1', where int belongs"),
        (one(kind=["natural"]), "kind is ['natural'], where str or None belongs"),
        (Document(Text("text"), "the third"), "items is Text(text='text'), where Sequence belongs"),
    ],
)
def test_what_is_no_document_is_told(document: Any, said: str, tmp_path: Path) -> None:
    found, end = f"{__name__}.Given, unit 'second', document 1 of it", r"; mend its `documents` \(it ended with .*\)"
    with pytest.raises(UserError, match=f"^{re.escape(found)}.*{re.escape(said)}.*{end}$"):
        preprocess(Given(one(), document), None, tmp_path / "out", tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"group": ["3"]}, "metadata['group'] is ['3'], where str or int or None belongs"),
        ({"shares": "abcdef1"}, "metadata['shares'] is 'abcdef1', where list or tuple or set or"),
    ],
)
def test_where_documents_are_held_out(about: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f".Given, unit 'second', document 0 of it, 'the third': {said}")):
        preprocess(Given(one(metadata=about)), None, tmp_path / "out", tokenizer=TOKENIZER, held_out=tmp_path / "held")


def test_where_a_tokenizer_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"document 0 of it, 'the third': items\[0\].text is 7"):
        preprocess(Given(one(Text(7))), None, tmp_path / "out")


class Failing(Given):
    """Fails by itself, behind a document that is odd, too."""

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        yield from super().documents(unit, drops)
        yield one(name=3)
        raise TypeError("its own")


class Silent(Given):
    """Its `documents` forgets to return what it has made."""

    def documents(self, unit: Unit, drops: Drops) -> Any:
        return None


def test_an_importer_fails_by_itself_as_it_does(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^its own$"):
        preprocess(Failing(one()), None, tmp_path / "out", tokenizer=TOKENIZER)
    with pytest.raises(UserError, match=r"Silent, unit 'first': None stands where an iterator of documents belongs"):
        preprocess(Silent(), None, tmp_path / "out", tokenizer=TOKENIZER)
    with pytest.raises(UserError, match=r"Silent, unit 'first': None stands where an iterator of documents belongs"):
        preprocess(Silent(), None, tmp_path / "out", tokenizer=TOKENIZER, limit=1)


def test_groups_may_be_numbers_and_strings(tmp_path: Path) -> None:
    """Zero is a number as any other: its documents are held out, or not, together."""
    groups = [0, 0, "0", 1, "b", *range(2, 40)]
    given = Given(*(Document((Text(f"text {at}"),), f"{at:03}", {"group": group}) for at, group in enumerate(groups)))
    out, held = tmp_path / "out", tmp_path / "held"
    preprocess(given, None, out, tokenizer=TOKENIZER, held_out=held, held_out_fraction=0.5)
    corpora = [open_corpus(folder) for folder in (out, held)]
    sides = [{corpus.name(at) for at in range(len(corpus))} for corpus in corpora]
    assert all(sides)
    assert sides[0] | sides[1] >= {f"{at:03}" for at in range(len(groups))}
    assert sum(not side.isdisjoint({"000", "001", "002"}) for side in sides) == 1


def test_a_kind_that_is_none_is_refused_before_anything_of_it_is_written(tmp_path: Path) -> None:
    output = tmp_path / "out"
    kinds = "; the kinds are matched, natural, pairs, captions, or None"
    for limit in None, 4:
        with pytest.raises(UserError, match=rf"\.Given gives the document 'the third' the kind 'Pairs'{kinds}"):
            preprocess(Given(one(kind="Pairs")), None, output, tokenizer=TOKENIZER, limit=limit)
    importer = Given()
    importer.kind = "images"  # as a class's default
    with pytest.raises(UserError, match=rf"\.Given gives the document 'sound 0' the kind 'images'{kinds}"):
        preprocess(importer, None, output, tokenizer=TOKENIZER)
    preprocess(Given(one(kind="pairs")), None, output, tokenizer=TOKENIZER)
    assert open_corpus(output).kinds == ("natural", "pairs")


@pytest.mark.parametrize("signature", [b"abc", Path("abc")])
def test_a_signature_is_what_a_manifest_can_hold(signature: Any, tmp_path: Path) -> None:
    importer = Given()
    importer.change = signature
    with pytest.raises(UserError, match=re.escape(f".Given is {signature!r}, which the recipe in a manifest")):
        preprocess(importer, None, tmp_path / "out", tokenizer=TOKENIZER)
    assert not (tmp_path / "out").exists()


def test_units_may_come_one_by_one(tmp_path: Path) -> None:
    found = preprocess(Given(one()), None, tmp_path / "out", tokenizer=TOKENIZER, task_bytes=1)
    assert found.counts["documents"] == 3
