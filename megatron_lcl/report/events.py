"""What happened in a run beside its steps: how often, the newest, and where over the steps.

Memory does not grow with the number of events.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lcl.train.changes import text_of

MAX_EVENTS = 60
"""the newest, which are shown"""
MAX_STRETCHES = 400
"""of steps, in which the events of a kind are counted"""


@dataclass
class Event:
    """Something that happened between two steps."""

    kind: str
    step: int
    time: float | None
    text: str
    order: tuple[float, int] = (0.0, 0)
    """among those of all kinds and both files; filled in by `Log`"""


class Events:
    """The events of one kind, added in the order in which they happened."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.number = 0
        self.newest: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._width = 1
        """steps of a stretch"""
        self._stretches: dict[int, tuple[Event, int]] = {}
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """One more."""
        self.number += 1
        self.newest.append(event)
        self._count(event, 1)
        while len(self._stretches) > MAX_STRETCHES:
            counted, self._stretches = self.stretches, {}
            self._width *= 2
            for first, number in counted:
                self._count(first, number)

    @property
    def stretches(self) -> list[tuple[Event, int]]:
        """Over all steps, of each stretch that has any: the first event, and how many there are."""
        return list(self._stretches.values())

    def _count(self, event: Event, number: int) -> None:
        first, before = self._stretches.get(event.step // self._width, (event, 0))
        self._stretches[event.step // self._width] = first, before + number


class Log:
    """The events of one file, by kind, added in the order of its lines.

    They stay in that order where a clock is set back: those of two files are merged by the latest time so far in each.
    """

    def __init__(self) -> None:
        self.by_kind: defaultdict[str, Events] = defaultdict(Events)
        self.latest = 0.0
        """time of its lines so far"""
        self._number = 0

    def add(self, event: Event) -> None:
        """That of the next line that has one."""
        self.latest = max(self.latest, event.time or 0.0)
        self._number += 1
        event.order = self.latest, self._number
        self.by_kind[event.kind].add(event)


def newest(events: Mapping[str, Events]) -> list[Event]:
    """The last MAX_EVENTS of all kinds, in the order in which they happened: after a rewind, steps begin again."""
    found = [event for of_kind in events.values() for event in of_kind.newest]
    return sorted(found, key=lambda event: event.order)[-MAX_EVENTS:]


NAMES = {
    "phase": "phase",
    "resumed": "resumed",
    "skipped": "step skipped",
    "rewind": "rewind",
    "stopped": "stopped",
    "changed": "settings changed",
    "rejected": "checkpoint rejected",
    "differ": "replicas differ",
    "weights": "initial weights",
    "rules": "held-out rules",
    "health": "health",
    "stragglers": "slowest processes",
}
"""of kinds, on the page"""


_KINDS = {name: kind for kind, name in NAMES.items()}
"""of events of audit.jsonl, which are called as on the page"""


def numbers(events: Mapping[str, Events]) -> str:
    """How many there are of each kind: `3 × step skipped, 1 × rewind`."""
    return ", ".join(f"{of_kind.number:,} × {NAMES.get(kind, kind)}" for kind, of_kind in events.items())


def audited(raw: bytes) -> Event | None:
    """The event of a line of audit.jsonl; None: it was cut off in writing."""
    try:
        line = json.loads(raw)
        return Event(_KINDS.get(line["event"], line["event"]), int(line["step"]), line.get("time"), _said(line))
    except (ValueError, KeyError, TypeError):
        return None


def _said(line: Mapping[str, Any]) -> str:
    if line["event"] == "rewind":
        return f"back to step {line.get('to', 0):,}, without the packs of the steps between"
    if line["event"] == "stopped":
        return f"signal {line.get('signal')}; saved at step {line.get('saved', 0):,}"
    if line["event"] == "changed":
        changed = line.get("settings", {})
        values = ", ".join(f"{name} {text_of(before)} → {text_of(now)}" for name, (before, now) in changed.items())
        return "; ".join([*([values] if values else []), *(f"warning: {text}" for text in line.get("warnings", ()))])
    if line["event"] == "blend changed":
        paths = (", ".join(path for path, _ in line.get(key, ())) or "nothing" for key in ("gone", "new"))
        return "without {}, with {}".format(*paths)
    if line["event"] == "checkpoint rejected":
        return f"{Path(line.get('folder', '')).name}: {'; '.join(line.get('faults', ())[:3])}"
    if line["event"] == "initial weights":
        return str(line.get("path", ""))
    return str(line.get("reason", ""))
