"""The URL that is requested, for one of a list or of a `Location` header: its escapes are sent as they are given.

Servers may sign a path and a query as they stand, so that `%7E` is another resource than `~`. What a URL cannot have
(RFC 3986) is escaped: a space, a control character, letters that are not ASCII. A `%` that begins no escape stays, and
`|`, `[` and `]`. The `?` of an empty query is left out (yarl does so).
"""

from __future__ import annotations

import re
from urllib.parse import quote

from yarl import URL

_PARTS = re.compile(r"([a-z][a-z0-9+.-]*:)?(//[^/?#]*)?([^?#]*)(\?[^#]*)?", re.I | re.S)
"""scheme, authority, path and query; a fragment is not sent"""
_SENT = "%/?:@!$&'()*+,;=-._~[]|"
"""characters that are sent as they are, besides letters and digits"""


def target_of(text: str, base: URL | None = None) -> URL:
    """The URL to request, without a fragment. ValueError where it is none; its scheme and host may be empty.

    text: as it was given; of a header, bytes that are no UTF-8 are surrogates (PEP 383), and are sent as they were.
    base: what a relative one is relative to (RFC 3986, 5.2).
    """
    text = re.sub(r"[\t\r\n]", "", text.strip())
    before_query = text.partition("#")[0].partition("?")[0]
    found = _PARTS.match(before_query.replace("\\", "/") + text[len(before_query) :])
    assert found is not None, "each part may be empty"
    scheme, authority, path, query = found.groups("")
    if base is not None:
        if not authority and scheme.lower() in ("", f"{base.scheme}:"):
            if not path:
                path, query = base.raw_path, query or f"?{base.raw_query_string}"
            elif not path.startswith("/"):
                path = f"{base.raw_path.rpartition('/')[0]}/{path}"
            authority = f"//{base.raw_authority}"
        scheme = scheme or f"{base.scheme}:"
    site = URL(scheme + authority)  # where a name that is not ASCII is encoded by its own rules (IDNA)
    rest = _without_dots(path) + query
    escaped = quote(rest.encode(errors="surrogateescape"), safe=_SENT)
    return URL(f"{site.scheme}://{site.raw_authority}{escaped}", encoded=True)


def _without_dots(path: str) -> str:
    """A path without the segments `.` and `..` (RFC 3986, 5.2.4), however these are written."""
    kept: list[str] = []
    dots = ""
    for segment in path.split("/")[1:]:
        dots = segment.lower().replace("%2e", ".")
        if dots == "..":
            del kept[-1:]
        elif dots != ".":
            kept.append(segment)
    return "/".join(["", *kept, *[""] * (dots in (".", "..") or not kept)])
