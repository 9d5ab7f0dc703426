"""Means and 95 % intervals over seeds, by Student's t distribution, as Markdown and JSON.

With n seeds the interval is mean ± t(0.975, n - 1) · s / √n, s the standard deviation with n - 1; t is 4.30 for n = 3.
It says how far other seeds would move the mean, nothing of other pictures or other documents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from megatron_lcl.claim.measure import Measure
from megatron_lcl.data.corpus.files import replace_text

CONFIDENCE = 0.95
UNTRAINED = "untrained"
_SHOWN = {
    "accuracy",
    "accuracy, top 5",
    "text → image recall@1",
    "text → image recall@5",
    "image → context recall@10",
    "context → image recall@10",
    "image in document recall@1",
    "bits a token",
}
"""metrics of the Markdown; the JSON has all"""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half: float | None
    """of the interval's width; None of one seed"""
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        n = len(values)
        half = None
        if n > 1:
            half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n)
        return cls(fmean(values), half, tuple(values))

    def reaches(self, value: float) -> bool:
        """Whether the interval, which has no upper end here, has the value in it."""
        return self.mean - (self.half or 0.0) <= value


@dataclass(frozen=True)
class Trained:
    """A row, trained and measured, seed by seed."""

    name: str
    about: str
    measures: Sequence[Sequence[Measure]]
    """of each seed"""
    facts: Mapping[str, Any]
    """how it was trained; empty: it was not"""
    beside: str | None = None
    """row whose numbers are subtracted from its own, if it is not the first one"""


def table(rows: Sequence[Trained], seeds: Sequence[int]) -> dict[str, Any]:
    """All numbers, as they stand in the JSON file. Others are compared with the first row, or with `Trained.beside`."""
    by_row = {row.name: [{m.key: m for m in of_seed} for of_seed in row.measures] for row in rows}
    keys = dict.fromkeys(m.key for row in rows for of_seed in row.measures for m in of_seed)
    beside = {row.name: row.beside or rows[0].name for row in rows[1:] if row.name != UNTRAINED}
    lines = []
    for key in keys:
        found = {
            name: [of_seed[key] for of_seed in of_row]
            for name, of_row in by_row.items()
            if all(key in of_seed for of_seed in of_row)
        }
        first = next(iter(found.values()))[0]
        estimates = {name: Estimate.of([m.value for m in measures]) for name, measures in found.items()}
        lines.append(
            {
                "data": key[0],
                "task": key[1],
                "metric": key[2],
                "chance": first.chance,
                "items": first.items,
                "rows": {name: asdict(estimate) for name, estimate in estimates.items()},
                "at chance": [
                    name for name, e in estimates.items() if first.chance is not None and e.reaches(first.chance)
                ],
                "not above untrained": [
                    name
                    for name, e in estimates.items()
                    if first.chance is not None and UNTRAINED in estimates and e.reaches(estimates[UNTRAINED].mean)
                ],
                "differences": {
                    name: asdict(
                        Estimate.of([a.value - b.value for a, b in zip(found[name], found[other], strict=True)])
                    )
                    for name, other in beside.items()
                    if name in found and other in found
                },
            }
        )
    return {
        "seeds": list(seeds),
        "interval": f"mean ± t({(1 + CONFIDENCE) / 2:g}, {len(seeds) - 1}) · s / √{len(seeds)}"
        if len(seeds) > 1
        else None,
        "rows": [{"name": row.name, "about": row.about, **row.facts} for row in rows],
        "beside": beside,
        "measures": lines,
    }


def markdown(title: str, numbers: Mapping[str, Any]) -> str:
    """The table to read."""
    rows, seeds = numbers["rows"], numbers["seeds"]
    names, beside = [row["name"] for row in rows], numbers["beside"]
    said = [f"# {title}", "", _said(seeds), "", *_facts(rows), "", "## What the frozen encoders reach", ""]
    shown = [line for line in numbers["measures"] if line["metric"] in _SHOWN]
    said += _grid(
        ["", "chance", *names],
        [
            [
                _what(line),
                "" if line["chance"] is None else _number(line, line["chance"]),
                *(_cell(line, line["rows"].get(name), _marks(line, name)) for name in names),
            ]
            for line in shown
        ],
    )
    if beside:
        said += ["", "## Differences, seed by seed", ""]
        said += ["**Bold**: 0 is not in the interval. No correction is made for there being many numbers.", ""]
        said += _grid(
            ["", *(f"{name} − {other}" for name, other in beside.items())],
            [
                [_what(line), *(_difference(line, line["differences"].get(name)) for name in beside)]
                for line in shown
                if line["differences"]
            ],
        )
    return "\n".join(said) + "\n"


def write(title: str, numbers: Mapping[str, Any], output: Path) -> None:
    """`output`.json and `output`.md."""
    replace_text(output.with_suffix(".json"), json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    replace_text(output.with_suffix(".md"), markdown(title, numbers))


def _said(seeds: Sequence[int]) -> str:
    n = len(seeds)
    if n < 2:
        return f"One seed ({seeds[0]}), so there are no intervals."
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return (
        f"Seeds {', '.join(map(str, seeds))}. Mean ± half of the 95 % interval over n = {n} seeds, by Student's t "
        f"distribution (t = {t:.2f}). ○: the interval does not lie above chance; △: it does not lie above the mean "
        "of the untrained encoder. Chance of a probe is the share of the most frequent class."
    )


def _facts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines, first = [], rows[0]
    for row in rows:
        if "lr" not in row:
            lines.append([row["name"], row["about"], *[""] * (5 + len(_SPANS))])
            continue
        tried = ", ".join(f"{rate}: {accuracy:.1%}" for rate, accuracy in row["tried"].items())
        lr = f"{row['lr']:g}" + (" (at the edge of what was tried)" if row["at the edge"] else "")
        lines.append(
            [
                *(row["name"], row["about"], lr, tried or "none", str(row["steps"])),
                *(_span(row[k]) for k in _SPANS),
                f"{fmean(row['TFLOP']) / fmean(first['TFLOP']):.3f}",
                ", ".join("not" if steps is None else str(steps) for steps in row["steps to the same loss"]),
            ]
        )
    header = ["", "minimizes", "learning rate", "tried: validation accuracy", "steps", *_SPANS]
    header += [f"TFLOP / {first['name']}'s", f"steps to {first['name']}'s last loss, by seed"]
    return _grid(header, lines)


_SPANS = ("images seen", "images in the contrast", "TFLOP", "minutes")


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def _what(line: Mapping[str, Any]) -> str:
    return f"{line['data']}: {line['task']}, {line['metric']} ({line['items']:,})"


def _number(line: Mapping[str, Any], value: float, digits: int = 1) -> str:
    return f"{value:.3f}" if line["metric"] == "bits a token" else f"{100 * value:.{digits}f} %"


def _marks(line: Mapping[str, Any], name: str) -> str:
    below = name != UNTRAINED and name in line["not above untrained"]
    return " ○" * (name in line["at chance"]) + " △" * below


def _cell(line: Mapping[str, Any], estimate: Mapping[str, Any] | None, mark: str = "") -> str:
    if estimate is None:
        return ""
    if estimate["half"] is None:
        return _number(line, estimate["mean"], 2) + mark
    mean = _number(line, estimate["mean"], 2).removesuffix(" %")
    return f"{mean} ± {_number(line, estimate['half'], 2)}{mark}"


def _difference(line: Mapping[str, Any], estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return ""
    text = _cell(line, estimate)
    text = text if text.startswith("-") else f"+{text}"
    is_clear = estimate["half"] is not None and abs(estimate["mean"]) > estimate["half"]
    return f"**{text}**" if is_clear else text
