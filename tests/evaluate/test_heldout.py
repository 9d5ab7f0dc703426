"""Retrieval numbers against a brute-force count and closed forms."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl.evaluate.heldout import ranks, recall


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_ranks_equal_a_count(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(0, 5, (n, n), generator=generator).float()  # small integers: many ties
    ours = ranks(similarity)
    for i in range(n):
        better_or_equal = sum(1 for j in range(n) if j != i and similarity[i, j] >= similarity[i, i])
        assert ours[i] == 1 + better_or_equal


def test_recall_of_perfect_reversed_and_constant_similarities() -> None:
    n = 20
    assert recall(ranks(torch.eye(n)), 1) == 1.0
    assert recall(ranks(-torch.eye(n)), 10) == 0.0
    assert recall(ranks(torch.zeros(n, n)), 10) == 0.0  # a model that says nothing must not look good
    assert recall(ranks(torch.zeros(n, n)), n) == 1.0


def test_recall_of_random_similarities_is_chance() -> None:
    n = 2000
    places = ranks(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))
    assert abs(recall(places, 100) - 100 / n) < 0.015
