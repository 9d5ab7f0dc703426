"""How much of the input may be bad, and what to say where it is more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_lcl.data.corpus.corpus_manifest import total
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import json_rows
from megatron_lcl.data.prepare.importers.sources import NO_FOLDER
from megatron_lcl.errors import UserError

_ENOUGH = 1000
"""items after which the fraction of bad ones is judged before the end"""
_UNKNOWN = tuple(f"document: {reason}" for reason in (json_rows.NOT_JSON, json_rows.CUT))
"""reasons of which each may stand for most of the input, as one JSON array may be all of it"""
_GIVE_FOLDER = "give --images DIR (URLs: what `megatron-lcl fetch` has stored of them)"


class Unusable(UserError):
    """Too much of the input is bad. After any other error finished parts stay, so that the run can be resumed.

    drops: what was bad, for a list of it on disk.
    """

    def __init__(self, message: str, drops: Drops, remedies: Mapping[str, str] | None = None) -> None:
        super().__init__(message, remedies)
        self.drops = drops


class Budget:
    """Stops a run of which too much is bad."""

    def __init__(self, max_bad_fraction: float, place: Callable[[str], str] = str) -> None:
        """place: of a bad item's name, where it stands (`Importer.place`)."""
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {max_bad_fraction}: give a number from 0 to 1")
        self._limit = max_bad_fraction
        self._place = place
        self._drops = Drops()
        self._counts: dict[str, int] = {}

    def add(self, drops: Drops, counts: list[dict[str, int]]) -> None:
        self._drops.add(drops)
        self._counts = total([self._counts, *counts])
        self.check(at_least=_ENOUGH)

    def check(self, at_least: int) -> None:
        good = {
            "image": self._counts.get("placements", 0),
            "document": self._counts.get("documents", 0),
            "text": self._counts.get("pieces", 0) - self._counts.get("placements", 0),
        }
        if self._limit < 1 and (lost := [reason for reason in _UNKNOWN if self._drops.bad_counts[reason]]):
            self._drops.rename(self._place)
            raise Unusable(
                f"{self._drops.names[lost[0]][0]}: {lost[0]}, and nothing says how many these are; mend the file",
                self._drops,
                {"--max-bad-fraction": ", or do without them, whatever else is bad, with --max-bad-fraction 1"},
            )
        for kind in ("image", "document", "text"):
            bad = self._drops.num_bad(kind)  # type: ignore[arg-type]
            seen = bad + good[kind]
            if bad and seen >= at_least and bad > self._limit * seen:
                self._drops.rename(self._place)
                why = _dominant(self._drops, kind)
                remedy = _GIVE_FOLDER if NO_FOLDER in why else "mend the input"
                raise Unusable(
                    f"{bad:,} of {seen:,} {kind}s are bad, {bad / seen:.0%}: {why}; {remedy}",
                    self._drops,
                    {"--max-bad-fraction": f", or allow more than {self._limit:g} with --max-bad-fraction"},
                )


def nothing_left(drops: Drops, place: Callable[[str], str] = str) -> Unusable:
    """The error for an input of which nothing can be used. place: as `Budget` has it."""
    drops.rename(place)
    why = _dominant(drops, "image") or _dominant(drops) or "the input is empty"
    return Unusable(f"no usable document: {why}" + (f"; {_GIVE_FOLDER}" if NO_FOLDER in why else ""), drops)


def _dominant(drops: Drops, kind: str = "") -> str:
    """The most frequent reason for which something of `kind` is bad, or is not wanted; "" if there is none."""
    counts = {reason: n for reason, n in drops.bad_counts.items() if reason.startswith(kind)}
    if not counts:
        counts = {reason: n for reason, n in drops.left_out_counts.items() if reason.startswith(kind)}
    if not counts:
        return ""
    reason = max(counts, key=lambda r: counts[r])
    names = drops.names.get(reason)
    return f"mostly {reason}, {counts[reason]:,}" + (f" (e.g. {names[0]})" if names else "")
