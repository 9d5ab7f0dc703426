"""What was dropped on the way into a corpus, counted by reason, with the first few names of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["image", "text", "document"]
NAMES_KEPT = 5
LOG = "drops.jsonl"
"""a corpus's file of them"""


@dataclass
class Drops:
    """Counts by kind and reason. `bad` data are faulty and count against the budget; what is `left_out` is not wanted;
    what is `noted` is kept, repaired or as it was."""

    bad_counts: dict[str, int] = field(default_factory=dict)
    left_out_counts: dict[str, int] = field(default_factory=dict)
    noted_counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    """the first few names of each reason"""

    def bad(self, kind: Kind, reason: str, name: str = "", count: int = 1) -> None:
        """Drop something faulty."""
        self._count(self.bad_counts, f"{kind}: {reason}", name, count)

    def left_out(self, kind: Kind, reason: str, name: str = "", count: int = 1) -> None:
        """Leave out something sound that a rule does not want."""
        self._count(self.left_out_counts, f"{kind}: {reason}", name, count)

    def note(self, kind: Kind, reason: str, name: str = "", count: int = 1) -> None:
        """Remark on something that stays."""
        self._count(self.noted_counts, f"{kind}: {reason}", name, count)

    def _count(self, counts: dict[str, int], key: str, name: str, count: int) -> None:
        counts[key] = counts.get(key, 0) + count
        names = self.names.setdefault(key, [])
        if name and len(names) < NAMES_KEPT:
            names.append(name.encode(errors="backslashreplace").decode())  # a file's name need not be valid Unicode

    def clear(self) -> None:
        """Forget everything."""
        for part in (self.bad_counts, self.left_out_counts, self.noted_counts, self.names):
            part.clear()

    def num_bad(self, kind: Kind) -> int:
        return sum(n for key, n in self.bad_counts.items() if key.startswith(kind + ":"))

    def add(self, other: Drops) -> None:
        """Take another's counts and names in, after one's own."""
        for mine, theirs in (
            (self.bad_counts, other.bad_counts),
            (self.left_out_counts, other.left_out_counts),
            (self.noted_counts, other.noted_counts),
        ):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        for key, names in other.names.items():
            self.names[key] = (self.names.get(key, []) + names)[:NAMES_KEPT]

    def rename(self, place: Callable[[str], str]) -> None:
        """Give the names as people read them."""
        self.names = {reason: [place(name) for name in names] for reason, names in self.names.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """`what` (bad, left out, noted), `reason`, `count` and `names` of the first few; the most frequent first."""
        for what, counts in (
            ("bad", self.bad_counts),
            ("left out", self.left_out_counts),
            ("noted", self.noted_counts),
        ):
            for reason, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
                yield {"what": what, "reason": reason, "count": count, "names": self.names.get(reason, [])}

    def log(self) -> bytes:
        """The rows as JSON lines, for the file `LOG`."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows()).encode()

    def to_dict(self) -> dict[str, Any]:
        return {
            "bad": dict(sorted(self.bad_counts.items())),
            "left_out": dict(sorted(self.left_out_counts.items())),
            "noted": dict(sorted(self.noted_counts.items())),
            "names": {key: names for key, names in sorted(self.names.items()) if names},
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Drops:
        return cls(dict(tree["bad"]), dict(tree["left_out"]), dict(tree["noted"]), dict(tree["names"]))
