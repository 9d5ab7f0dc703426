"""Names that cannot be looked up, long headers, bodies that come compressed, faults of this machine and its proxy."""

from __future__ import annotations

import asyncio
import errno
import gzip
import socket
import zlib
from collections.abc import Mapping

import pytest
from data.fetch.faulty_server import image

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from megatron_lcl.data.fetch import client
from megatron_lcl.data.fetch.client import MAX_ROBOTS, Client, ProxyError, Retry
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.errors import UserError

Answers = Mapping[str, tuple[str, bytes]]
"""by path: the header's lines, perhaps after a status of its own, and the body"""
NO_NAMES = ("a..b", ".host", f"{'x' * 64}.example", "x" * 300)
NOT_A_URL = ("dead", "not a URL")


def ends(
    urls: list[str],
    answers: Answers,
    proxied: bool = False,
    max_bytes: int = 100_000,
    asked: list[str] | None = None,
) -> list[tuple[str, str]]:
    """What becomes of URLs, in which `here` stands for a server that gives `answers`; proxied: it is the proxy.

    asked: gets the paths that are asked for.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, target, _ = (await reader.readuntil(b"\r\n\r\n")).decode().split(" ", 2)
        if asked is not None:
            asked.append(target)
        headers, body = answers.get("/" + target.split("/")[-1], ("", b""))
        status = "302 Found" if "Location" in headers else "200 OK" if body or method == "CONNECT" else "404 Not Found"
        if headers[:3].isdecimal():
            status, _, headers = headers.partition("\r\n")
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
        writer.write(head.encode(errors="surrogateescape") + body)
        writer.close()

    async def all() -> list[tuple[str, str]]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            here = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            proxy = f"http://{here}" if proxied else None
            settings = Settings(allow_private=True, timeout=20, max_bytes=max_bytes, proxy=proxy)
            async with Client(settings) as fetching:
                rows = [(await fetching.fetch(url.replace("here", here))).row for url in urls]
        return [(row.status, row.reason) for row in rows]

    return asyncio.run(all())


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_cannot_be_looked_up(name: str, scheme: str) -> None:
    """Named by the list, by a redirect, by the redirect of a robots.txt."""
    answers = {"/moved": (f"Location: {scheme}://{name}/1.png\r\n", b"")}
    assert ends([f"{scheme}://{name}/1.png", "http://here/moved"], answers) == [NOT_A_URL] * 2
    answers = {"/robots.txt": answers["/moved"], "/1.png": ("", image("1"))}
    assert ends(["http://here/1.png"], answers) == [NOT_A_URL]


def test_a_name_that_a_proxy_is_not_asked_for() -> None:
    urls = [*(f"https://{name}/1.png" for name in NO_NAMES), "http://a\0b/1.png"]
    *refused, last = ends(urls, {"/1.png": ("", image("1"))}, proxied=True)
    assert refused == [NOT_A_URL] * len(NO_NAMES)
    assert last in (NOT_A_URL, ("kept", ""))  # earlier releases of aiohttp leave it to the proxy


def test_a_long_header() -> None:
    """Of an image, of a robots.txt, of a redirect."""
    policy = f"Content-Security-Policy: {'img-src https://example.org; ' * 1_000}\r\n"
    long = f"Location: /2.png?{'a' * 30_000}\r\n"
    answers = {
        "/robots.txt": (policy, b"User-agent: *\nDisallow: /secret"),
        "/1.png": (policy, image("1")),
        f"/2.png?{'a' * 30_000}": ("", image("2")),
        "/moved": (long, b""),
    }
    urls = ["http://here/1.png", "http://here/secret", "http://here/moved"]
    assert ends(urls, answers) == [("kept", ""), ("refused", "robots.txt"), ("kept", "")]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_redirect_is_followed(status: int) -> None:
    answers = {"/moved": (f"{status} Moved\r\nLocation: /1.png\r\n", b""), "/1.png": ("", image("1"))}
    assert ends(["http://here/moved"], answers) == [("kept", "")]


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        *(("/1.png", status, f"status {status}") for status in (408, 429, 500, 502, 503, 504)),
        ("/robots.txt", 429, "robots.txt: status 429"),
        ("/a.example:443", 503, "the proxy answers status 503"),
    ],
)
def test_what_may_pass_is_tried_again(path: str, status: int, reason: str) -> None:
    url, proxied = ("https://a.example/1.png", True) if ":" in path else ("http://here/1.png", False)
    with pytest.raises(Retry) as caught:
        ends([url], {"/1.png": ("", image("1")), path: (f"{status} Busy\r\n", b"")}, proxied)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("late", "reason"), [("_get", "robots.txt: not done after 20 s"), ("_rules", "not done after 20 s")]
)
def test_a_timeout_says_nothing_of_the_host(late: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a robots.txt that is late allows nothing."""

    def wait(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(Client, late, wait)
    with pytest.raises(Retry) as caught:
        ends(["http://here/1.png"], {})
    assert (caught.value.reason, caught.value.reached) == (reason, None)


def test_a_robots_txt_that_is_not_utf_8_is_kept() -> None:
    answers = {"/robots.txt": ("", b"# caf\xe9\nUser-agent: *\nDisallow: /a"), "/b": ("", image("1"))}
    assert ends(["http://here/a", "http://here/b"], answers) == [("refused", "robots.txt"), ("kept", "")]


def test_a_user_without_a_password() -> None:
    assert client._basic("me") == client._basic("m%65:") == "Basic bWU6"


def test_bodies_that_come_compressed() -> None:
    """Although they are asked for as they are: inflated up to the limit, and not where only the header says so."""
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 100_000
    answers = {
        "/robots.txt": ("Content-Encoding: gzip\r\n", gzip.compress(b"User-agent: *\nDisallow: /secret")),
        "/zipped": ("Content-Encoding: GZIP\r\n", gzip.compress(image("1"))),
        "/deflated": ("Content-Encoding: deflate\r\n", zlib.compress(image("2"))),
        "/raw": ("Content-Encoding: deflate\r\n", zlib.compress(image("6"), wbits=-zlib.MAX_WBITS)),
        "/members": ("Content-Encoding: x-gzip\r\n", b"".join(gzip.compress(image("7")[k:][:99]) for k in (0, 99))),
        "/padded": ("Content-Encoding: gzip\r\n", gzip.compress(image("8")) + b"\n"),
        "/plain": ("Content-Encoding: gzip\r\n", image("3")),
        "/odd": ("Content-Encoding: utf-8\r\n", image("4")),
        "/named": ("Content-Encoding: deflate\r\n", image("9")),
        "/brotli": ("Content-Encoding: br\r\n", image("5")),
        "/bomb": ("Content-Encoding: gzip\r\n", bomb),
        "/long": ("Content-Encoding: deflate\r\n", bytes(200_000)),
    }
    found = ends([f"http://here{path}" for path in ("/secret", *list(answers)[1:])], answers)
    assert found == [
        ("refused", "robots.txt"),
        *[("kept", "")] * 8,
        ("dead", "Content-Encoding br"),
        *[("refused", "over 100,000 bytes")] * 2,
    ]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_an_empty_robots_txt_allows_all(coding: str) -> None:
    answers = {"/robots.txt": (f"Content-Encoding: {coding}\r\n", b""), "/1.png": ("", image("1"))}
    assert ends(["http://here/1.png"], answers) == [("kept", "")]


def test_a_damaged_body_is_no_image() -> None:
    """Whose checksum is another: it has been inflated by then."""
    body = bytearray(gzip.compress(image("1")))
    body[-8] ^= 1
    assert ends(["http://here/1.png"], {"/1.png": ("Content-Encoding: gzip\r\n", bytes(body))}) != [("kept", "")]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "raw"])
def test_a_compressed_body_that_is_cut_is_asked_for_again(coding: str) -> None:
    """An image, whose beginning would be taken for all of it, and a robots.txt."""
    bits = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS, "raw": -zlib.MAX_WBITS}[coding]
    header = f"Content-Encoding: {'gzip' if coding == 'gzip' else 'deflate'}\r\n"
    body = zlib.compress(image("1") + bytes(1_000), wbits=bits)
    for path in ("/1.png", "/robots.txt"):
        with pytest.raises(Retry) as caught:
            ends(["http://here/1.png"], {"/1.png": ("", image("1")), path: (header, body[:-10])})
        assert caught.value.reason == "connection lost"


def test_a_robots_txt_in_a_coding_that_is_not_known_is_asked_for_once() -> None:
    asked: list[str] = []
    answers = {"/robots.txt": ("Content-Encoding: br\r\n", b"..."), "/1.png": ("", image("1"))}
    urls = ["http://here/1.png", "http://here/2.png"]
    assert ends(urls, answers, asked=asked) == [("refused", "robots.txt compressed")] * 2
    assert asked == ["/robots.txt"]


def test_a_compressed_robots_txt_is_read_up_to_its_limit() -> None:
    rules = b"User-agent: *\nDisallow: /a\n"
    text = rules + b"#" * (MAX_ROBOTS - len(rules)) + b"\nDisallow: /b\n"
    answers = {"/robots.txt": ("Content-Encoding: gzip\r\n", gzip.compress(text)), "/b": ("", image("1"))}
    assert ends(["http://here/a", "http://here/b"], answers) == [("refused", "robots.txt"), ("kept", "")]


def test_a_proxy_that_goes_away_before_a_robots_txt_ends_the_command() -> None:
    """Else the rest of the list would be dead."""

    async def fetch(proxy: str) -> None:
        async with Client(Settings(proxy=f"http://{proxy}")) as fetching:
            await fetching.fetch("http://host.example/1.png")

    with socket.socket() as closed:  # bound and not listening
        closed.bind(("127.0.0.1", 0))
        proxy = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ProxyError, match=rf"the proxy {proxy} refuses \(no connection\)"):
            asyncio.run(fetch(proxy))


def test_too_many_open_files_at_a_robots_txt_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    async def fetch() -> None:
        async with Client(Settings()) as fetching:
            await fetching.fetch("http://127.0.0.1:9/1.png")

    monkeypatch.setattr(client, "public_socket", no_more)
    with pytest.raises(UserError, match="too many open files: raise `ulimit -n`"):
        asyncio.run(fetch())
