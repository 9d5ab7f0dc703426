"""What an evaluation gives: numbers with 95 % intervals, as a table, JSON and a picture."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import stdtrit

from megatron_lcl.convert.card import Measured, is_hub_id
from megatron_lcl.data.corpus.files import replace_bytes, replace_text
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_file
from megatron_lcl.run_folder import RESULTS

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
RESAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """A mean over items, and its 95 % interval over other items (`proportion`, `bootstrap`)."""

    value: float
    low: float
    high: float
    chance: float | None = None
    """what guessing gives"""


@dataclass(frozen=True)
class Result:
    """One task's numbers for one encoder."""

    task: str
    encoder: str
    data: str
    num_items: int
    metrics: Mapping[str, Metric]
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    """of the encoder: its weights, configuration and preprocessing"""
    num_bad: int = 0
    """images that did not decode and are not among the items"""
    step: int | None = None
    """of the encoder, if it is a checkpoint of the run in whose folder the results are written; None: of another model,
    or an earlier version's result"""


def chance_of_hit(right: np.ndarray, total: np.ndarray | int, k: int) -> float:
    """Share of queries that a random order of `total` answers gives one of the right ones among the first k.

    right [Q]: how many are right; total: of all queries, or of each. 1 − C(total − right, k) / C(total, k), the mean
    over queries.
    """
    cases, counts = np.unique(np.stack(np.broadcast_arrays(right, total), 1), axis=0, return_counts=True)
    missed = [math.comb(n - r, min(k, n)) / math.comb(n, min(k, n)) for r, n in cases.tolist()]
    return 1 - float(np.average(missed, weights=counts))


def proportion(
    hits: np.ndarray,
    chance: float | None = None,
    groups: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
) -> Metric:
    """Mean of per-item scores [N] from 0 to 1, with Wilson's 95 % interval (1927) for the effective sample size.

    `groups` [N]: the mean is over groups of the groups' means (per-class recall), that is, of the items weighted by one
    over their group's size. `clusters` [N]: numbers of what was drawn as one, such as the texts of an image; None: each
    item by itself. The effective sample size (Korn & Graubard 1998) is p (1 - p) over the variance of the mean p, which
    is that of a ratio of sums over clusters; independent items of one weight have N. It is at most what the weights of
    the items give (Kish 1965: N of equal ones), and where the clusters do not differ, at 0 and 1 above all, what those
    of the clusters give: their number, if they have the same size. As k clusters say little of how they differ if they
    are few, it is multiplied by (z / t)², the quantiles of the normal and of Student's distribution with k - 1 degrees
    of freedom (Korn & Graubard: t of N - 1 items in place of z).
    """
    scores = np.asarray(hits, np.float64)
    weights, cluster = np.ones(len(scores)), np.arange(len(scores))
    if groups is not None:
        _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        weights = 1 / sizes[group]
    if clusters is not None:
        _, cluster = np.unique(clusters, return_inverse=True)
    p = float(np.average(scores, weights=weights))
    variance = (np.bincount(cluster, weights * (scores - p)) ** 2).sum() / weights.sum() ** 2
    most, of_clusters = (w.sum() ** 2 / (w**2).sum() for w in (weights, np.bincount(cluster, weights)))
    differ = variance > 1e-9 * p * (1 - p) / most  # or by rounding only
    size = min(p * (1 - p) / variance, most) if differ else of_clusters
    if clusters is not None and cluster.max() > 0:
        size *= (_Z / stdtrit(cluster.max(), (1 + CONFIDENCE) / 2)) ** 2
    low, high = _wilson(p, float(size))
    return Metric(p, low, high, chance)


def _wilson(p: float, n: float) -> tuple[float, float]:
    center, half = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low, high = ((center + side) / (1 + _Z**2 / n) for side in (-half, half))
    return min(max(low, 0.0), p), max(min(high, 1.0), p)  # at 0 and 1 but for rounding


def bootstrap(scores: np.ndarray, seed: int = 0) -> Metric:
    """Mean of per-item scores [N], with the percentile bootstrap's 95 % interval (Efron 1979)."""
    generator, scores = np.random.default_rng(seed), np.asarray(scores, np.float64)
    n = len(scores)
    means = [scores[generator.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Metric(float(scores.mean()), float(low), float(high))


def table(results: Sequence[Result]) -> str:
    """Lines of text, one a metric."""
    rows = [("task", "encoder", "metric", "value", "95 % interval", "chance", "items")]
    for result in results:
        for name, m in result.metrics.items():
            chance = "" if m.chance is None else f"{m.chance:.4f}"
            interval = f"{m.low:.4f} – {m.high:.4f}"
            items = f"{result.num_items} ({result.num_bad} bad skipped)" if result.num_bad else str(result.num_items)
            rows.append((result.task, result.encoder, name, f"{m.value:.4f}", interval, chance, items))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def write_json(results: Sequence[Result], path: str | Path) -> None:
    """All results, as a list of objects."""
    text = json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False)
    replace_text(Path(path), text + "\n")


def make_output(folder: Path) -> None:
    """The folder of results. UserError, to be had before the work, where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write results into {folder}: {error.strerror}; give another --output") from None


def read_measured(path: str | Path, fingerprint: str) -> list[Measured]:
    """What such a file says of the encoder with this fingerprint, for a model card. UserError if it is nothing.

    `FILE@ORG/NAME` also says the data's identifier on the Hub, for the card's model-index.
    """
    hub_data = ""
    if not is_file(Path(path)) and "@" in str(path):
        path, _, hub_data = str(path).rpartition("@")
    if hub_data and not is_hub_id(hub_data):
        raise UserError(f"{hub_data!r} is no identifier of a data set on the Hub, such as org/name")
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        found = [
            Measured(
                entry["task"],
                _short(entry["data"]),
                name,
                float(metric["value"]),
                (float(metric["low"]), float(metric["high"])),
                metric.get("chance"),
                f"{entry['num_items']:,} items",
                hub_data,
            )
            for entry in entries
            if entry["fingerprint"] == fingerprint
            for name, metric in entry["metrics"].items()
        ]
        others = sorted({str(entry["encoder"]) for entry in entries})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a {RESULTS} of `evaluate`: {type(error).__name__} {error}") from None
    if not found:
        raise UserError(f"{path} has no results of these weights; it has some of {', '.join(others) or 'nothing'}")
    return found


def _short(path: str) -> str:
    """A data set's name without the folders that it lies in, but for the split's."""
    parts = Path(path).parts
    return "/".join(parts[-2:] if parts[-1] in ("train", "val", "validation", "test") else parts[-1:])


def _end(name: str) -> str:
    """The last 32 characters of a name: of paths, that is what tells them apart."""
    return name if len(name) <= 32 else "…" + name[-31:]


def write_picture(results: Sequence[Result], path: str | Path) -> None:
    """A bar a metric with its interval, one panel a task, encoders side by side in colors of their own."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result.task for result in results))
    encoders = list(dict.fromkeys(result.encoder for result in results))
    heights = [sum(len(r.metrics) for r in results if r.task == task) for task in tasks]
    figure = Figure(figsize=(8, 1 + 0.5 * len(tasks) + 0.35 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    for panel, task in zip(panels, tasks, strict=True):
        bars = [(r.encoder, name, m) for r in results if r.task == task for name, m in r.metrics.items()]
        metrics = list(dict.fromkeys(name for _, name, _ in bars))
        bars.sort(key=lambda bar: metrics.index(bar[1]))  # what is compared stands together
        for y, (encoder, _, m) in enumerate(bars):
            color = f"C{encoders.index(encoder)}"
            panel.barh(y, m.value, color=color, xerr=[[max(m.value - m.low, 0)], [max(m.high - m.value, 0)]])
            panel.text(m.high, y, f"  {m.value:.3f}", va="center", fontsize=8)
            if m.chance is not None:
                panel.plot([m.chance, m.chance], [y - 0.4, y + 0.4], color="black", linestyle=":")
        panel.set_yticks(range(len(bars)), [f"{name}  {_end(encoder)}" for encoder, name, _ in bars], fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.15 * max([1e-6, *(m.high for *_, m in bars)]))  # room for the values
        chance = "  (dotted: chance)" if any(m.chance is not None for *_, m in bars) else ""
        panel.set_title(f"{task}{chance}", fontsize=10, loc="left")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    replace_bytes(Path(path), picture.getvalue())
