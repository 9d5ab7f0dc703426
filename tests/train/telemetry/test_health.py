"""Health of features against closed forms, and what is said of features that collapse."""

from __future__ import annotations

import math

import pytest
import torch

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


@pytest.mark.parametrize(
    ("replicas", "sizes"),
    [
        (1, [256]),
        (3, [86, 85, 85]),
        (192, [2] * 64 + [1] * 128),
        (256, [1] * 256),
        (512, [1] * 256 + [0] * 256),
    ],
)
def test_a_sample_has_at_most_256_pairs_of_all_replicas(replicas: int, sizes: list[int]) -> None:
    assert NUM_PAIRS == 256
    sample = FeatureSample([500] * replicas, Axis(None, 0, replicas))
    assert sample.sizes == sizes
    few = FeatureSample([1] * replicas, Axis(None, 0, replicas))
    assert few.sizes == [min(1, size) for size in sizes]
