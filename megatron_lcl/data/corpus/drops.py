"""What was dropped on the way into a corpus: counts by reason, the first few names of each, samples of the texts."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

Kind = Literal["image", "text", "document"]
NAMES_KEPT = 5
"""of each reason, in the manifest"""
BAD_KEPT = 1000
"""of each reason for which something is bad, in the file `LOG`: it is to be mended"""
SAMPLES_KEPT = 5
SAMPLE_CHARACTERS = 240
LOG = "drops.jsonl"
"""a corpus's file of them"""

Sample = tuple[str, str]
"""(text, name of the document)"""


@dataclass
class Drops:
    """Counts by kind and reason. `bad` data are faulty and count against the budget; what is `left_out` is not wanted;
    what is `noted` is kept, repaired or as it was.

    samples: of each reason a few different texts, drawn from all that were dropped: those whose hash is smallest. So
    they are the same whoever counts what in which order.
    """

    bad_counts: Counter[str] = field(default_factory=Counter)
    left_out_counts: Counter[str] = field(default_factory=Counter)
    noted_counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    """the first names of each reason"""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """of each reason, the smallest hash first"""

    def bad(self, kind: Kind, reason: str, name: str = "", count: int = 1, sample: str = "") -> None:
        """Drop something faulty; sample: (the beginning of) its text."""
        self._count(self.bad_counts, f"{kind}: {reason}", name, count, sample, BAD_KEPT)

    def left_out(self, kind: Kind, reason: str, name: str = "", count: int = 1, sample: str = "") -> None:
        """Leave out something sound that a rule does not want."""
        self._count(self.left_out_counts, f"{kind}: {reason}", name, count, sample, NAMES_KEPT)

    def note(self, kind: Kind, reason: str, name: str = "", count: int = 1) -> None:
        """Remark on something that stays."""
        self._count(self.noted_counts, f"{kind}: {reason}", name, count, "", NAMES_KEPT)

    @property
    def _counts(self) -> dict[str, Counter[str]]:
        return {"bad": self.bad_counts, "left out": self.left_out_counts, "noted": self.noted_counts}

    def _count(self, counts: Counter[str], key: str, name: str, count: int, sample: str, names_kept: int) -> None:
        counts[key] += count
        names = self.names.setdefault(key, [])
        if name and len(names) < names_kept and names[-1:] != [name := _valid(name)]:  # a page may lose several texts
            names.append(name)
        if sample and (sample := _shortened(sample)):
            self._sample(key, [(sample, _valid(name))])

    def _sample(self, key: str, new: list[Sample]) -> None:
        kept: dict[str, str] = {}
        for text, name in (*self.samples.get(key, ()), *new):
            kept[text] = min(name, kept.get(text, name))
        self.samples[key] = heapq.nsmallest(SAMPLES_KEPT, kept.items(), key=lambda s: (_hash(s[0]), s[0]))

    def clear(self) -> None:
        """Forget everything."""
        for part in (self.bad_counts, self.left_out_counts, self.noted_counts, self.names, self.samples):
            part.clear()

    def num_bad(self, kind: Kind) -> int:
        return sum(n for key, n in self.bad_counts.items() if key.startswith(kind + ":"))

    def add(self, other: Drops) -> None:
        """Take another's counts, names and samples in, after one's own."""
        for what, counts in self._counts.items():
            counts.update(other._counts[what])
        for key, names in other.names.items():
            kept = BAD_KEPT if key in self.bad_counts else NAMES_KEPT
            self.names[key] = (self.names.get(key, []) + names)[:kept]
        for key, samples in other.samples.items():
            self._sample(key, samples)

    def rename(self, place: Callable[[str], str]) -> None:
        """Give the names as people read them."""
        self.names = {reason: [place(name) for name in names] for reason, names in self.names.items()}
        self.samples = {
            reason: [(text, place(name)) for text, name in samples] for reason, samples in self.samples.items()
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """`what` (bad, left out, noted), `reason`, `count`, `names` of the first, `samples` ({"text", "name"}).

        The most frequent first.
        """
        for what, counts in self._counts.items():
            for reason, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
                samples = [{"text": text, "name": name} for text, name in self.samples.get(reason, ())]
                row = {"what": what, "reason": reason, "count": count, "names": self.names.get(reason, [])}
                yield {**row, "samples": samples}

    def log(self) -> bytes:
        """The rows as JSON lines, for the file `LOG`."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows()).encode()

    @classmethod
    def from_log(cls, log: bytes) -> Drops:
        """Back from `log`. KeyError, TypeError or ValueError where it is none."""
        drops = cls()
        for row in map(json.loads, log.splitlines()):
            reason = row["reason"]
            drops._counts[row["what"]][reason] = row["count"]
            drops.names[reason] = row["names"]
            if row["samples"]:
                drops.samples[reason] = [(sample["text"], sample["name"]) for sample in row["samples"]]
        return drops

    def to_dict(self, names_kept: int = BAD_KEPT) -> dict[str, Any]:
        """JSON-able, with so many names of each reason at most."""
        return {
            "bad": dict(sorted(self.bad_counts.items())),
            "left_out": dict(sorted(self.left_out_counts.items())),
            "noted": dict(sorted(self.noted_counts.items())),
            "names": {key: names[:names_kept] for key, names in sorted(self.names.items()) if names},
            "samples": {key: [list(sample) for sample in samples] for key, samples in sorted(self.samples.items())},
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Drops:
        """Back from `to_dict`; manifests of earlier releases have no samples."""
        samples = {key: [(text, name) for text, name in found] for key, found in tree.get("samples", {}).items()}
        bad, left_out, noted = (Counter(tree[what]) for what in ("bad", "left_out", "noted"))
        return cls(bad, left_out, noted, dict(tree["names"]), samples)


def _valid(text: str) -> str:
    """A file's name need not be valid Unicode, nor a text."""
    return text.encode(errors="backslashreplace").decode()


def _shortened(text: str) -> str:
    """A text's beginning, in one line."""
    words = " ".join(text[: 4 * SAMPLE_CHARACTERS].split())
    return _valid(words if len(words) <= SAMPLE_CHARACTERS else words[: SAMPLE_CHARACTERS - 1] + "…")


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
