"""Health of features against closed forms, and what is said of features that collapse."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_lcl.objectives.base import GlobalCounts
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.telemetry import health
from megatron_lcl.train.telemetry.features import NUM_PAIRS, FeatureSample


def test_the_effective_rank_of_known_singular_values() -> None:
    """exp of the entropy: k equal ones have rank k, and weights p have exp(-sum p ln p)."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 8, generator=draw, dtype=torch.float64))[0] for n in (40, 12))
    for singular in ([3.0] * 5 + [0.0] * 3, [4.0, 2.0, 1.0, 1.0, 0, 0, 0, 0]):
        rows = left @ torch.diag(torch.tensor(singular, dtype=torch.float64)) @ right.t()
        p = [s / sum(singular) for s in singular if s]
        expected = math.exp(-sum(x * math.log(x) for x in p))
        assert health.effective_rank(rows @ rows.t()) == pytest.approx(expected, rel=1e-5)
        assert health.effective_rank(rows.t() @ rows) == pytest.approx(expected, rel=1e-5)
    assert health.effective_rank(torch.zeros(3, 3, dtype=torch.float64)) == 1.0


def test_two_points_and_their_opposites() -> None:
    """Two rows at a right angle, their contexts at 60 degrees from them: every number by hand."""
    latents = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    contexts = torch.tensor([[1.0, 0.0, math.sqrt(3)], [0.0, 1.0, math.sqrt(3)]])
    found = health.measure(latents, contexts)
    assert set(found) == set(health.NAMES)
    assert found["latent_effective_rank"] == pytest.approx(2.0)
    assert found["latent_std"] == pytest.approx(math.sqrt(2 / 3))  # variances 1, 1, 0
    assert found["latent_spread"] == pytest.approx(math.sqrt(2 / 3) / math.sqrt(8 / 6))
    assert found["latent_dead_features"] == pytest.approx(1 / 3)
    assert found["context_dead_features"] == pytest.approx(1 / 3)
    assert found["alignment"] == pytest.approx(2 - 2 * math.cos(math.pi / 3))
    assert found["uniformity"] == pytest.approx(-2 * 2)  # |x - y|² = 2
    # cosine of the contexts: 3/4, so singular values of their rows are sqrt(1 ± 3/4)
    a, b = math.sqrt(1.75), math.sqrt(0.25)
    p, q = a / (a + b), b / (a + b)
    assert found["context_effective_rank"] == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)))


def test_gaussian_features_are_healthy_and_copies_are_not() -> None:
    draw = torch.Generator().manual_seed(1)
    good = torch.randn(64, 32, generator=draw)
    one = torch.randn(1, 32, generator=draw).expand(64, 32) + 1e-3 * torch.randn(64, 32, generator=draw)
    watch = health.HealthWatch()
    assert watch.look(health.measure(good, good), 64) == []
    said = dict(watch.look(health.measure(one, good), 64))
    assert set(said) == {"latent_effective_rank", "latent_spread", "latent_dead_features", "uniformity"}
    assert said["latent_spread"].startswith("the image latents are nearly the same for all inputs: latent_spread 0.00")
    assert watch.look(health.measure(one, good), 64) == [], "said once"
    again = dict(watch.look(health.measure(good, one), 64))
    assert "within its bound again" in again["latent_spread"]
    assert {name for name in again if name.startswith("context")} == {
        "context_effective_rank",
        "context_spread",
        "context_dead_features",
    }
    for few, tells in ((15, False), (16, True)):
        said = dict(health.HealthWatch().look(health.measure(one[:few], one[:few]), few))
        assert ("latent_spread" in said) == bool(said) == tells, few
    assert health.measure(one[:1], one[:1]) == {}


def test_a_value_is_said_on_its_side_of_the_bound() -> None:
    watch = health.HealthWatch()
    for name, crossed, told, within in (
        ("latent_effective_rank", 1.9977, "1.998 is below 2", 2.0004),
        ("context_dead_features", 0.50001, "0.50001 is above 0.5", 0.5),
        ("latent_spread", math.nan, "nan is below 0.05", 0.0623),
    ):
        ((_, said),) = watch.look({name: crossed}, 64)
        assert f"{name} {told} (" in said
        assert watch.look({name: within}, 64) == [(name, f"{name} {within:.3g} is within its bound again")]


def test_uniformity_tells_one_direction_of_many_lengths() -> None:
    """Neither the spread nor the rank does. And the values of unrelated features, as docs/metrics.md has them."""
    draw = torch.Generator().manual_seed(2)
    direction, noise = torch.ones(512), torch.randn(256, 512, generator=draw)
    lengths = torch.rand(256, 1, generator=draw) + 0.1
    found = health.measure(lengths * (direction + 0.04 * noise), noise)
    assert found["latent_spread"] > 0.3
    assert set(dict(health.HealthWatch().look(found, 256))) == {"uniformity"}
    x, y = torch.randn(2, 256, 512, generator=draw, dtype=torch.float64)
    found = health.measure(x, y)
    assert found["uniformity"] == pytest.approx(-4 + 8 / 512, abs=1e-3)
    assert found["alignment"] == pytest.approx(2, abs=0.02)
    near = health.measure(direction + 0.05 * noise, noise)  # a mean cosine of 1 / (1 + 0.05²)
    assert near["uniformity"] == pytest.approx(-4 * (1 - 1 / 1.0025), rel=0.01)


def test_features_that_are_exactly_alike_are_dead() -> None:
    found = health.measure(torch.ones(20, 4), torch.zeros(20, 4))
    assert found["latent_dead_features"] == found["context_dead_features"] == 1.0
    assert found["latent_effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert (found["latent_spread"], found["context_spread"]) == (0.0, 0.0)


@pytest.mark.parametrize("replicas", [1, 3, 192, 512])
def test_a_sample_has_at_most_256_pairs_of_all_replicas(replicas: int) -> None:
    assert NUM_PAIRS == 256
    assert sum(FeatureSample(counts_of([500] * replicas), Axis(None, 0, replicas)).sizes) == 256
    few = FeatureSample(counts_of([0] + [1] * (replicas - 1)), Axis(None, 0, replicas)).sizes
    assert few[0] == 0
    assert sum(few) == min(256, replicas - 1)
    assert max(few) <= 1


PACKS, SLOTS = 64, 24


def counts_of(pairs: list[int], num_tokens: int = 0) -> GlobalCounts:
    return GlobalCounts({"num_pairs": sum(pairs), "num_tokens": num_tokens}, pairs)


def packs_with_the_large_document_first(draw: np.random.Generator, alike: bool = False) -> list[SimpleNamespace]:
    """Of a step. Two images of a large document, then 4 to 18 of small ones, or 14 if all packs are to have as many,
    in slots of which others are empty."""
    packs = []
    for pack in range(PACKS):
        number = 2 + (14 if alike else int(draw.integers(4, 19)))
        used = np.sort(draw.permutation(SLOTS)[:number])
        soi = torch.full((SLOTS,), -1, dtype=torch.int32)
        soi[used] = torch.arange(number, dtype=torch.int32)
        latents = torch.full((SLOTS, 2), torch.nan)  # of no pair
        latents[used, 0] = (torch.arange(number) < 2).float()
        latents[used, 1] = float(pack)
        contexts = latents * SLOTS + torch.arange(SLOTS)[:, None]
        packs.append(SimpleNamespace(image_soi=soi, num_pairs=number, latents=latents, contexts=contexts))
    return packs


def drawn(packs: list[SimpleNamespace], replicas: int, num_tokens: int) -> torch.Tensor:
    """What all replicas give, whose micro-batches are of one pack each."""
    of_replica = [packs[rank::replicas] for rank in range(replicas)]
    counts = counts_of([sum(pack.num_pairs for pack in own) for own in of_replica], num_tokens)
    samples = [FeatureSample(counts, Axis(None, rank, replicas)) for rank in range(replicas)]
    assert all(sample.sizes == samples[0].sizes for sample in samples), "each knows what the others give"
    for sample, own in zip(samples, of_replica, strict=True):
        for pack in own:
            sample.take(pack, pack)  # type: ignore[arg-type]
    return torch.cat([sample.gather(2, torch.device("cpu")) for sample in samples])


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("replicas", [1, 4, 64])
def test_a_sample_is_of_all_documents_and_packs_alike(replicas: int, alike: bool) -> None:
    """Its share of large documents, and the mean number of its pairs' packs, are those of all pairs within the
    sampling error of draws without replacement, n s^2 (N - n) / (N - 1): on whatever number of replicas."""
    draw, away, variance = np.random.default_rng(3), torch.zeros(2), torch.zeros(2)
    for step in range(24):
        packs = packs_with_the_large_document_first(draw, alike)
        everyone = torch.cat([pack.latents[pack.image_soi >= 0] for pack in packs])
        sample, n = drawn(packs, replicas, num_tokens=step), NUM_PAIRS
        assert len(sample) == n < len(everyone)
        latents, slots = sample[:, :2], sample[:, 2:] - sample[:, :2] * SLOTS
        assert (slots[:, 0] == slots[:, 1]).all(), "a context is that of the latent beside it"
        assert len({*map(tuple, torch.stack([latents[:, 1], slots[:, 0]], 1).tolist())}) == n, "a pair is drawn once"
        away += latents.sum(0) - n * everyone.mean(0)
        variance += n * everyone.var(0, unbiased=False) * (len(everyone) - n) / (len(everyone) - 1)
    assert (away.abs() < 5 * variance.sqrt()).all(), (away, variance.sqrt())


def test_each_step_draws_anew() -> None:
    """Also where it has as many pairs as the step before."""
    packs = packs_with_the_large_document_first(np.random.default_rng(4))
    first, again, other = (drawn(packs, 4, num_tokens) for num_tokens in (1, 1, 2))
    assert torch.equal(first, again)
    both = {*map(tuple, first.tolist())} & {*map(tuple, other.tolist())}
    assert len(both) < NUM_PAIRS / 2
