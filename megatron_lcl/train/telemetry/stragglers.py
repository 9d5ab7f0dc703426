"""Which process the others wait for, from the times that all spend on work of their own.

In a synchronous step all processes end together, so their whole times tell nothing. What is compared is the work
between two waits (`clock.WORK`: reading, forward, backward), of processes that have the same work: those at the same
place of their replica, one in each. Where there is one replica, all processes are compared. The ranks of a tensor group
wait for each other within a layer, and are slow together.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_lcl.train.telemetry.clock import WORK, Phase

NOTABLE = 0.1
"""part of a step by which a process must be behind the others for a line on the console"""
CONSECUTIVE = 3
"""lines of metrics after which that is said"""
LISTED = 64
"""processes up to which a line has a number of each"""
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
"""what it has of more"""
OF_RANKS = ("rank_step_seconds", "rank_work_seconds")
"""what a line has of each process"""
DRAWN = ("min", "median", "max")
"""what a chart has of that"""


class Place(NamedTuple):
    """Where a process is."""

    node: str
    in_replica: int
    """its rank in its replica"""

    @property
    def loads_data(self) -> bool:
        """Whether it reads the batches of its replica (`Mesh.loads_data`)."""
        return self.in_replica == 0


class Slowest(NamedTuple):
    """The process that is furthest behind."""

    rank: int
    lag: float
    """seconds a step, behind the median of those with the same work (of an even number of them, the lower)"""
    phase: Phase
    """in which most of it comes about"""


def of_each(times: Sequence[Mapping[str, float]], phases: Sequence[Phase]) -> list[float] | dict[str, float]:
    """Seconds a step that each process spends in these phases, by rank, to four digits; of more than `LISTED` processes
    their quantiles (the nearest of the numbers). times: seconds a step, by rank."""
    each = [float(f"{sum(row[phase] for phase in phases):.4g}") for row in times]
    if len(each) <= LISTED:
        return each
    return quantiles(each)


def quantiles(each: Sequence[float]) -> dict[str, float]:
    """The nearest of the numbers."""
    ordered = sorted(each)
    return {name: ordered[round(part * (len(each) - 1))] for name, part in QUANTILES.items()}


def over_ranks(line: Mapping[str, Any]) -> dict[str, float]:
    """Of a line of metrics what is drawn of its numbers by process, as `rank_step_seconds/max`."""
    found: dict[str, float] = {}
    for name in OF_RANKS:
        if each := line.get(name):
            of = each if isinstance(each, dict) else quantiles(each)
            found |= {f"{name}/{part}": of[part] for part in DRAWN}
    return found


def slowest(times: Sequence[Mapping[str, float]], places: Sequence[Place]) -> Slowest:
    """Of all processes, by rank; times: seconds a step."""
    groups: dict[int, list[int]] = {}
    for rank, place in enumerate(places):
        groups.setdefault(place.in_replica, []).append(rank)
    if len(groups) == len(places):
        groups = {0: list(range(len(places)))}
    found = []
    for ranks in groups.values():
        work = {rank: sum(times[rank][phase] for phase in WORK) for rank in ranks}
        usual = {phase: statistics.median_low([times[rank][phase] for rank in ranks]) for phase in WORK}
        last = max(ranks, key=lambda rank: work[rank])
        phase = max(WORK, key=lambda phase: times[last][phase] - usual[phase])
        found.append(Slowest(last, work[last] - statistics.median_low(work.values()), phase))
    return max(found, key=lambda one: one.lag)


class Stragglers:
    """Counts, over the lines of a run, who was last how often."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self._last: Counter[tuple[int, Phase]] = Counter()
        self._lags: dict[int, float] = {}
        self._lines = 0
        self._behind = (-1, 0)
        """who has been notably behind, and for how many lines without a break"""

    def add(self, times: Sequence[Mapping[str, float]], step_seconds: float) -> tuple[Slowest, str | None]:
        """The slowest since the last line, and what there is to say of it."""
        found = slowest(times, self.places)
        self._lines += 1
        self._last[found.rank, found.phase] += 1
        self._lags[found.rank] = self._lags.get(found.rank, 0.0) + found.lag
        rank, lines = self._behind
        if found.lag < NOTABLE * step_seconds:
            self._behind = (-1, 0)
        else:
            self._behind = (found.rank, lines + 1 if rank == found.rank else 1)
        if self._behind[1] != CONSECUTIVE:
            return found, None
        return found, (
            f"process {found.rank} (node {self.places[found.rank].node}) is behind the others by {found.lag:.3g} s a "
            f"step, in {found.phase}: last in {self.times_last()[found.rank]} of {self._lines} lines"
        )

    def times_last(self) -> dict[int, int]:
        """How often each process was last."""
        counts: Counter[int] = Counter()
        for (rank, _), number in self._last.items():
            counts[rank] += number
        return dict(counts)

    def report(self) -> list[dict[str, str | int | float]]:
        """Who was last how often, most often first: node, rank, lines, mean lag in seconds a step, phase."""
        table: list[dict[str, str | int | float]] = []
        for rank, number in Counter(self.times_last()).most_common():
            phases = {phase: n for (r, phase), n in self._last.items() if r == rank}
            lag = self._lags[rank] / number
            phase = max(phases, key=lambda phase: phases[phase])
            node = self.places[rank].node
            row: dict[str, str | int | float] = {"node": node, "rank": rank, "last": number, "of": self._lines}
            table.append(row | {"lag_seconds": lag, "phase": phase})
        return table

    def by_node(self) -> dict[str, int]:
        """How often a process of each node was last, most often first."""
        counts: Counter[str] = Counter()
        for rank, number in self.times_last().items():
            counts[self.places[rank].node] += number
        return dict(counts.most_common())
