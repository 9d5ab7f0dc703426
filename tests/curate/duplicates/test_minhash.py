"""Protects MinHash: estimates are those of the Jaccard similarity, and bands find what the closed form says."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl.curate.duplicates.minhash import (
    candidate_probability,
    choose_bands,
    shingle_hashes,
    signature,
    word_hashes,
)

PERMUTATIONS = 4096


def sets_of(shared: int, only_one: int, only_other: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of random 64-bit numbers."""
    numbers = np.random.default_rng(seed).integers(0, 2**64, shared + only_one + only_other, np.uint64)
    return numbers[: shared + only_one], np.concatenate([numbers[:shared], numbers[shared + only_one :]])


def estimate(one: np.ndarray, other: np.ndarray, permutations: int = PERMUTATIONS) -> float:
    return float((signature(one, permutations) == signature(other, permutations)).mean())


@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 1000))
def test_the_estimate_is_the_jaccard_similarity(shared: int, one: int, other: int, seed: int) -> None:
    if not min(shared + one, shared + other):
        return
    exact = shared / (shared + one + other)
    error = np.sqrt(exact * (1 - exact) / PERMUTATIONS)
    assert abs(estimate(*sets_of(shared, one, other, seed)) - exact) <= 5 * error


def test_the_estimate_errs_as_little_as_datasketch() -> None:
    datasketch = pytest.importorskip("datasketch")
    ours, theirs = [], []
    for seed in range(200):
        one, other = sets_of(75, 12, 13, seed)
        ours.append(estimate(one, other, 112) - 0.75)
        sketches = [datasketch.MinHash(112, hashfunc=int) for _ in range(2)]
        for sketch, numbers in zip(sketches, (one, other), strict=True):
            sketch.update_batch([int(x) & 0xFFFFFFFF for x in numbers])
        theirs.append(sketches[0].jaccard(sketches[1]) - 0.75)
    expected = np.sqrt(0.75 * 0.25 / 112)
    for errors in (ours, theirs):
        assert np.std(errors) == pytest.approx(expected, rel=0.15)
        assert abs(np.mean(errors)) < 4 * expected / np.sqrt(len(errors))


def test_shingles_are_the_runs_of_words() -> None:
    def runs(text: str, size: int) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[k : k + size]) for k in range(max(1, len(words) - size + 1))}

    one = "The cat sat on the mat, and the cat sat on the mat; then it slept."
    other = "the CAT sat on the mat and then it slept all day"
    for size in (1, 2, 3, 5):
        ours = [set(shingle_hashes(word_hashes(text), size).tolist()) for text in (one, other)]
        exact = [runs(text, size) for text in (one, other)]
        assert [len(s) for s in ours] == [len(s) for s in exact]
        assert len(ours[0] & ours[1]) == len(exact[0] & exact[1])
    assert len(shingle_hashes(word_hashes("two words"), 5)) == 1
    assert len(shingle_hashes(word_hashes(" ,;- "), 5)) == 0
    assert shingle_hashes(word_hashes("a b"), 2) != shingle_hashes(word_hashes("b a"), 2)


@pytest.mark.parametrize("first", [0x0915, 0x0995])
def test_words_that_differ_in_their_vowel_signs_are_others(first: int) -> None:
    """Of Hindi and Bengali, all vowels of a text changed: no word of it is left."""
    letters = [chr(first + k) for k in range(5)]
    one, other = (
        set(shingle_hashes(word_hashes(" ".join(a + sign + b + sign for a in letters for b in letters)), 5).tolist())
        for sign in (chr(first + 0x29), chr(first + 0x2B))
    )
    assert len(one) == len(other) == 21
    assert not one & other


@pytest.mark.parametrize(
    "text", ["\u00c9t\u00e9 d\u00e9j\u00e0 pass\u00e9", "Vi\u1ec7t Nam l\u00e0", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5"]
)
def test_canonically_equivalent_texts_are_equal(text: str) -> None:
    decomposed = unicodedata.normalize("NFD", text)
    assert decomposed != text
    assert (word_hashes(decomposed) == word_hashes(text)).all()
    assert (word_hashes(decomposed.upper()) == word_hashes(text)).all()


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_what_the_closed_form_says(similarity: float) -> None:
    bands, rows = 14, 8
    found = []
    for seed in range(1000):
        shared = round(200 * similarity)
        one, other = (signature(s, bands * rows) for s in sets_of(shared, 100 - shared // 2, 100 - shared // 2, seed))
        found.append((one == other).reshape(bands, rows).all(1).any())
    expected = float(candidate_probability(similarity, bands, rows))
    assert expected == pytest.approx(1 - (1 - similarity**rows) ** bands, rel=1e-12)
    assert abs(np.mean(found) - expected) <= 4 * np.sqrt(max(expected * (1 - expected), 1e-3) / len(found))


@pytest.mark.parametrize(("threshold", "permutations"), [(0.5, 128), (0.75, 112), (0.8, 128), (0.9, 64)])
def test_bands_are_chosen_as_datasketch_does(threshold: float, permutations: int) -> None:
    lsh = pytest.importorskip("datasketch.lsh")
    bands, rows = choose_bands(threshold, permutations)
    theirs = lsh._optimal_param(threshold, permutations, 0.1, 0.9)

    def error(bands: int, rows: int) -> float:
        below, above = np.linspace(0, threshold, 2000), np.linspace(threshold, 1, 2000)
        missed = np.trapezoid(1 - candidate_probability(above, bands, rows), above)
        return float(0.1 * np.trapezoid(candidate_probability(below, bands, rows), below) + 0.9 * missed)

    assert bands * rows <= permutations
    assert error(bands, rows) <= error(*theirs) + 1e-4
