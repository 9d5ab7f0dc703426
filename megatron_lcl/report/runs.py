"""One self-contained page about several runs: curves, those that differ in the seed alone as one band; final numbers.

What a run's folder has is all that is read: its config, metrics.jsonl, audit.jsonl, and what a held-out evaluation
wrote there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_lcl import config as configs
from megatron_lcl.config.results import NO_RESULT
from megatron_lcl.convert.find import is_run, run_of
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.rules import called
from megatron_lcl.filesystem import is_dir, is_file, matching
from megatron_lcl.report.charts import NUM_STYLES, Line, chart, swatch
from megatron_lcl.report.curves import CHANCE_OF, FOLDED, Spec, figure, specs_for
from megatron_lcl.report.events import numbers
from megatron_lcl.report.files import read_json
from megatron_lcl.report.page import AREA, REPORT, settings_of, template, text_of
from megatron_lcl.report.page import link as link_to
from megatron_lcl.report.series import Metrics
from megatron_lcl.run_folder import CONFIG, HELDOUT
from megatron_lcl.units import plain

TEMPLATE = "runs.html"
RULES = "held-out rules"
"""beside the settings: what held-out numbers of the same model depend on, too"""
NOT_EVALUATED = "not evaluated"
SEEDS = ("train.seed", "data.seed")
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
    "labeled/knn_accuracy": "k-NN accuracy",
    "labeled/zero_shot_accuracy": "zero-shot accuracy",
    "labeled/zero_shot_accuracy_top_5": "zero-shot, top 5",
    "labeled/zero_shot_mean_per_class_recall": "zero-shot, mean of the classes",
}
"""columns of the table"""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    settings: Mapping[str, Any]
    """its config, by dotted name"""
    metrics: Metrics

    @classmethod
    def of(cls, folder: Path, metrics: Metrics | None = None) -> Run:
        """metrics: those read so far. UserError where it is no run folder, or its config is damaged."""
        return cls(folder, settings_of(configs.load(folder / CONFIG)), metrics or Metrics.of(folder))

    @property
    def steps(self) -> int:
        """Steps that it has made and written of."""
        return self.metrics.last_step

    @property
    def incidents(self) -> str:
        """What happened beside steps, counted."""
        return numbers({k: events for k, events in self.metrics.events.items() if k not in ("phase", "weights")})

    @property
    def final(self) -> Mapping[str, float]:
        """The last value of each metric of the table."""
        return {name: value for name in FINAL if (value := self.last(name)) is not None}

    @property
    def rules(self) -> str:
        """By which versions of their rules its held-out numbers were measured, in order; NOT_EVALUATED: it has none."""
        return called(self.metrics.rules_with(read_json(self.folder / HELDOUT))) or NOT_EVALUATED

    def last(self, name: str) -> float | None:
        """A metric's last value; of a held-out number what `evaluate` wrote into the folder counts as the last."""
        found = self.metrics.series.get(name)
        last, last_step = (None, 0) if found is None else (found.last, found.last_step)
        if name.startswith("heldout/") and (result := read_json(self.folder / HELDOUT)) is not None:
            value, step = result.get(name.removeprefix("heldout/")), result.get("step")
            if isinstance(value, int | float) and (step is None or step >= last_step):
                last = float(value)
        return last


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    runs: Sequence[Run]
    number: int
    """by which it has its color"""
    shown: Mapping[str, Any]
    """the settings in which groups differ"""

    @property
    def label(self) -> str:
        return ", ".join(f"{_short(key, self.shown)} {text_of(value)}" for key, value in self.shown.items()) or "all"

    @property
    def ends(self) -> str:
        """How far its runs have come, where not all as far: `2 to step 30, 1 to step 9`."""
        counts = Counter(run.steps for run in self.runs)
        ends = sorted(counts.items(), reverse=True)
        return ", ".join(f"{number} to step {step:,}" for step, number in ends) if len(ends) > 1 else ""

    def band(self, name: str) -> list[tuple[int, float, float, float, int]]:
        """Step, mean, least and largest value of a metric, and of how many runs, where each run that has come so far
        and has the metric at all has a value.

        Of long runs: over stretches of steps, by the middle of each.
        """
        found = [(run.steps, s) for run in self.runs if (s := run.metrics.series.get(name)) and s.num_values]
        width = max((series.width for _, series in found), default=1)
        of_runs = []  # the last stretch that it has come to, and by stretch
        for steps, series in found:
            points = series.points(width)
            rows = zip(points.first, points.final, points.mean, points.low, points.high, strict=True)
            of_runs.append((steps // width, {row[0] // width: row for row in rows if np.isfinite(row[2])}))
        band = []
        for stretch in sorted({stretch for _, of_one in of_runs for stretch in of_one}):
            there = [of_one for last, of_one in of_runs if last >= stretch]
            if all(stretch in of_one for of_one in there):
                first, final, means, lows, highs = zip(*(of_one[stretch] for of_one in there), strict=True)
                middle = int((min(first) + max(final)) / 2)
                band.append((middle, float(fmean(means)), float(min(lows)), float(max(highs)), len(there)))
        return band

    def cell(self, name: str) -> list[str]:
        """The last values of a metric: their mean, then `(least to largest)` and of how many runs, where not of all,
        and of a share what chance has; empty where no run has it."""
        values = self._last(name)
        if not values:
            return []
        more = [_range(name, values)] if len(values) > 1 else []
        more += [f"{len(values)} of {len(self.runs)} runs"] if len(values) < len(self.runs) else []
        chances = self._last(*CHANCE_OF.get(name, ()))
        same = len(set(chances)) == 1
        return [
            final_text(name, fmean(values)),
            *([f"({'; '.join(more)})"] if more else []),
            *([f"chance {final_text(name, chances[0]) if same else _range(name, chances)}"] if chances else []),
        ]

    def _last(self, *names: str) -> list[float]:
        """Of each run that has one of these metrics, the last value of the first that it has."""
        found = ([value for name in names if (value := run.last(name)) is not None] for run in self.runs)
        return [values[0] for values in found if values]


_PERCENT = "\u00a0%"
"""on the line of its number"""


def final_text(name: str, value: float) -> str:
    """A metric's value in the table; of a share in percent."""
    return f"{plain(100 * value)}{_PERCENT}" if name in CHANCE_OF else plain(value)


def _range(name: str, values: Sequence[float]) -> str:
    return f"{final_text(name, min(values)).removesuffix(_PERCENT)} to {final_text(name, max(values))}"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders among these and directly inside of them. UserError where one of them has none."""
    found: dict[Path, None] = {}
    for path in paths:
        try:
            inside = [run_of(path)]
        except UserError:
            inside = [*filter(is_run, matching(path, "*"))]
        if not inside:
            raise UserError(f"{path} is neither a run folder, which train.output names, nor a folder of such")
        found |= dict.fromkeys(inside)
    return list(found)


def left_out(paths: Sequence[Path]) -> Iterator[Path]:
    """The folders of runs, no runs themselves, that lie directly in a folder of runs, and are not on its page but where
    they are among the paths."""
    given = set(map(os.path.abspath, paths))
    for path in paths:
        inside = [folder for folder in matching(path, "*") if is_dir(folder)] if is_dir(path) else []
        others = [folder for folder in inside if not is_run(folder)]
        if len(others) < len(inside) and not is_run(path):
            for folder in others:
                if os.path.abspath(folder) not in given and any(map(is_run, matching(folder, "*"))):
                    yield folder


def write_runs_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page about the runs in some folders, sweeps or single runs; returns its path.

    output: default: report.html in the folder that all are in. UserError where there is no run.
    """
    if output is None:
        at = paths[0] if len(paths) == 1 else _shared_folder(paths)
        output = at / REPORT
    replace_text(output, RunsPage(paths).render(output.parent))
    return output


class RunsPage:
    """The page about several runs, which may still be growing."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """UserError where there is no run."""
        self.paths = paths
        self._metrics = {folder: Metrics.of(folder) for folder in find_runs(paths)}

    def changed(self) -> bool:
        """Whether any run has written anything since the last call, which is taken in, or has begun."""
        known = self._metrics
        self._metrics = {folder: known.get(folder) or Metrics.of(folder) for folder in find_runs(self.paths)}
        read = [metrics.read() for metrics in self._metrics.values()]  # of all of them
        return any(read) or known.keys() != self._metrics.keys()

    def render(self, folder: Path | None = None, live: bool = False) -> str:
        """The page; as `page.RunPage.render`."""
        # configs anew: a run that goes on may have written its own again
        runs = [Run.of(folder, metrics) for folder, metrics in self._metrics.items()]
        groups = group(runs)
        return template(TEMPLATE).render(
            live=live,
            area=AREA,
            title=", ".join(str(path) for path in self.paths[:3]) + (" …" if len(self.paths) > 3 else ""),
            groups=groups,
            keys=[(key, _short(key, groups[0].shown)) for key in groups[0].shown],
            text=text_of,
            swatch=swatch,
            styles=NUM_STYLES,
            curves=list(_curves(groups)),
            folded=FOLDED,
            final_text=final_text,
            final=[(name, title) for name, title in FINAL.items() if any(g.cell(name) for g in groups)],
            seeds=max(len(g.runs) for g in groups),
            seed_keys=[k for k in SEEDS if len({run.settings[k] for run in runs}) > 1],
            runs=runs,
            called=_called([run.folder for run in runs]),
            with_incidents=any(run.incidents for run in runs),
            link=_link(folder),
        )


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs by their settings, seeds and what changes no result left out, and by the rules of their held-out
    numbers; in the order of what differs."""
    by_settings: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        kept = {key: value for key, value in run.settings.items() if _is_compared(key)}
        same = by_settings.setdefault(json.dumps(kept, sort_keys=True, default=str), {})
        same.setdefault(run.rules, []).append(run)
    for same in by_settings.values():
        if len(same) > 1 and NOT_EVALUATED in same:  # yet: it has nothing that would not fit
            more = same.pop(NOT_EVALUATED)
            max(same.values(), key=len).extend(more)
    groups = [
        (of_one, {**of_one[0].settings, RULES: rules})
        for same in by_settings.values()
        for rules, of_one in same.items()
    ]
    keys = dict.fromkeys(key for _, facts in groups for key in facts if _is_compared(key))
    differing = [key for key in keys if len({text_of(facts.get(key)) for _, facts in groups} - {NOT_EVALUATED}) > 1]
    groups.sort(key=lambda of_one: [_order(of_one[1].get(key)) for key in differing])
    return [
        Group(of_one, number, {key: facts.get(key) for key in differing})
        for number, (of_one, facts) in enumerate(groups)
    ]


def _is_compared(key: str) -> bool:
    return key not in SEEDS and not key.startswith(NO_RESULT)


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers before other values, by their size."""
    is_number = isinstance(value, int | float)
    return not is_number, float(value) if is_number else 0.0, text_of(value)


def _called(folders: Sequence[Path]) -> dict[Path, str]:
    """By folder its name, or its path below the folder that all are in where others have the same name."""
    numbers = Counter(folder.name for folder in folders)
    shared = _shared_folder(folders)
    return {f: f.name if numbers[f.name] == 1 else os.path.relpath(f, shared) for f in folders}


def _shared_folder(paths: Sequence[Path]) -> Path:
    """The innermost that all are in. Links are not followed."""
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths]))


def _link(folder: Path | None) -> Callable[[Run], str | None]:
    """The run's own report, as seen from the page's folder; None where there is none."""

    def link(run: Run) -> str | None:
        page = run.folder / REPORT
        return link_to(page, folder) if folder is not None and is_file(page) else None

    return link


def _short(key: str, among: Mapping[str, Any]) -> str:
    """The last part of a setting's name (of `objective.name` the first), where no other has the same."""
    last = [k.removesuffix(".name").rsplit(".", 1)[-1] for k in among]
    own = key.removesuffix(".name").rsplit(".", 1)[-1]
    return own if last.count(own) == 1 else key


def _curves(groups: Sequence[Group]) -> Iterator[tuple[str, list[Markup]]]:
    """By heading, a chart of each metric that any run has, and that is not 0 in all of them: a line for each group, a
    band where it has seeds, and what to compare with."""
    metrics = [run.metrics for group in groups for run in group.runs]
    names = dict.fromkeys(name for one in metrics for name, series in one.series.items() if not series.is_zero)
    last_step = max((one.last_step for one in metrics), default=0)
    for title, specs in specs_for(list(names)):
        figures = []
        for spec in specs:
            for n, name in enumerate(() if spec.is_id else spec.names):
                if name in names and not (name == "heldout/bits_per_token" and "generation" in spec.names):
                    heading = f"{spec.title}: {spec.labels[n]}" if len(spec.names) > 1 and spec.labels else spec.title
                    if name == "generation":
                        heading = spec.title
                    levels = list(_levels(groups, spec, name))
                    lines = [*_lines(groups, name, spec.factor(name)), *levels]
                    if drawn := chart(lines, last_step, label=heading):
                        entries = [(level.color, True, level.label) for level in levels]
                        figures.append(figure(heading, drawn, entries))
        if figures:
            yield title, figures


def _lines(groups: Sequence[Group], name: str, factor: float) -> Iterator[Line]:
    for of_one in groups:
        band = of_one.band(name)
        if len(band) > 1:
            step, mean, low, high, runs = np.array(band, np.float64).T
            mean, low, high = mean * factor, low * factor, high * factor
            # a mean of fewer runs is no going on of that of more: there is a gap where one has ended
            gaps = np.flatnonzero(np.diff(runs)) + 1
            mean, low, high = (np.insert(of, gaps, np.nan) for of in (mean, low, high))
            step = np.insert(step, gaps, step[gaps])
            yield Line(of_one.label, step, step, low, high, of_one.number, mean=mean)


def _levels(groups: Sequence[Group], spec: Spec, metric: str) -> Iterator[Line]:
    """What a chart's metric is compared with, where it is the same for all groups."""
    alone = [Group([run], 0, {}) for group in groups for run in group.runs]
    for name in CHANCE_OF.get(metric, ()):
        bands = [run.band(name) for run in alone if any(map(run.band, spec.names))]
        steps = sorted({step for band in bands for step, *_ in band})
        values = {value for band in bands for _, _, low, high, _ in band for value in (low, high)}
        if all(bands) and len(values) == 1 < len(steps):
            step, value = np.array(steps), np.full(len(steps), values.pop() * spec.factor(name))
            yield Line(spec.levels[name], step, step, value, value, quiet=True)
            return
