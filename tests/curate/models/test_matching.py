"""Protects the matching of images to texts: the best assignment, of the encoder's own similarities."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from curate.corpora_of_rules import computing_in_one_thread
from data.corpora import jpeg, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl.curate.documents import Range
from megatron_lcl.curate.models.matching import assign, matching_facts
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.load import load_encoder


@settings(max_examples=60)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 10_000))
def test_no_other_assignment_has_a_larger_sum(images: int, texts: int, seed: int) -> None:
    """And what is left over goes to its likest text: scripts/compute_assignments.py of allenai/mmc4, by trying all."""
    similarity = np.random.default_rng(seed).normal(size=(images, texts))
    few, many = sorted((images, texts))
    choices = (enumerate(choice) for choice in itertools.permutations(range(many), few))
    pairs = [[(k, m) if images <= texts else (m, k) for k, m in choice] for choice in choices]
    best = dict(max(pairs, key=lambda chosen: sum(similarity[pair] for pair in chosen)))
    expected = [best.get(k, max(range(texts), key=similarity[k].__getitem__, default=-1)) for k in range(images)]
    assert assign(similarity).tolist() == expected


def test_an_image_gives_way_where_the_sum_is_larger() -> None:
    assert assign(np.array([[0.9, 0.8], [0.85, 0.1]])).tolist() == [1, 0]
    assert assign(np.array([[0.3, 0.2], [0.5, 0.3], [0.1, 0.25]])).tolist() == [0, 0, 1]


def test_images_of_a_corpus_are_matched_by_the_encoder(encoder: tuple[str, str], tmp_path: Path) -> None:
    ids = [[10, 11, 12], [20, 21], [30, 31, 32, 33]]
    pictures = [jpeg(k) for k in range(4)]
    documents = [
        [ids[0], (pictures[0], None, None), ids[1], (b"no image", None, None), (pictures[1], None, None)],
        [(pictures[2], None, None), (pictures[3], None, None), ids[2]],
        [(pictures[0], None, None)],
        [ids[1]],
    ]
    corpus = write_corpus(tmp_path / "corpus", documents)
    with computing_in_one_thread():
        whole = matching_facts(corpus, Range(0, 0, 0, 4, 0), *encoder)
    parts = [matching_facts(corpus, Range(0, 0, first, first + 1, 0), *encoder) for first in range(4)]
    for name, values in whole.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))
    assert whole["document"].tolist() == [0, 0, 0, 1, 1, 2]
    assert whole["item"].tolist() == [1, 3, 4, 0, 1, 0]
    assert sorted(whole["matched_text"][:3].tolist()) == [-1, 0, 1]
    assert whole["matched_text"][1] == -1  # does not decode
    assert whole["matched_text"][3:5].tolist() == [0, 0]  # two images, one text
    assert whole["matched_text"][5] == -1  # no text
    assert (np.isnan(whole["similarity"]) == (whole["matched_text"] < 0)).all()
    model = load_encoder(*encoder)
    texts = model.encode_texts([corpus[0].texts[k].text for k in range(2)])
    for k, picture in ((0, pictures[0]), (2, pictures[1])):
        image = model.encode(model.prepare(picture)[None]).pooled[0]
        expected = torch.cosine_similarity(image, texts[whole["matched_text"][k]], dim=0)
        assert whole["similarity"][k] == pytest.approx(float(expected), abs=1e-5)


def test_an_encoder_without_texts_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    corpus = write_corpus(tmp_path / "corpus", [[[1, 2], (jpeg(0), None, None)]])
    with pytest.raises(UserError, match="no text encoder"):
        matching_facts(corpus, Range(0, 0, 0, 1, 0), "timm:test_vit?pretrained=no")
