"""One self-contained page about several runs: curves, those that differ in the seed alone as one band; final numbers.

What a run's folder has is all that is read: its config, metrics.jsonl, and what a held-out evaluation wrote there.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_lcl import config as configs
from megatron_lcl import fields
from megatron_lcl.convert.find import run_of
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.heldout_results import RESULT
from megatron_lcl.report.page import REPORT
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.telemetry import read_metrics

TEMPLATE = "runs.html"
SEEDS = ("train.seed", "data.seed")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#555555")
"""Okabe and Ito's, which people with any color vision tell apart"""
STYLES = ("-", "--", ":", "-.")
"""of lines, when the colors are used up"""
_NO_MATTER = re.compile(r"train\.(output|progress|seed)|data\.(workers|cache|cache_gb|seed)|(checkpoint|guard)\..*")
CURVES = {
    "loss": "loss that is minimized",
    "generation": "generation loss (nats a token)",
    "contrastive": "contrastive loss (nats)",
    "image_accuracy": "accuracy of the contrast in the batch",
    "regression": "regression loss",
    "latent_spread": "spread of the latents (0: all the same)",
    "heldout/image_to_context_recall_at_10": "held-out recall@10, image to context",
    "heldout/bits_per_token": "held-out bits a token",
}
"""what is drawn, by its name in metrics.jsonl, where a run has it and it is not always 0"""
FINAL = {
    "loss": "loss",
    "generation": "generation",
    "contrastive": "contrastive",
    "regression": "regression",
    "latent_spread": "latent spread",
    "heldout/image_to_context_recall_at_1": "held-out recall@1",
    "heldout/image_to_context_recall_at_10": "held-out recall@10",
    "heldout/median_rank": "held-out median rank",
    "heldout/bits_per_token": "held-out bits a token",
}
"""columns of the table"""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    settings: Mapping[str, Any]
    """its config, by dotted name"""
    lines: Sequence[Mapping[str, Any]]
    """of metrics.jsonl"""

    @classmethod
    def of(cls, folder: Path) -> Run:
        """UserError where it is no run folder, or its files are damaged."""
        settings = fields.flat(configs.to_dict(configs.load(folder / CONFIG)))
        return cls(folder, settings, read_metrics(folder))

    @property
    def steps(self) -> int:
        """Steps that it has made and written of."""
        return max((line["step"] for line in self.lines), default=0)

    def series(self, name: str) -> dict[int, float]:
        """A metric by step; empty where the run does not measure it: it is absent, or 0 in every line."""
        values = {line["step"]: float(line[name]) for line in self.lines if line.get(name) is not None}
        return values if any(values.values()) else {}

    @cached_property
    def final(self) -> Mapping[str, float]:
        """The last value of each metric of the table."""
        return {name: series[max(series)] for name in FINAL if (series := self._with_result(name))}

    def _with_result(self, name: str) -> dict[int, float]:
        """The series; of a held-out number what `evaluate` has written into the folder counts as the last."""
        series, path = self.series(name), self.folder / RESULT
        if name.startswith("heldout/") and path.is_file():
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}); `megatron-lcl evaluate` writes it") from None
            value, step = result.get(name.removeprefix("heldout/")), result.get("step")
            if isinstance(value, int | float) and (step is None or step >= max(series, default=0)):
                series = {**series, step or self.steps: float(value)}
        return series


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    runs: Sequence[Run]
    color: str
    style: str
    shown: Mapping[str, Any]
    """the settings in which groups differ"""

    @property
    def label(self) -> str:
        return ", ".join(f"{_short(key, self.shown)} {_text(value)}" for key, value in self.shown.items()) or "all"

    def band(self, name: str) -> list[tuple[int, float, float, float]]:
        """Step, mean, least and largest value of a metric, at the steps of which all runs that have it have one."""
        series = [found for run in self.runs if (found := run.series(name))]
        steps = sorted(set.intersection(*map(set, series))) if series else []
        return [(step, fmean(v := [s[step] for s in series]), min(v), max(v)) for step in steps]

    def cell(self, name: str) -> str:
        """The last values of a metric: `mean (least to largest)`."""
        values = [run.final[name] for run in self.runs if name in run.final]
        if not values:
            return ""
        mean = f"{fmean(values):.4g}"
        return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders among these and directly inside of them. UserError where one of them has none."""
    found: dict[Path, None] = {}
    for path in paths:
        try:
            inside = [run_of(path)]
        except UserError:
            inside = sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
        if not inside:
            raise UserError(f"{path} is neither a run folder, which has a {CONFIG}, nor a folder of such")
        found |= dict.fromkeys(inside)
    return list(found)


def write_runs_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page about the runs in some folders, sweeps or single runs; returns its path.

    output: default: report.html in the folder that all are in. UserError where there is no run.
    """
    runs = [Run.of(folder) for folder in find_runs(paths)]
    if output is None:
        at = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.absolute().parent for path in paths]))
        output = at / REPORT
    groups = group(runs)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("megatron_lcl.report", "."), autoescape=True)
    keys = list(groups[0].shown)
    page = environment.get_template(TEMPLATE).render(
        title=", ".join(str(path) for path in paths[:3]) + (" …" if len(paths) > 3 else ""),
        groups=groups,
        keys=[(key, _short(key, groups[0].shown)) for key in keys],
        text=_text,
        curves=_curves(groups),
        final=[(name, title) for name, title in FINAL.items() if any(g.cell(name) for g in groups)],
        seeds=max(len(g.runs) for g in groups),
        seed_keys=[k for k in SEEDS if len({run.settings[k] for run in runs}) > 1],
        runs=runs,
        link=_link(output),
    )
    replace_text(output, page)
    return output


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs by their settings, seeds and what changes no result left out; in the order of what differs."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        kept = {key: value for key, value in run.settings.items() if not _NO_MATTER.fullmatch(key)}
        by_settings.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    groups = list(by_settings.values())
    keys = dict.fromkeys(key for run in runs for key in run.settings if not _NO_MATTER.fullmatch(key))
    differing = [key for key in keys if len({_text(of_one[0].settings.get(key)) for of_one in groups}) > 1]
    groups.sort(key=lambda of_one: [_order(of_one[0].settings.get(key)) for key in differing])
    return [
        Group(
            of_one,
            COLORS[number % len(COLORS)],
            STYLES[number // len(COLORS) % len(STYLES)],
            {key: of_one[0].settings.get(key) for key in differing},
        )
        for number, of_one in enumerate(groups)
    ]


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers before other values, by their size."""
    is_number = isinstance(value, int | float)
    return not is_number, float(value) if is_number else 0.0, _text(value)


def _link(output: Path) -> Callable[[Run], str | None]:
    """The run's own report, as seen from the page; None where there is none."""

    def link(run: Run) -> str | None:
        page = run.folder / REPORT
        return os.path.relpath(page, output.parent) if page.is_file() else None

    return link


def _short(key: str, among: Mapping[str, Any]) -> str:
    """The last part of a setting's name (of `objective.name` the first), where no other has the same."""
    last = [k.removesuffix(".name").rsplit(".", 1)[-1] for k in among]
    own = key.removesuffix(".name").rsplit(".", 1)[-1]
    return own if last.count(own) == 1 else key


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    return str(value)


def _curves(groups: Sequence[Group]) -> Markup:
    """All metrics that any run has, over steps, as inline SVG: a line for each group, and a band where it has seeds."""
    bands = {name: [group.band(name) for group in groups] for name in CURVES}
    drawn = [name for name, of_groups in bands.items() if any(len(band) > 1 for band in of_groups)]
    if not drawn:
        return Markup("")
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.3 * columns, 3.0 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(drawn) :]:
        axis.remove()
    for axis, name in zip(axes.flat, drawn, strict=False):
        for group, band in zip(groups, bands[name], strict=True):
            if band:
                steps, mean, low, high = zip(*band, strict=True)
                marker = "." if len(steps) < 12 else ""
                axis.plot(steps, mean, color=group.color, linestyle=group.style, linewidth=1.4, marker=marker)
                axis.fill_between(steps, low, high, color=group.color, alpha=0.18, linewidth=0)
        axis.set_title(CURVES[name], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "megatron_lcl"}):  # the same page from the same runs
        figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])
