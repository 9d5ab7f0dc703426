"""Where documents came from, by their names: words in them, and lists of names and domains."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Collection, Sequence
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
        self._lines = sorted(lines)
        self._known = {*self._lines, *map(as_stored, self._lines)}
        self._domains = {line.lower().rstrip(".") for line in self._lines if "/" not in line}

    def has(self, name: str) -> bool:
        """Whether a document's whole name is a line, or what stands in it behind a space, as behind a file whose own
        name has spaces; or, where that is a URL, its host or a domain that the host is in.

        Names that are too long are cut in a corpus: lines are cut alike. Behind a space in a URL only another URL
        counts: what a source calls a document stands at the end.
        """
        if name in self._known:
            return True
        own, in_url = name, False
        while " " in own:
            own = own.partition(" ")[2]
            is_url = _URL.match(own) is not None
            if (is_url or not in_url) and own in self._known:
                return True
            if is_url and (self._has_domain(own) or self._has_cut(name, own)):
                return True
            in_url = in_url or is_url
        return False

    def _has_domain(self, url: str) -> bool:
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")  # in lower case
        except ValueError:  # as of `http://[`
            return False
        while host and host not in self._domains:
            host = host.partition(".")[2]
        return bool(host)

    def _has_cut(self, name: str, url: str) -> bool:
        """Whether a URL, at the end of a name, is what the cut has left of a line."""
        if len(name.encode()) <= MAX_BYTES - 4:  # of a character
            return False
        before = name.removesuffix(url)
        longer = itertools.islice(self._lines, bisect.bisect_left(self._lines, url), None)
        alike = itertools.takewhile(lambda line: line.startswith(url), longer)
        return any(as_stored(before + line) == name for line in alike)
