"""Ranks of retrieval and losses of the contrast, against counts one by one and closed forms."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl.evaluate import retrieval
from megatron_lcl.evaluate.retrieval import best_ranks, contrast_losses, retrieval_ranks
from megatron_lcl.evaluate.zero_shot import by_texts


def recall(similarity: torch.Tensor, k: int) -> float:
    """Share of queries [N] whose own answer is among the first k."""
    n = len(similarity)
    return float((best_ranks(similarity, torch.eye(n), np.stack([np.arange(n)] * 2, 1)) < k).double().mean())


@mock.patch.object(retrieval, "_ROWS", 7)  # three blocks
@given(st.integers(1, 20), st.integers(0, 10_000), st.integers(1, 3))
def test_ranks_equal_a_count(n: int, seed: int, num_groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(0, 5, (n, n), generator=generator).float()  # small integers: many ties
    groups, numbers = torch.randint(num_groups, (2, n), generator=generator).numpy()
    right = {
        inside: np.argwhere((numbers[:, None] == numbers) & ((groups[:, None] == groups) | (not inside)))
        for inside in (False, True)
    }
    found = [
        best_ranks(similarity, torch.eye(n), pairs, (groups, groups) if inside else None).tolist()
        for inside, pairs in right.items()
    ]
    for i in range(n):
        for inside, ranks in zip((False, True), found, strict=True):
            candidates = [j for j in range(n) if groups[j] == groups[i] or not inside]
            best = max(similarity[i, j] for j in candidates if numbers[j] == numbers[i])
            assert ranks[i] == sum(1 for j in candidates if numbers[j] != numbers[i] and similarity[i, j] >= best)


@mock.patch.object(retrieval, "_ROWS", 7)
@given(st.integers(1, 20), st.integers(0, 10_000), st.data())
def test_losses_equal_a_count(n: int, seed: int, data: st.DataObject) -> None:
    """Of all queries, or of those from some place on that a replica has."""
    generator, offset = torch.Generator().manual_seed(seed), data.draw(st.integers(0, n - 1))
    similarity = torch.randint(0, 5, (n, n), generator=generator).float()
    found = contrast_losses(similarity[offset:], torch.eye(n), offset, 0.5).tolist()
    for i, nats in zip(range(offset, n), found, strict=True):
        loss = -math.log(math.exp(0.5 * similarity[i, i]) / sum(math.exp(0.5 * s) for s in similarity[i]))
        assert nats == pytest.approx(loss, abs=1e-5)


def test_recall_of_perfect_reversed_constant_and_broken_similarities() -> None:
    n = 20
    assert recall(torch.eye(n), 1) == 1.0
    assert recall(-torch.eye(n), 10) == 0.0
    assert recall(torch.zeros(n, n), 10) == 0.0  # a model that says nothing must not look good
    assert recall(torch.full((n, n), math.nan), 10) == 0.0
    assert recall(torch.zeros(n, n), n) == 1.0


def test_rounding_decides_no_rank() -> None:
    """Images that occur twice are encoded in other batches: their similarities differ by what is rounded there."""
    candidates = F.normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    twice = torch.cat([candidates, candidates])
    noise = F.normalize(twice + 1e-8 * torch.randn(80, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    queries = F.normalize(torch.randn(80, 64, generator=torch.Generator().manual_seed(2)), dim=1)
    exact = (queries.double() @ twice.double().T - (queries.double() * twice.double()).sum(1, keepdim=True)) > -1e-12
    assert by_texts(noise, queries.numpy(), np.arange(80)).rank.tolist() == (exact.sum(1) - 1).tolist()
    pairs = np.stack([np.arange(80)] * 2, 1)
    assert retrieval_ranks(queries, noise, pairs)[0].tolist() == (exact.sum(1) - 1).tolist()


def test_recall_of_random_similarities_is_chance() -> None:
    n = 2000
    similarity = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    assert abs(recall(similarity, 100) - 100 / n) < 0.015
