"""What `curate` removed, in numbers and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lcl.units import counted


@dataclass(frozen=True)
class Removed:
    """What a rule removed."""

    rule: str
    threshold: str
    texts: int
    images: int
    """placements; of documents that were removed whole, as with texts, those that other rules had left in them"""
    documents: int

    def share(self, before: dict[str, int]) -> float:
        """Of what the rule is about (texts, images or documents) in the corpus before."""
        about = {"text": "texts", "image": "images", "document": "documents"}[self.rule.partition(".")[0]]
        return getattr(self, about) / before[about] if before[about] else 0.0


@dataclass(frozen=True)
class Unmatched:
    """What of the list `document.excluded_names` is no document's name, as where it is misspelled."""

    lines: int
    """of the list, repeated ones once"""
    unmatched: int
    first: Sequence[str]
    """a few of those that match nothing; none where the corpus is to name nothing that somebody wants removed"""

    def __str__(self) -> str:
        if not self.unmatched:
            return f"document.excluded_names: every one of {counted(self.lines, 'line')} matched a document"
        more = self.unmatched - len(self.first)
        named = [*map(repr, self.first), *([f"and {more:,} more"] if self.first and more else [])]
        lines = f"{self.unmatched:,} of {counted(self.lines, 'line')} matched no document"
        return f"document.excluded_names: {lines}: {', '.join(named) or '`--dry-run` names them'}"


@dataclass(frozen=True)
class Curated:
    """What came of it."""

    path: Path | None
    """None: only looked at"""
    before: dict[str, int]
    """texts, images, documents of the source"""
    rules: list[Removed]
    samples: list[dict[str, Any]]
    """as the rows of `removed.parquet`, and `parts`: what was removed, `text` or `image` (a data: URL) each"""
    unmatched: Unmatched | None = None
    """None: names are not excluded, or were by an earlier release"""
    reused: bool = False

    @property
    def after(self) -> dict[str, int]:
        return {name: count - sum(getattr(r, name) for r in self.rules) for name, count in self.before.items()}

    def __str__(self) -> str:
        rows = [["rule", "threshold", "texts", "images", "documents", "share"]]
        for r in self.rules:
            counts = [f"{count:,}" if count else "" for count in (r.texts, r.images, r.documents)]
            rows.append([r.rule, r.threshold, *counts, f"{r.share(self.before):.2%}"])
        for title, sums in (("before", self.before), ("after", self.after)):
            rows.append([title, "", *(f"{sums[name]:,}" for name in ("texts", "images", "documents")), ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])]
            lines.append("  ".join(cells).rstrip())
        if self.unmatched is not None:
            lines.append(str(self.unmatched))
        return "\n".join(lines)
