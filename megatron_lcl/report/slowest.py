"""Which nodes' processes the others waited for, from the lines `stragglers` of a run's processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_NODES = 16
"""that are shown, those that were last most often"""
MAX_RANKS = 4
"""of a node that are named"""


class Node(NamedTuple):
    """A row of the table."""

    name: str
    last: int
    """lines in which one of its processes was the slowest"""
    lag: float
    """seconds a step that it then was behind the median, on average"""
    ranks: str
    phases: str


@dataclass
class Slowest:
    """Adds up what each part of a run, from a start to an end, says of who was last."""

    lines: int = 0
    """in which somebody was last"""
    _last: Counter[tuple[str, int]] = field(default_factory=Counter)
    """by node and rank"""
    _lags: Counter[str] = field(default_factory=Counter)
    """seconds, added up over the lines, by node"""
    _phases: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, report: Sequence[Any]) -> None:
        """report: as `Stragglers.report` writes it; what is damaged in it is passed over."""
        for row in report:
            try:
                self._add(row)
            except (TypeError, KeyError, ValueError):
                continue

    def _add(self, row: Mapping[str, Any]) -> None:
        node, rank, last, lag = str(row["node"]), int(row["rank"]), int(row["last"]), float(row["lag_seconds"])
        self.lines += last
        self._last[node, rank] += last
        self._lags[node] += last * lag  # type: ignore[assignment]
        self._phases.setdefault(node, Counter())[str(row["phase"])] += last

    @property
    def num_nodes(self) -> int:
        """Whose processes were last at all."""
        return len(self._phases)

    def rows(self) -> Iterator[Node]:
        """Nodes, the one first whose processes were last most often."""
        by_node: dict[str, list[tuple[int, int]]] = {}
        for (node, rank), last in self._last.most_common():
            by_node.setdefault(node, []).append((rank, last))
        total = {node: sum(last for _, last in ranks) for node, ranks in by_node.items()}
        for node in sorted(total, key=lambda node: -total[node])[:MAX_NODES]:
            ranks = ", ".join(f"{rank} ({last:,})" for rank, last in by_node[node][:MAX_RANKS])
            more = f" and {len(by_node[node]) - MAX_RANKS} more" * (len(by_node[node]) > MAX_RANKS)
            phases = ", ".join(f"{phase} ({n:,})" for phase, n in self._phases[node].most_common(3))
            yield Node(node, total[node], self._lags[node] / total[node], ranks + more, phases)
