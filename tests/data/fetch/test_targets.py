"""What is requested of a URL: the bytes of the request line."""

from __future__ import annotations

import asyncio

import pytest
from data.fetch.faulty_server import image
from data.fetch.test_odd_answers import ends

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from megatron_lcl.data.fetch.client import Client
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.data.fetch.targets import target_of

SIGNED = "/HMAC/https%3A%2F%2Fy%2Fz.png?u=http%3A%2F%2Fy%2Fz%3Fa%3D1&s=%7E%28x%29&t=%e9+'*!"
"""a target whose every byte its server may have signed"""
KEPT = ("kept", "")


def requested(url: str, headers: str = "") -> tuple[tuple[str, str], list[str]]:
    """What becomes of a URL of a server that answers /moved with these headers, and anything else below /HMAC/ with an
    image; and the targets of its requests, but for that of robots.txt."""
    asked: list[str] = []
    picture = ("", image("1"))
    answers = {"/moved": (headers, b"")}
    for target in (SIGNED, "/caf%E9.png", "/%41%7E.png", "/50%.png", "/b.png?c%5Cd", "/%C3%A4%20b.png?q=%E6%97%A5%20x"):
        answers["/" + target.split("/")[-1]] = picture
    (end,) = ends([url], answers, asked=asked)
    return end, asked[1:]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (SIGNED, SIGNED),
        (f"{SIGNED}#x%41", SIGNED),
        ("/50%.png", "/50%.png"),
        ("/50\t%.p\r\nng\n", "/50%.png"),  # as browsers read it
        ("/a\\b.png?c\\d", "/a/b.png?c%5Cd"),
        ("\\b.png?c\\d", "/b.png?c%5Cd"),
        ("/ä b.png?q=日 x", "/%C3%A4%20b.png?q=%E6%97%A5%20x"),
    ],
)
def test_escapes_are_sent_as_given(given: str, sent: str) -> None:
    assert requested(f"http://here{given}") == (KEPT, [sent])


@pytest.mark.parametrize(
    ("location", "sent"),
    [
        (SIGNED, SIGNED),
        (f"http:{SIGNED}", SIGNED),
        (f"HTTP:{SIGNED}", SIGNED),
        ("%41%7E.png", "/a%2Fb/%41%7E.png"),
        ("../50%.png", "/50%.png"),
        ("/caf\udce9.png", "/caf%E9.png"),  # the byte of é in Latin-1
        ("/ä b.png?q=日 x", "/%C3%A4%20b.png?q=%E6%97%A5%20x"),
    ],
)
def test_a_redirect_leads_where_it_says(location: str, sent: str) -> None:
    assert requested("http://here/a%2Fb/moved", f"Location: {location}\r\n") == (KEPT, ["/a%2Fb/moved", sent])


def test_a_robots_txt_is_not_evaded_by_escapes() -> None:
    answers = {"/robots.txt": ("", b"User-agent: *\nDisallow: /secret/\nDisallow: /*?u=a%2Fb"), "/1": ("", image("1"))}
    hidden = ("/secret/1", "/%73ecret/1", "/x/../secret/1", "/x/%2E./secret/1", "\\secret\\1", "/x?u=a%2Fb")
    ends_of_all = ends([f"http://here{target}" for target in (*hidden, "/x/%2E./1")], answers)
    assert ends_of_all == [*[("refused", "robots.txt")] * len(hidden), KEPT]


def test_references_of_rfc_3986() -> None:
    """Its examples, 5.4: but "http:g" as browsers read it, which the RFC allows (5.4.2); fragments are not sent."""
    base = target_of("http://a/b/c/d;p?q")
    for reference, expected in {
        "g": "http://a/b/c/g", "./g": "http://a/b/c/g", "g/": "http://a/b/c/g/", "/g": "http://a/g", "//g": "http://g/",
        "?y": "http://a/b/c/d;p?y", "g?y": "http://a/b/c/g?y", "#s": "http://a/b/c/d;p?q", "g#s": "http://a/b/c/g",
        "g?y#s": "http://a/b/c/g?y", ";x": "http://a/b/c/;x", "g;x": "http://a/b/c/g;x", "": "http://a/b/c/d;p?q",
        "g;x?y#s": "http://a/b/c/g;x?y", ".": "http://a/b/c/", "./": "http://a/b/c/", "..": "http://a/b/",
        "../": "http://a/b/", "../g": "http://a/b/g", "../..": "http://a/", "../../": "http://a/", "../../g": "http://a/g",
        "../../../g": "http://a/g", "../../../../g": "http://a/g", "/./g": "http://a/g", "/../g": "http://a/g",
        "g.": "http://a/b/c/g.", ".g": "http://a/b/c/.g", "g..": "http://a/b/c/g..", "..g": "http://a/b/c/..g",
        "./../g": "http://a/b/g", "./g/.": "http://a/b/c/g/", "g/./h": "http://a/b/c/g/h", "g/../h": "http://a/b/c/h",
        "g;x=1/./y": "http://a/b/c/g;x=1/y", "g;x=1/../y": "http://a/b/c/y", "g?y/./x": "http://a/b/c/g?y/./x",
        "g?y/../x": "http://a/b/c/g?y/../x", "http:g": "http://a/b/c/g", "https://h//i": "https://h//i",
    }.items():  # fmt: skip
        assert str(target_of(reference, base)) == expected, reference


def test_a_name_that_is_not_ascii() -> None:
    assert str(target_of("HTTP://BÜCHER.example:8080/%7e")) == "http://xn--bcher-kva.example:8080/%7e"


def test_a_crawl_delay_is_asked_for_of_what_is_no_url() -> None:
    """Once any host has one."""

    async def delays() -> list[float]:
        async with Client(Settings()) as fetching:
            fetching._crawl_delays["a.example"] = 2.0
            return [fetching.crawl_delay(f"http://{host}/1.png") for host in ("a.example\\x", "b.example", "a:b")]

    assert asyncio.run(delays()) == [2.0, 0.0, 0.0]
