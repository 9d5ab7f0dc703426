"""Images of retrieval examples are those that were evaluated, or none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from data.corpora import Piece, jpeg, write_corpus

from megatron_lcl import LCL, open_corpus
from megatron_lcl.config import Config, Data, Language, Model, Vision
from megatron_lcl.data.corpus.tokenizer import ClipTokenizer
from megatron_lcl.data.loading.images import thumbnail
from megatron_lcl.evaluate.heldout import evaluate_heldout
from megatron_lcl.evaluate.heldout_results import write_heldout
from megatron_lcl.report.page import write_report
from megatron_lcl.report.retrieval import MAX_THUMBNAIL
from megatron_lcl.run_folder import EXAMPLES, HELDOUT

TEXTS = (
    "A mill by the river.",
    "Two herons, früh am Morgen 🌅, stand in it. " * 4,
    "A bridge",
    "of stone and then some.",
)
CHANGED = "The corpus that is now at "


def documents(images: Sequence[int], texts: Sequence[str] = TEXTS) -> list[list[Piece]]:
    """Of a document each: several images, texts after one another, one longer than a sequence."""
    encode, (a, b, c, d) = ClipTokenizer([]).encode, texts
    i = [(jpeg(number), None, None) for number in images]
    return [[encode(a), i[0], encode(c), encode(d), i[1]], [encode(b), i[2], encode(a), i[3]], [encode(d), i[4]]]


@pytest.fixture
def evaluated(run: Path) -> Path:
    """A run with an evaluation on its folder `heldout`."""
    write_corpus(run / "heldout", documents(range(5)), 2)
    model = Model(Vision(16, 8, 32, 1, 2, 64), Language(48, 517, 32, 1, 2, 64), 2)
    config = Config(model, Data(workers=0, cache=str(run / "cache")))
    found = evaluate_heldout(LCL(model, seed=3), config, run / "heldout", num_examples=99, progress=False)
    write_heldout(run, *found)
    return run


def of_an_earlier_version(run: Path) -> None:
    numbers = json.loads((run / HELDOUT).read_text())
    del numbers["fingerprint"]
    (run / HELDOUT).write_text(json.dumps(numbers))


def shown(run: Path) -> tuple[list[str], int, bool]:
    """The images, how many examples have none, and whether the page says that the corpus is another one."""
    page = write_report(run).read_text()
    images = re.findall(r'<img src="([^"]*)" alt="held-out image', page)
    return images, page.count("(the corpus is not here)"), f"{CHANGED}{run / 'heldout'} is not the one" in page


@pytest.mark.parametrize("has_fingerprint", [True, False])
def test_images_are_those_that_were_evaluated(evaluated: Path, has_fingerprint: bool) -> None:
    """Also of files of earlier versions, where the corpus has the contexts that they have."""
    assert (
        json.loads((evaluated / HELDOUT).read_text())["fingerprint"] == open_corpus(evaluated / "heldout").fingerprint
    )
    if not has_fingerprint:
        of_an_earlier_version(evaluated)
    images, without, is_other = shown(evaluated)
    assert sorted(images) == sorted(thumbnail(jpeg(n), MAX_THUMBNAIL) for n in range(5))
    assert (without, is_other) == (0, False)
    shutil.rmtree(evaluated / "heldout")
    assert shown(evaluated) == ([], 5, False)


OTHERS = {
    "fewer documents": documents(range(5))[:1],
    "other texts": documents(range(5), [text[::-1] for text in TEXTS]),
    "other order": documents(range(5))[::-1],
    "an image less": [[*documents(range(5))[0][:-1]], *documents(range(5))[1:]],
    "no texts": [[piece for piece in document if isinstance(piece, tuple)] for document in documents(range(5))],
}


@pytest.mark.parametrize("has_fingerprint", [True, False])
@pytest.mark.parametrize("others", OTHERS)
def test_no_image_of_another_corpus_is_shown(evaluated: Path, others: str, has_fingerprint: bool) -> None:
    if not has_fingerprint:
        of_an_earlier_version(evaluated)
    shutil.rmtree(evaluated / "heldout")
    write_corpus(evaluated / "heldout", OTHERS[others], min(2, len(OTHERS[others])))
    assert shown(evaluated) == ([], 5, True)


def change_examples(run: Path, document: int, **pair: str) -> int:
    """Leave those of a document, with these keys; returns how many."""
    examples = [e for e in json.loads((run / EXAMPLES).read_text()) if e["pair"]["document"] == document]
    (run / EXAMPLES).write_text(json.dumps([{**e, "pair": {**e["pair"], **pair}} for e in examples]))
    return len(examples)


def test_images_of_other_shards_are_not_shown(evaluated: Path) -> None:
    """Of files of earlier versions, which have the numbers of images in shards."""
    of_an_earlier_version(evaluated)
    num = change_examples(evaluated, document=2)
    assert shown(evaluated) == ([thumbnail(jpeg(4), MAX_THUMBNAIL)] * num, 0, False)
    shutil.rmtree(evaluated / "heldout")
    write_corpus(evaluated / "heldout", documents(range(5)), 3)
    assert shown(evaluated) == ([], num, True)


def test_all_texts_of_a_context_have_to_be_there(evaluated: Path) -> None:
    of_an_earlier_version(evaluated)
    num = change_examples(evaluated, document=1)
    shutil.rmtree(evaluated / "heldout")
    write_corpus(evaluated / "heldout", documents(range(5), ("A weir in the brook.", *TEXTS[1:])), 2)
    assert shown(evaluated) == ([], num, True)


def test_a_context_without_a_character_proves_nothing(evaluated: Path) -> None:
    of_an_earlier_version(evaluated)
    num = change_examples(evaluated, document=2, context="\ufffd\n")
    assert shown(evaluated) == ([], num, True)


def test_images_alone_may_be_others(evaluated: Path) -> None:
    """Which only the fingerprint tells."""
    shutil.rmtree(evaluated / "heldout")
    write_corpus(evaluated / "heldout", documents(range(5, 10)), 2)
    assert shown(evaluated) == ([], 5, True)


def test_a_corpus_that_has_lost_files_is_not_there(evaluated: Path) -> None:
    for file in (evaluated / "heldout").glob("images-*.bin"):
        file.unlink()
    assert shown(evaluated) == ([], 5, False)
    assert json.loads((evaluated / EXAMPLES).read_text())
    shutil.rmtree(evaluated / "heldout")
    (evaluated / "heldout").symlink_to("heldout")  # an error of the system
    assert shown(evaluated) == ([], 5, False)
