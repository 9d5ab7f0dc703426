"""Which names a list of names and domains has, and which names have words in them."""

from __future__ import annotations

import pytest

from megatron_lcl.curate.names import Listed, has_any
from megatron_lcl.data.corpus.names import as_stored


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("a.jsonl@0 https://Site.org/Page", ["pAGE"], True),
        ("a.jsonl@0 https://site.org/page", ["other", "PAGE"], True),
        ("a.jsonl@0 https://site.org/page", ["pages", "page "], False),
        ("a.jsonl@0", [], False),
    ],
)
def test_words_are_found_in_any_case(name: str, words: list[str], expected: bool) -> None:
    assert has_any(name, words) is expected


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("Site.org.", "a@0 http://x.site.org/1", True),
        ("site.org", "a@0 HTTP://X.SITE.ORG./1", True),
        ("site.org", "a@0 http://site.org:80/", True),
        ("site.org", "a@0 http://user@site.org", True),
        ("site.org", "a@0 http://site.org.example/", False),
        ("site.org", "a@0 site.org/1", False),
        ("org", "a@0 http://[::1/", False),
        ("7", "a@0 http://x/?q=5 7", False),
        ("7", "a@0 http://x/?q=5 6 7", False),
        ("http://y/", "a@0 http://x/ b http://y/", True),
        ("y.org", "a@0 http://x/ b http://y.org/2", True),
        ("x.org", "a@0 http://x.org/ b http://y.org/2", True),
        ("6 7", "b 5 6 7", True),
        ("b 5", "b 5 6 7", False),
    ],
)
def test_a_listed_name(line: str, name: str, expected: bool) -> None:
    assert Listed([line]).has(name) is expected
    assert Listed(["zzz.example", line, "aaa.example"]).has(name) is expected


@pytest.mark.parametrize("tail", ["a", "é", "€", "\U0001f600"])
@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("more", [-1, 0, 1, 500])
def test_a_url_that_a_long_name_has_lost_the_end_of(tail: str, shift: int, more: int) -> None:
    """Wherever the cut lies in a character, and whatever else the list has that begins alike."""
    before, start = "dir of/b@12 ", "http://x/" + "y" * shift
    fits = (1000 - len(before + start)) // len(tail.encode())
    url = start + tail * (fits + more)
    name = as_stored(before + url)
    assert name == (before + url).encode()[:1000].decode(errors="ignore")
    alike = [url[:50], start, start + tail * 10, start + tail * (fits - 3) + "-"]
    for line in (url, before + url):
        assert Listed([line]).has(name)
        assert Listed([*alike, line]).has(name)
        assert Listed(["zzz.example", line, *alike, "aaa.example"]).has(name)
    assert not Listed(alike).has(name)
    for line in (url[:-1], url + "z", url + "zzzzz"):
        assert Listed([line]).has(name) is ((before + line).encode()[:1000].decode(errors="ignore") == name)
        assert Listed([*alike, line]).has(name) is Listed([line]).has(name)
