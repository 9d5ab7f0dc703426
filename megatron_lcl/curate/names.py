"""Where documents came from, by their names: words in them, and lists of names and domains."""

from __future__ import annotations

import bisect
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from urllib.parse import urlsplit

from megatron_lcl.data.corpus.names import MAX_BYTES, as_stored

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def has_any(name: str, words: Sequence[str]) -> bool:
    """Whether a name has one of the words in it, in upper or lower case."""
    name = name.lower()
    return any(word.lower() in name for word in words)


class Listed:
    """Names of documents, parts of names, and domains, from the lines of a list."""

    def __init__(self, lines: Collection[str]) -> None:
        self.lines = tuple(dict.fromkeys(lines))
        """without repeated ones, in order"""
        self._sorted = sorted(self.lines)
        self._known: dict[str, list[str]] = defaultdict(list)
        self._domains: dict[str, list[str]] = defaultdict(list)
        for line in self.lines:
            for name in {line, as_stored(line)}:
                self._known[name].append(line)
            if "/" not in line:
                self._domains[line.lower().rstrip(".")].append(line)

    def has(self, name: str) -> bool:
        """Whether a line matches a document's name."""
        return any(True for _ in self.matching(name))

    def matching(self, name: str) -> Iterator[str]:
        """The lines that match a document's name, some more than once: its whole name, or what stands in it behind a
        space, as behind a file whose own name has spaces; or, where that is a URL, its host or a domain that the host
        is in.

        Names that are too long are cut in a corpus: lines are cut alike. Behind a space in a URL only another URL
        counts: what a source calls a document stands at the end.
        """
        yield from self._known.get(name, ())
        own, in_url = name, False
        while " " in own:
            own = own.partition(" ")[2]
            is_url = _URL.match(own) is not None
            if is_url or not in_url:
                yield from self._known.get(own, ())
            if is_url:
                yield from self._domains_of(own)
                yield from self._cut(name, own)
            in_url = in_url or is_url

    def _domains_of(self, url: str) -> Iterator[str]:
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")  # in lower case
        except ValueError:  # as of `http://[`
            return
        while host:
            yield from self._domains.get(host, ())
            host = host.partition(".")[2]

    def _cut(self, name: str, url: str) -> Iterator[str]:
        """The lines of which a URL, at the end of a name, is what the cut has left."""
        if len(name.encode()) <= MAX_BYTES - 4:  # of a character
            return
        before = name.removesuffix(url)
        longer = itertools.islice(self._sorted, bisect.bisect_left(self._sorted, url), None)
        alike = itertools.takewhile(lambda line: line.startswith(url), longer)
        yield from (line for line in alike if as_stored(before + line) == name)
