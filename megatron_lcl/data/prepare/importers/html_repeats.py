"""Which texts at the start and the end of pages are the site's: those that stand there on many of them.

Only the edges of a page can lose something: from its start to the first paragraph or image of its own, and from its end
back to the last. What a site repeats in between (the options every command takes, a note that recurs) is content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import xxhash

from megatron_lcl.data.corpus.words import split_words
from megatron_lcl.data.prepare.importers.html_page import Block

MIN_PAGES = 10
"""a text on fewer pages is content, however few there are"""
_EDGE = 32
"""blocks on either end of a page that are looked at"""
_WINDOW = 1024
_MIN_WORDS = 3
"""shorter texts that are no links stay: "Note", "Original image" introduce or name what is beside them"""
_STAMP = re.compile(r"(?<!\d)\d+(?:[-:./]\d+)+")  # tried once a run of digits, not at each of them
"""dates, times of day, versions"""


@dataclass
class EdgeTexts:
    """Counts on how many pages each text stands at an edge.

    Memory hardly grows with the pages: lossy counting (Manku and Motwani 2002, section 4.2). After each window of pages
    the texts that were rare until then are forgotten; so a count may be too high by one for each window before it.
    """

    num_pages: int = 0
    _counts: dict[int, int] = field(default_factory=dict)

    def add(self, keys: Iterable[int]) -> None:
        """Count a page's (`edge_keys`)."""
        passed = self.num_pages // _WINDOW
        for key in keys:
            self._counts[key] = self._counts.get(key, passed) + 1
        self.num_pages += 1
        if self.num_pages % _WINDOW == 0:
            self._counts = {key: count for key, count in self._counts.items() if count > passed + 1}

    def repeated(self, max_share: float) -> frozenset[int]:
        """Keys of those on a larger share of the pages, and on at least MIN_PAGES."""
        limit = max(MIN_PAGES - 1, max_share * self.num_pages)
        return frozenset(key for key, count in self._counts.items() if count > limit)


def edge_keys(blocks: Sequence[Block]) -> set[int]:
    """Keys of the texts at a page's edges."""
    edges = blocks if len(blocks) <= 2 * _EDGE else [*blocks[:_EDGE], *blocks[-_EDGE:]]
    return {key for block in edges for key in _keys(block)}


def without_repeated(blocks: Sequence[Block], repeated: frozenset[int]) -> tuple[list[Block], list[Block]]:
    """The blocks that stay, and the repeated texts at the edges, which do not."""
    gone: set[int] = set()
    first_heading = next((i for i, block in enumerate(blocks) if block.kind == "heading"), -1)
    for order in (range(len(blocks)), range(len(blocks) - 1, -1, -1)):
        at_end = order.step < 0
        for i in order:
            block = blocks[i]
            if block.kind == "image":
                break
            if block.kind == "heading":  # belongs to what follows, at the end to nothing; but a page keeps its title
                may_go = at_end and i != first_heading
            else:
                may_go = bool(block.links or block.kind == "title" or _is_long(block))
            if may_go and _is_repeated(block, repeated):
                gone.add(i)
            elif may_go:
                break
    return [b for i, b in enumerate(blocks) if i not in gone], [blocks[i] for i in sorted(gone)]


def _is_repeated(block: Block, repeated: frozenset[int]) -> bool:
    """Whether the text is, or more than half of the links that it consists of."""
    whole, *links = _keys(block)
    return whole in repeated or 2 * sum(key in repeated for key in links) > len(links) > 0


def _is_long(block: Block) -> bool:
    return len(split_words(block.value)) >= _MIN_WORDS


def _keys(block: Block) -> Iterable[int]:
    """Hashes of the text and of the links that it consists of, dates and white space aside; none of an image."""
    if block.kind != "image":
        for text in (block.value, *filter(str.strip, block.links)):  # an empty link says nothing of its line
            yield xxhash.xxh3_64_intdigest(_STAMP.sub("0", text.strip()).encode(errors="replace"))
