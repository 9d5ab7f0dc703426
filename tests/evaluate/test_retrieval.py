"""Ranks of held-out retrieval, against counts one by one and closed forms."""

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
from megatron_lcl.evaluate.retrieval import rank_own, retrieval_ranks
from megatron_lcl.evaluate.zero_shot import by_texts


def recall(ranks: torch.Tensor, k: int) -> float:
    """Share of ranks that are k or better."""
    return float((ranks <= k).double().mean())


@mock.patch.object(retrieval, "_ROWS", 7)  # three blocks
@given(st.integers(1, 20), st.integers(0, 10_000), st.integers(1, 3), st.data())
def test_ranks_equal_a_count(n: int, seed: int, num_groups: int, data: st.DataObject) -> None:
    """Of all queries, or of those from some place on that a replica has."""
    generator, offset = torch.Generator().manual_seed(seed), data.draw(st.integers(0, n - 1))
    similarity = torch.randint(0, 5, (n, n), generator=generator).float()  # small integers: many ties
    groups, numbers = torch.randint(num_groups, (2, n), generator=generator)
    by_group, by_number = (groups[offset:], groups), (numbers[offset:], numbers)
    own = similarity[offset:], torch.eye(n), offset, 0.5
    asked = [rank_own(*own, groups=g, same=s) for s in (None, by_number) for g in (None, by_group)]
    found, losses = (torch.stack(of_each, 1).tolist() for of_each in zip(*asked, strict=True))
    for i, ranks, nats in zip(range(offset, n), found, losses, strict=True):
        inside = [j for j in range(n) if groups[j] == groups[i]]
        expected = []
        for right in ([i], [j for j in range(n) if numbers[j] == numbers[i]]):
            for candidates in (range(n), inside):
                best = max(similarity[i, j] for j in candidates if j in right)
                expected.append(1 + sum(1 for j in candidates if j not in right and similarity[i, j] >= best))
        assert ranks == expected
        loss = -math.log(math.exp(0.5 * similarity[i, i]) / sum(math.exp(0.5 * s) for s in similarity[i]))
        assert nats == pytest.approx([loss] * 4, abs=1e-5)


def test_recall_of_perfect_reversed_constant_and_broken_similarities() -> None:
    n = 20

    def share(similarity: torch.Tensor, k: int) -> float:
        return recall(rank_own(similarity, torch.eye(n))[0], k)

    assert share(torch.eye(n), 1) == 1.0
    assert share(-torch.eye(n), 10) == 0.0
    assert share(torch.zeros(n, n), 10) == 0.0  # a model that says nothing must not look good
    assert share(torch.full((n, n), math.nan), 10) == 0.0
    assert share(torch.zeros(n, n), n) == 1.0


def test_rounding_decides_no_rank() -> None:
    """Images that occur twice are encoded in other batches: their similarities differ by what is rounded there."""
    candidates = F.normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    twice = torch.cat([candidates, candidates])
    noise = F.normalize(twice + 1e-8 * torch.randn(80, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    queries = F.normalize(torch.randn(80, 64, generator=torch.Generator().manual_seed(2)), dim=1)
    exact = (queries.double() @ twice.double().T - (queries.double() * twice.double()).sum(1, keepdim=True)) > -1e-12
    assert rank_own(queries, noise)[0].tolist() == exact.sum(1).tolist()
    assert by_texts(noise, queries.numpy(), np.arange(80)).rank.tolist() == (exact.sum(1) - 1).tolist()
    pairs = np.stack([np.arange(80)] * 2, 1)
    assert retrieval_ranks(queries, noise, pairs)[0].tolist() == (exact.sum(1) - 1).tolist()


def test_recall_of_random_similarities_is_chance() -> None:
    n = 2000
    similarity = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    assert abs(recall(rank_own(similarity, torch.eye(n))[0], 100) - 100 / n) < 0.015
