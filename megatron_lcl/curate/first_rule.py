"""Which rule removes a text or a document: the first that it breaks. What a language model judges is gathered from many
texts, so that the model sees texts of like length at once (`perplexity`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from megatron_lcl.curate.measures import MEASURES, Measured
from megatron_lcl.curate.names import has_any
from megatron_lcl.curate.settings import PERPLEXITY, Rule

LOOK_AHEAD, LOOK_AHEAD_CHARACTERS = 1024, 1 << 20
"""texts, or characters of them, that wait to be judged together"""
T = TypeVar("T")


class Removal(NamedTuple):
    """Why something is removed."""

    rule: str
    value: float
    """what the rule measured"""
    matched: str = ""
    """the name of what it is like, if it is removed for that"""


def first_rules(rules: Sequence[Rule], of: Iterable[tuple[T, Measured | None]]) -> Iterator[tuple[T, Removal | None]]:
    """Each of `of` with the first rule that removes it, None where none does or there is nothing to measure.

    In order; up to LOOK_AHEAD are read before the first is given, where a rule needs a language model.
    """
    first_slow = next((k for k, rule in enumerate(rules) if rule.field in PERPLEXITY), len(rules))
    fast, slow = rules[:first_slow], rules[first_slow:]
    if not slow:
        for key, measured in of:
            yield key, _first(fast, measured) if measured else None
        return
    waiting: list[tuple[T, Measured | None, Removal | None]] = []
    characters = 0
    for key, measured in of:
        removal = _first(fast, measured) if measured else None
        waiting.append((key, measured, removal))
        if measured and not removal:
            characters += len(measured.text)
        if len(waiting) == LOOK_AHEAD or characters >= LOOK_AHEAD_CHARACTERS:
            yield from _decided(slow, waiting)
            waiting, characters = [], 0
    yield from _decided(slow, waiting)


def _decided(
    slow: Sequence[Rule], waiting: Sequence[tuple[T, Measured | None, Removal | None]]
) -> Iterator[tuple[T, Removal | None]]:
    left = [measured for _, measured, removal in waiting if measured and not removal]
    if left:
        values = left[0].context.perplexities([measured.text for measured in left])
        for text, value in zip(left, values, strict=True):
            text.perplexity = value
    for key, measured, removal in waiting:
        yield key, _first(slow, measured) if measured and not removal else removal


def _first(rules: Sequence[Rule], text: Measured) -> Removal | None:
    for rule in rules:
        if rule.field == "unsafe_names":
            value, breaks = 1.0, has_any(text.name, rule.threshold)
        elif rule.field == "excluded_names":
            value, breaks = 1.0, text.context.excluded_names.has(text.name)
        else:
            value = MEASURES[rule.field[4:]](text)  # without min_ or max_
            breaks = rule.breaks(value)
        if breaks:
            return Removal(rule.name, value)
    return None
