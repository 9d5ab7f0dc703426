"""Whether image latents and context features collapse: closed forms on a sample of pairs, in float64. And the bounds
from which a run says so, as of attention logits.

Shape legend: n pairs, D numbers of a feature. Z [n, D] are latents, or contexts, as the model gives them; x_i and y_i
their rows at unit length.

    effective rank    exp(-sum_k p_k ln p_k), p_k = s_k / sum_j s_j, s_k the singular values of the rows at unit length
                      (RankMe, Garrido et al. 2023, arXiv 2210.02885, eq. 1, without its epsilon); 1 to min(n, D)
    std               sqrt(mean_j var_j), var_j the variance of number j over the pairs
    spread            std / sqrt(mean z^2): 0 where all rows are the same, 1 where their mean is 0
    dead features     share of the numbers j with sqrt(var_j) <= 0.01 sqrt(mean z^2)
    alignment         mean_i |x_i - y_i|^2                           (Wang & Isola 2020, arXiv 2005.10242, section 4.1)
    uniformity        ln mean_(i != j) exp(-2 |x_i - x_j|^2), of latents      (the same, t = 2); 0 where all meet
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

DEAD = 0.01
"""a number of a feature is dead whose standard deviation is below this part of the features' root mean square"""
FEWEST = 16
"""pairs from which a crossed bound is said: of fewer any of these may be small by chance"""
NAMES = (
    *(
        f"{kind}_{name}"
        for kind in ("latent", "context")
        for name in ("effective_rank", "std", "spread", "dead_features")
    ),
    "alignment",
    "uniformity",
)


class Bound(NamedTuple):
    """Where a number says that something has collapsed."""

    value: float
    below: bool
    """it is crossed below the value; else above it"""
    what: str

    def is_crossed(self, value: float) -> bool:
        """Whether a value is on the wrong side; what is not finite is."""
        return not math.isfinite(value) or (value < self.value if self.below else value > self.value)

    def told(self, value: float) -> str:
        """The value with three digits, or as many more as show on which side of the bound it is."""
        texts = (f"{value:.{digits}g}" for digits in range(3, 18))  # 17 say every float64
        return next(text for text in texts if self.is_crossed(float(text)) == self.is_crossed(value))


BOUNDS = {
    f"{kind}_{name}": Bound(bound.value, bound.below, f"{features} {bound.what}")
    for kind, features in (("latent", "the image latents"), ("context", "the context features"))
    for name, bound in {
        "effective_rank": Bound(2.0, True, "lie along one direction"),
        "spread": Bound(0.05, True, "are nearly the same for all inputs"),
        "dead_features": Bound(0.5, False, "do not vary in half of their numbers"),
    }.items()
}
BOUNDS |= {
    f"max_attention_logit/{part}": Bound(1000.0, False, f"attention logits of {what} are very large")
    for part, what in (("vision", "the vision encoder"), ("pool", "the pool"), ("language", "the language model"))
}
BOUNDS["uniformity"] = Bound(-0.01, False, "the image latents point in nearly the same direction")
"""An effective rank of 2 is that of two directions of equal weight; a spread of 0.05 is a mean cosine of 0.9975 between
two features.

Uniformity is at least -4 (1 - mean cosine), by Jensen's inequality: -0.01 is the same mean cosine. Unlike the
spread it does not depend on lengths. Alignment has no bound: it is small where the model is good, and also where all
features are one and the same; and the softmax of the contrast is the same whatever is added to all cosines, so that it
need not be below the 2 of unrelated features. Attention logits above 1000 were seen with Muon before loss spikes (Kimi
K2, arXiv 2507.20534, section 2.1)."""


def measure(latents: torch.Tensor, contexts: torch.Tensor) -> dict[str, float]:
    """All of it, by the names of `NAMES`, of n pairs [n, D] each; nothing of fewer than two."""
    if len(latents) < 2:
        return {}
    found: dict[str, float] = {}
    x, y = (F.normalize(features.double(), dim=1) for features in (latents, contexts))
    gram = x @ x.t()
    for kind, features, similarity in (("latent", latents, gram), ("context", contexts, y @ y.t())):
        square = features.double().square().mean()
        variances = features.double().var(0, unbiased=False)
        std = variances.mean().sqrt()
        found[f"{kind}_effective_rank"] = effective_rank(similarity)
        found[f"{kind}_std"] = float(std)
        found[f"{kind}_spread"] = float(std / square.sqrt()) if square > 0 else 0.0
        found[f"{kind}_dead_features"] = float((variances.sqrt() <= DEAD * square.sqrt()).double().mean())
    found["alignment"] = float((x - y).square().sum(1).mean())
    found["uniformity"] = uniformity(gram)
    return found


def effective_rank(gram: torch.Tensor) -> float:
    """RankMe of rows whose products with each other are [n, n]: its eigenvalues are their singular values squared."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if not values.sum() > 0:
        return 1.0
    p = values / values.sum()
    return math.exp(-float(torch.xlogy(p, p).sum()))


def uniformity(gram: torch.Tensor) -> float:
    """Of n > 1 rows of unit length, whose products with each other are [n, n]: |x - y|^2 = 2 - 2 x.y."""
    above = gram[tuple(torch.triu_indices(len(gram), len(gram), 1))]
    return float((4 * above - 4).logsumexp(0)) - math.log(len(above))


class HealthWatch:
    """Says when a bound is crossed, and when it no longer is."""

    def __init__(self) -> None:
        self._crossed: set[str] = set()

    def look(self, numbers: Mapping[str, float], num_pairs: int) -> list[tuple[str, str]]:
        """What there is to say of a step: the metric's name and a line. num_pairs: of the sample."""
        said = []
        for name, bound in BOUNDS.items():
            if name not in numbers or (name in NAMES and num_pairs < FEWEST):
                continue
            crossed, told = bound.is_crossed(numbers[name]), bound.told(numbers[name])
            if crossed and name not in self._crossed:
                side = "below" if bound.below else "above"
                said.append((name, f"{bound.what}: {name} {told} is {side} {bound.value:g} (docs/metrics.md)"))
            elif not crossed and name in self._crossed:
                said.append((name, f"{name} {told} is within its bound again"))
            (self._crossed.add if crossed else self._crossed.discard)(name)
        return said
