"""Where documents came from, by their names: words in them, and lists of names and domains."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from urllib.parse import urlsplit

from megatron_lcl.data.corpus.names import MAX_BYTES, as_stored

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def has_any(name: str, words: Sequence[str]) -> bool:
    """Whether a name has one of the words in it, in upper or lower case."""
    name = name.lower()
    return any(word.lower() in name for word in words)


Form = tuple[str, str]
"""under which a line is found: as "name" or "domain", and what"""


class Listed:
    """Names of documents, parts of names, and domains, from the lines of a list; there may be millions."""

    def __init__(self, lines: Collection[str]) -> None:
        self.lines = tuple(dict.fromkeys(lines))
        """without repeated ones, in order"""
        self._sorted = sorted(self.lines)
        self._known = {*self.lines, *map(as_stored, self.lines)}
        self._domains = {_domain(line) for line in self.lines if "/" not in line}

    def has(self, name: str) -> bool:
        """Whether a line matches a document's name."""
        return next(self.matching(name), None) is not None

    def matching(self, name: str) -> Iterator[Form]:
        """What matches a document's name, some more than once: its whole name, or what stands in it behind a space, as
        behind a file whose own name has spaces; or, where that is a URL, its host or a domain that the host is in.

        Names that are too long are cut in a corpus: lines are cut alike. Behind a space in a URL only another URL
        counts: what a source calls a document stands at the end.
        """
        if name in self._known:
            yield "name", name
        own, in_url = name, False
        while " " in own:
            own = own.partition(" ")[2]
            is_url = _URL.match(own) is not None
            if (is_url or not in_url) and own in self._known:
                yield "name", own
            if is_url:
                yield from self._domains_of(own)
                yield from self._cut(name, own)
            in_url = in_url or is_url

    def without(self, found: Collection[Form]) -> list[str]:
        """The lines of which nothing was found; found: what matched the names of all documents, as a set."""
        return [line for line in self.lines if not any(form in found for form in _forms(line))]

    def _domains_of(self, url: str) -> Iterator[Form]:
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")  # in lower case
        except ValueError:  # as of `http://[`
            return
        while host:
            if host in self._domains:
                yield "domain", host
            host = host.partition(".")[2]

    def _cut(self, name: str, url: str) -> Iterator[Form]:
        """The lines of which a URL, at the end of a name, is what the cut has left."""
        if len(name.encode()) <= MAX_BYTES - 4:  # of a character
            return
        before = name.removesuffix(url)
        longer = itertools.islice(self._sorted, bisect.bisect_left(self._sorted, url), None)
        alike = itertools.takewhile(lambda line: line.startswith(url), longer)
        yield from (("name", line) for line in alike if as_stored(before + line) == name)


def _domain(line: str) -> str:
    return line.lower().rstrip(".")


def _forms(line: str) -> Iterator[Form]:
    yield from (("name", line), ("name", as_stored(line)))
    if "/" not in line:
        yield "domain", _domain(line)
