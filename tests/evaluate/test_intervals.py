"""Intervals of an evaluation's numbers: against closed forms and other libraries, and whether they cover the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lcl.evaluate.image_set import FileBlob, ImageSet
from megatron_lcl.evaluate.results import bootstrap, proportion
from megatron_lcl.evaluate.retrieval import retrieval


def test_bootstrap_against_scipy() -> None:
    scores = np.random.default_rng(1).random(300) ** 2
    ours = bootstrap(scores)
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.bootstrap(
        (scores,), np.mean, method="percentile", random_state=0, n_resamples=5000
    ).confidence_interval
    assert ours.value == pytest.approx(scores.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.004)
    assert ours.high == pytest.approx(theirs.high, abs=0.004)
    assert bootstrap(scores, seed=3) == bootstrap(scores, seed=3)


def wilson(hits: float, n: float) -> tuple[float, float]:
    """The two p that a share hits / n is 1.96 standard errors from: the roots of (p̂ - p)² = z² p (1 - p) / n."""
    z2 = pytest.importorskip("scipy.stats").norm.ppf(0.975) ** 2 / n
    share = hits / n
    low, high = sorted(np.roots([1 + z2, -2 * share - z2, share**2]).real)
    return low, high


def of_clusters(hits: float, n: float, clusters: int) -> tuple[float, float]:
    """The same with so many fewer items as Student's quantile is larger than the normal one, squared."""
    stats = pytest.importorskip("scipy.stats")
    fewer = (stats.norm.ppf(0.975) / stats.t.ppf(0.975, clusters - 1)) ** 2
    return wilson(fewer * hits, fewer * n)


@pytest.mark.parametrize(
    ("hits", "n", "known"), [(0, 158, (0, 0.0237)), (8, 10, (0.4902, 0.9433)), (5, 5, (0.5655, 1))]
)
def test_the_interval_of_independent_hits_is_wilsons(hits: int, n: int, known: tuple[float, float]) -> None:
    """Known values: statsmodels.stats.proportion.proportion_confint(hits, n, method="wilson")."""
    found = proportion(np.arange(n) < hits, chance=0.1)
    assert (found.value, found.chance) == (hits / n, 0.1)
    assert (found.low, found.high) == pytest.approx(known, abs=1e-4)
    assert (found.low, found.high) == pytest.approx(wilson(hits, n), abs=1e-9)
    each = proportion(np.arange(n) < hits, groups=np.random.default_rng(2).permutation(n))
    assert (each.low, each.value, each.high) == pytest.approx((found.low, found.value, found.high)), (
        "groups of one item"
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_groups", [0, 3])
def test_copies_within_clusters_say_nothing_more(share: float, num_groups: int) -> None:
    rng = np.random.default_rng(0)
    hits, groups = rng.random(60) < share, rng.integers(0, num_groups, 60) if num_groups else None
    for clusters in (np.arange(60), np.sort(rng.integers(0, 20, 60))):
        hits = np.where(rng.random(60) < 0.7, hits[clusters], hits)  # those of a cluster are alike
        expected = proportion(hits, groups=groups, clusters=clusters)
        of_groups = None if groups is None else np.repeat(groups, 7)
        found = proportion(np.repeat(hits, 7), groups=of_groups, clusters=np.repeat(clusters, 7))
        assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
        assert found.low < found.high


def test_clusters_that_agree_are_as_many_items() -> None:
    clusters = np.repeat(np.arange(40), 5)
    found = proportion(clusters < 10, clusters=clusters)
    assert (found.low, found.high) == pytest.approx(of_clusters(10, 40, 40))
    none = proportion(np.zeros(200), clusters=clusters)
    assert (none.low, none.high) == pytest.approx(of_clusters(0, 40, 40), abs=1e-12)
    one_each = proportion(np.arange(200) % 5 == 0, clusters=clusters)
    assert (one_each.low, one_each.high) == pytest.approx(of_clusters(8, 40, 40)), (
        "no more than there are, whatever the variance"
    )
    nearly = proportion((np.arange(200) % 5 == 0) | (np.arange(200) == 1), clusters=clusters)
    assert (nearly.low, nearly.high) == pytest.approx(of_clusters(41, 200, 40)), (
        "of a variance near 0 no more than there are"
    )
    halves = proportion(np.ones(101), groups=np.arange(101) < 1)
    assert halves.value == 1
    assert halves.low == pytest.approx(wilson(2**2 / 1.01, 2**2 / 1.01)[0]), "one of a class of one says little"


def test_intervals_cover_the_truth() -> None:
    """Of 95 % intervals 90 at least: of texts that share an image, and where one of n is a hit."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(80), 5)
    few = np.repeat(np.arange(4), 20)
    covered = {"clusters": 0, "items": 0, "few clusters": 0}
    for _ in range(300):
        hits = rng.random(400) < rng.beta(0.4, 0.6, 80)[image]
        hits_of_few = rng.random(80) < rng.beta(0.4, 0.6, 4)[few]
        for name, drawn, clusters in (
            ("clusters", hits, image),
            ("items", hits, None),
            ("few clusters", hits_of_few, few),
        ):
            found = proportion(drawn, clusters=clusters)
            covered[name] += found.low <= 0.4 <= found.high
    assert covered["clusters"] / 300 >= 0.9
    assert covered["few clusters"] / 300 >= 0.9
    assert covered["items"] / 300 < 0.8, "as with a bootstrap of items"
    n = 50
    shares = [proportion(np.arange(n) < k) for k in range(n + 1)]
    chances = pytest.importorskip("scipy.stats").binom.pmf(np.arange(n + 1), n, 1 / n)
    assert sum(c for c, found in zip(chances, shares, strict=True) if found.low <= 1 / n <= found.high) >= 0.9


def test_captions_of_an_image_are_one_cluster(tmp_path: Path) -> None:
    class Encoder:
        name = "half"

        def encode_texts(self, texts: list[str]) -> torch.Tensor:
            """Those of every second image are the image's own."""
            return torch.stack([torch.eye(12)[int(text) // 5] * (-1) ** (int(text) // 5) for text in texts])

    for i in range(12):
        (tmp_path / str(i)).write_text(str(i))
    images = tuple(FileBlob(tmp_path / str(i)) for i in range(12))
    data = ImageSet("x", images, captions=tuple(tuple(str(5 * i + k) for k in range(5)) for i in range(12)))
    found = retrieval(Encoder(), data, np.eye(12, dtype=np.float32)).metrics  # type: ignore[arg-type]
    for way, (low, high) in {"text → image": of_clusters(6, 12, 12), "image → text": wilson(6, 12)}.items():
        metric = found[f"{way} recall@1"]
        assert (metric.low, metric.value, metric.high) == pytest.approx((low, 0.5, high))
