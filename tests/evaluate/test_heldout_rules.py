"""The rules by which held-out documents are read: those of their version, and what they leave of documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data.corpora import Piece, jpeg, write_corpus

from megatron_lcl import LCL, open_corpus
from megatron_lcl.config import Config, Data, Language, Model, Vision
from megatron_lcl.data.loading.source import VERSION as SOURCE_VERSION
from megatron_lcl.data.loading.source import rules_of_kinds
from megatron_lcl.evaluate import heldout_packs
from megatron_lcl.evaluate.heldout import evaluate_heldout
from megatron_lcl.evaluate.heldout_results import Example, HeldOut
from megatron_lcl.evaluate.rules import VERSION, heldout_rules

TINY = Model(Vision(16, 8, 32, 1, 2, 64), Language(48, 517, 32, 1, 2, 64), 2)
"""four patches an image; 48 tokens a sequence"""


def measured(folder: Path, documents: list[list[Piece]]) -> tuple[HeldOut, list[Example]]:
    write_corpus(folder / "corpus", documents)
    config = Config(TINY, Data(workers=0, cache=str(folder / "cache")))
    return evaluate_heldout(LCL(TINY, seed=3), config, folder / "corpus", num_examples=99, progress=False)


@pytest.mark.parametrize(
    ("context", "sequences", "images"), [(48, "documents", 7), (9, "documents", 1), (8, "pairs", 1)]
)
def test_the_rules_are_those_of_their_version(context: int, sequences: str, images: int) -> None:
    """Numbers of other rules cannot be compared: whoever changes one raises the version."""
    expected: dict[str, Any] = {
        "version": 3,
        "sequences": sequences,
        "sequence_tokens": context,
        "sequence_images": images,
        "cut": "between segments; an image takes the end of the text before it along",
        "candidates": "distinct images, by their bytes; distinct contexts, by what the model reads before the image",
        "right": "every image and context that stand together in a pair",
        "min_similarity": 0.24,
        "max_images_per_segment": 1,
        "max_images": 6,
        "min_images": 1,
        "image_first": 0.0,
        "pair_layout": "document",
        "contrast_leading_images": False,
        "seed": 0,
    }
    model = replace(TINY, language=replace(TINY.language, context_length=context))
    assert heldout_rules(model) == expected
    assert VERSION == 3
    first, last = (rules_of_kinds(Data(), 4, 48, 7, carry_text=True, version=v) for v in (1, SOURCE_VERSION))
    assert first == last, "no later rule of training is one of the evaluation"


def test_what_selection_leaves_of_matched_documents(tmp_path: Path) -> None:
    images = [jpeg(n) for n in range(18)]
    of_one_text: list[Piece] = [[1, 2], *((image, 0.5, 0) for image in images[:4])]  # one image is left
    of_two: list[Piece] = [[3], [4], (images[4], 0.3, 0), (images[5], 0.3, 0), (images[6], 0.3, 1)]  # two
    unlike: list[Piece] = [[5], [6], (images[7], 0.23, 0), (images[8], 0.25, 1)]  # the second
    skipped: list[Piece] = [[7], (images[9], 0.1, 0)]  # none, and so no document
    many: list[Piece] = [*([8 + n] for n in range(8)), *((images[10 + n], 0.9, n) for n in range(8))]  # the first six
    result, examples = measured(tmp_path, [of_one_text, of_two, unlike, skipped, many])
    assert (result.documents, result.images, result.pairs) == (4, 10, 10)
    found = sorted(example.pair.document for example in examples)
    assert found == [0, 1, 1, 2, *[4] * 6]


def test_an_image_that_begins_a_sequence_has_the_end_of_its_text(tmp_path: Path) -> None:
    """A sequence has 46 places beside its ends, an image takes six of them, and the second one has 44 tokens of 90."""
    text = list(range(30, 120))
    result, (example,) = measured(tmp_path, [[text, (jpeg(0), None, None)]])
    assert (result.documents, result.images, result.pairs) == (1, 1, 1)
    tokenizer = open_corpus(tmp_path / "corpus").tokenizer
    assert example.pair.context == tokenizer.decode(text[-40:]) != tokenizer.decode(text[-39:])


def test_a_long_context_is_shown_by_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout_packs, "CONTEXT_CHARACTERS", 20)
    text = list(range(30, 70))
    _, (example,) = measured(tmp_path, [[text, (jpeg(0), None, None)]])
    whole = open_corpus(tmp_path / "corpus").tokenizer.decode(text)
    assert example.pair.context == whole[-20:] != whole
