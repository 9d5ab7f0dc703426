"""Which names a list of names and domains has, and which names have words in them."""

from __future__ import annotations

import random
import tracemalloc

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


def test_lines_of_which_nothing_is_found_are_those_that_match_nothing_by_themselves() -> None:
    draw, parts = (
        random.Random(0),
        ["a", "A", "b.c", "B.c", "x.b.c", "http://b.c/a", "http://X.b.c/", "https://a", "c."],
    )
    for _ in range(300):
        lines = [" ".join(draw.choices(parts, k=draw.choice([1, 1, 1, 2]))) for _ in range(6)]
        names = [" ".join(draw.choices(parts, k=draw.randint(1, 3))) for _ in range(4)]
        listed = Listed(lines)
        left = listed.without({form for name in names for form in listed.matching(name)})
        alone = [line for line in dict.fromkeys(lines) if not any(Listed([line]).has(name) for name in names)]
        assert left == alone, (lines, names)


def test_a_list_of_millions_fits_into_memory() -> None:
    """Each process that looks for names has it: at most two entries of sets for a line, and two references."""
    lines = [f"host-{number}.example" for number in range(50_000)]
    tracemalloc.start()
    listed = Listed(lines)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert listed.has("x http://host-49999.example/")
    assert held < 250 * len(lines)
