"""The numbers of a run by name, read as a stream: memory and what is drawn do not grow with the run's length.

A metric is kept in at most MAX_BUCKETS stretches of equal numbers of steps, each with its least, largest and mean
value, so that a spike of one step in a million is still drawn. When they no longer suffice, two become one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from megatron_lcl.evaluate.rules import FIRST_OF_LINE, NOT_COMPARABLE, OF_LINE, called, version_of_line
from megatron_lcl.report.events import Event, Events, Log, audited
from megatron_lcl.report.follow import ReadSoFar
from megatron_lcl.report.slowest import Slowest
from megatron_lcl.run_folder import METRICS
from megatron_lcl.train.resilience.audit import AUDIT
from megatron_lcl.train.telemetry.stragglers import over_ranks
from megatron_lcl.units import counted

MAX_BUCKETS = 400
"""stretches of a curve: more than a chart has pixels"""
MAX_METRICS = 400
"""names that are kept; a file with more is not of a run of ours"""
_PENDING = 4096
"""numbers that wait to be put into stretches"""
OF_PAIRS = (
    "contrastive",
    "image_accuracy",
    "text_accuracy",
    "positive_similarity",
    "hardest_negative_similarity",
    "mutual_information",
)
"""means over pairs, for which earlier versions wrote 0 where a step has none, or the objective has no contrast"""


class Points(NamedTuple):
    """A curve: stretches in order. NaN: steps that have nothing to measure the metric on."""

    first: np.ndarray
    """float64 [N] first step of each"""
    final: np.ndarray
    """float64 [N] last step"""
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray


class Series:
    """A metric over steps."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.last_step = 0
        self.is_zero = True
        """no value but 0"""
        self.num_values = 0
        self._width = 1
        self._kept = np.zeros((6, 0))
        self._pending: list[tuple[float, float]] = []

    def add(self, step: int, value: float | None) -> None:
        """The value after a step; None, or what is not finite: there is none."""
        if value is None or not math.isfinite(value):
            self._pending.append((step, math.nan))
        else:
            self._pending.append((step, value))
            self.last, self.last_step = value, step
            self.num_values += 1
            if value:
                self.is_zero = False
        if len(self._pending) >= _PENDING:
            self._flush()

    def points(self, width: int = 1) -> Points:
        """width: steps of a stretch at least, a power of two, so that several series have the same."""
        self._flush()
        kept = self._kept if width <= self._width else _joined(self._kept, width)
        first, final, low, high, total, count = kept
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(count > 0, total / count, np.nan)
        return Points(first, final, low, high, mean)

    @property
    def width(self) -> int:
        """Steps of a stretch."""
        self._flush()
        return self._width

    def _flush(self) -> None:
        if not self._pending:
            return
        steps, values = np.array(self._pending, np.float64).T
        self._pending = []
        there = np.isfinite(values)
        new = np.stack([steps, steps, values, values, np.where(there, values, 0.0), there.astype(np.float64)])
        self._kept = _joined(np.concatenate([self._kept, new], axis=1), self._width)
        while self._kept.shape[1] > MAX_BUCKETS:
            self._width *= 2
            self._kept = _joined(self._kept, self._width)


def _joined(rows: np.ndarray, width: int) -> np.ndarray:
    """Columns (first step, last step, least, largest, sum, count), those of one stretch of `width` steps as one."""
    stretch = rows[0] // width
    order = np.argsort(stretch, kind="stable")
    rows, stretch = rows[:, order], stretch[order]
    starts = np.flatnonzero(np.concatenate([[True], stretch[1:] != stretch[:-1]]))
    kinds = (np.minimum, np.maximum, np.fmin, np.fmax, np.add, np.add)  # fmin and fmax pass over NaN
    return np.stack([kind.reduceat(row, starts) for kind, row in zip(kinds, rows, strict=True)])


@dataclass
class Metrics:
    """What a run's metrics.jsonl and audit.jsonl say so far; `read` goes on where it stopped."""

    run: Path
    series: dict[str, Series] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    """the last line of a step"""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    """`device`, `processes`, `nodes` of the last process that began or went on; empty: an earlier version's run"""
    first_time: float | None = None
    last_time: float | None = None
    last_step: int = 0
    seconds: float = 0.0
    """between lines of the run's processes, without the time between two processes, or in which the machine slept"""
    _clock: float | None = None
    """of the last line"""
    _evaluated: int = 0
    """step of the last line with held-out numbers"""
    rules: list[int | None] = field(default_factory=list)
    """versions of the rules by which its held-out numbers were measured, in order; None: not recorded"""
    slowest: Slowest = field(default_factory=Slowest)
    num_damaged: int = 0
    """lines of metrics.jsonl that are no JSON object, and are passed over"""
    first_damaged: int = 0
    """number of the first such line"""
    _phase: str | None = None
    """what a line told of the last phase"""
    _events: Log = field(default_factory=Log)
    _audited: Log = field(default_factory=Log)
    """those of audit.jsonl"""
    _read: ReadSoFar = field(default_factory=ReadSoFar)
    _audit_read: ReadSoFar = field(default_factory=ReadSoFar)

    @classmethod
    def of(cls, run: Path) -> Metrics:
        """All that is there."""
        metrics = cls(run)
        metrics.read()
        return metrics

    def read(self) -> bool:
        """Take in the whole lines that have come since; returns whether there was anything new.

        Where a file was cut, as by a rewind or where a run goes on, both are read anew.
        """
        metrics, audit = self.run / METRICS, self.run / AUDIT
        is_cut = not (self._read.is_of(metrics) and self._audit_read.is_of(audit))
        if is_cut:
            for name, value in vars(type(self)(self.run)).items():
                setattr(self, name, value)
        before = self._read.num_lines, self._audit_read.num_lines
        for raw in self._read.new_lines(metrics):
            if (line := _parsed(raw)) is None:
                self.num_damaged += 1
                self.first_damaged = self.first_damaged or self._read.num_lines
            else:
                self._take(line)
        for raw in self._audit_read.new_lines(audit):
            if event := audited(raw):
                self._audited.add(event)
        return is_cut or (self._read.num_lines, self._audit_read.num_lines) != before

    @property
    def damage(self) -> str:
        """What is missing here of metrics.jsonl; empty: nothing."""
        if not self.num_damaged:
            return ""
        lines = counted(self.num_damaged, "damaged line")
        return f"{self.run / METRICS}: {lines} passed over (the first is line {self.first_damaged:,})"

    @property
    def events(self) -> Mapping[str, Events]:
        """What happened, by kind.

        Both files have skipped steps: audit.jsonl all, metrics.jsonl not those from before a rewind.
        """
        return self._events.by_kind | self._audited.by_kind

    def _take(self, line: Mapping[str, Any]) -> None:
        step, time = line.get("step"), line.get("time")
        if not isinstance(step, int):
            return
        self.last_step = max(self.last_step, step)
        if isinstance(time, int | float):
            # what lies before a line of a start may be days in which nothing ran; a phase of a process that goes on
            # writes the same lines, so the few steps since the last line before it are not counted either
            clock = line.get("clock")
            clock = clock if isinstance(clock, int | float) else time  # earlier versions wrote the time alone
            if self._clock is not None and not _AT_START & line.keys():
                self.seconds += max(0.0, clock - self._clock)
            self._clock = clock
            self.first_time, self.last_time = self.first_time or time, time
            self._events.latest = max(self._events.latest, time)
        if "loss" in line:
            self.last = dict(line)
            line = _as_now(line)
        elif "loss_kernels" in line and step:
            self._event("resumed", step, time, f"a process of the run went on from step {step:,}")
        elif any(name.startswith("heldout/") for name in line):
            self._take_rules(step, time, version_of_line(line))
        if isinstance(found := line.get("hardware"), dict):
            self.hardware = found
        if "phase" in line:
            facts = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in line.items() if k not in _NO_METRICS)
            said = f"phase {line['phase']}: {facts}"
            if said != self._phase:  # each start tells of the phase in which it goes on
                self._event("phase", step, time, said)
            self._phase = said
            return
        if "skipped" in line:
            self._event("skipped", step, time, str(line["skipped"]))
            return
        if isinstance(health := line.get("health"), dict):
            self._event("health", step, time, str(health.get("says", "")))
        if isinstance(last := line.get("stragglers"), list):
            self.slowest.add(last)
            self._event(
                "stragglers", step, time, "; ".join(_straggler(one) for one in last[:5] if isinstance(one, dict))
            )
        for name, value in line.items():
            if name in _NO_METRICS or not (value is None or isinstance(value, int | float)) or isinstance(value, bool):
                continue
            series = self.series.get(name)
            if series is None:
                if len(self.series) >= MAX_METRICS:
                    continue
                series = self.series[name] = Series()
            series.add(step, value)

    def rules_with(self, result: Mapping[str, Any] | None) -> list[int | None]:
        """`rules`, with those of the result that the last evaluation wrote into the run folder, if it is of no earlier
        step than the last line."""
        step = (result or {}).get("step")
        if result is None or (step is not None and step < self._evaluated):
            return self.rules
        version = (result.get("rules") or {}).get("version")
        # a line that does not name its version is of one before those that do: of this one, if that is as early
        is_last = self.rules[-1:] == [None] and (version is None or version < FIRST_OF_LINE)
        before = self.rules[:-1] if is_last else self.rules
        return before if before[-1:] == [version] else [*before, version]

    def _take_rules(self, step: int, time: float | None, version: int | None) -> None:
        self._evaluated = step
        if self.rules[-1:] == [version]:
            return
        if self.rules:
            of_both = (
                f"by {called([version])} of the rules of held-out evaluation, those before by {called(self.rules[-1:])}"
            )
            self._event("rules", step, time, f"held-out numbers from step {step:,} on are {of_both}: {NOT_COMPARABLE}")
        self.rules.append(version)

    def _event(self, kind: str, step: int, time: float | None, text: str) -> None:
        self._events.add(Event(kind, step, time, text))


def _straggler(one: Mapping[str, Any]) -> str:
    """A process that was last: how often, by how much, in which phase of its steps."""
    seconds = one.get("lag_seconds")
    behind = f", by {seconds:.3g} s a step" if isinstance(seconds, int | float) else ""
    who = f"process {one.get('rank')} (node {one.get('node')})"
    return f"{who} last in {one.get('last')} of {one.get('of')} lines{behind}, in {one.get('phase')}"


_NO_METRICS = frozenset({"step", "time", "clock", "phase", "num_bad_images_since", OF_LINE})
_AT_START = frozenset({"retain_bytes", "phase", "contrast_share", "loss_kernels"})
"""what lines have that a process writes before its first step or evaluation, or before a phase"""


def _as_now(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """A step's line as this version writes it: no mean over no pairs, and chance beside the accuracy; and with what is
    drawn of the times of all processes."""
    pairs, changed = line.get("num_pairs"), dict(line)
    # where a contrast's loss is 0, its accuracy is not
    if pairs == 0 or ("contrastive" in line and not any(line.get(name) for name in OF_PAIRS)):
        changed |= {name: None for name in OF_PAIRS if name in line}
        if "image_accuracy" in line:
            changed["chance_accuracy"] = None
    elif pairs and "image_accuracy" in line:
        changed.setdefault("chance_accuracy", 1 / pairs)
    if line.get("num_targets") == 0 and "generation" in line:
        changed["generation"] = None
    return changed | over_ranks(line)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """None: it is damaged."""
    try:
        line = msgspec.json.decode(raw)
    except ValueError:  # also of NaN and Infinity, which Python writes
        try:
            line = json.loads(raw)
        except ValueError:
            return None
    return line if isinstance(line, dict) else None
