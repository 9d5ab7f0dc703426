"""What a fetch refuses: addresses, redirects to them, names that change, certificates, opt-outs, robots.txt."""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from data.fetch.faulty_server import image, requests_of, serving
from data.fetch.stores import read_rows

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.probe import MAX_PIXELS
from megatron_lcl.data.fetch import addresses, client
from megatron_lcl.data.fetch.addresses import is_public
from megatron_lcl.data.fetch.client import Client, Outcome, ProxyError, Retry, opted_out
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.data.fetch.work import GIVE_UP

Server = tuple[list[str], int]
SETTINGS = Settings(timeout=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as (names, port):
        yield names, port


def fetch(*urls: str, settings: Settings = SETTINGS) -> list[Outcome]:
    """One after the other, by one client."""

    async def all() -> list[Outcome]:
        async with Client(settings) as fetching:
            return [await fetching.fetch(url) for url in urls]

    return asyncio.run(all())


def ends(*urls: str, settings: Settings = SETTINGS) -> list[tuple[str, str]]:
    return [(outcome.row.status, outcome.row.reason) for outcome in fetch(*urls, settings=settings)]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
        *("192.0.0.192", "168.63.129.16", "::ffff:168.63.129.16"),
        *("255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1"),
        *(
            "::ffff:127.0.0.1",
            "::ffff:100.64.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a00:1",
            "64:ff9b:1::a00:1",
            "64:ff9b:1:fffe::1",
            "fec0::1",
            "2002:7f00:1::",
            "2002:a00:1::",
        ),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "151.101.1.1", "168.63.129.17", "172.32.0.1", "2606:4700::1", "::ffff:8.8.8.8"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_private_addresses_are_refused(server: Server) -> None:
    """By number, in unusual spelling, and by name: nothing is asked of them, robots.txt neither."""
    _, port = server
    before = requests_of(*server)
    for name in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "me@127.0.0.1"):
        assert ends(f"http://{name}:{port}/ok/1") == [("refused", "private address")], name
    for name in ("2130706433", "0x7f.1", "127.1", "0"):
        try:
            assert ends(f"http://{name}:{port}/ok/1")[0] in (("refused", "private address"), ("dead", "not a URL")), (
                name
            )
        except Retry as retry:  # a resolver that does not take the spelling
            assert retry.reason == "name not resolved"  # noqa: PT017
    assert requests_of(*server) == before
    assert ends(f"http://127.0.0.1:{port}/ok/1", settings=Settings(allow_private=True)) == [("kept", "")]


def test_spellings_of_private_addresses_that_a_proxy_is_not_asked_for() -> None:
    """A proxy's resolver may read them: nothing listens at this one, so that a URL it is asked for ends otherwise."""
    settings = Settings(timeout=20, proxy="http://127.0.0.1:9")
    for host in ("2852039166", "0xa9fea9fe", "169.254.43518", "0251.0376.0251.0376", "127.1", "127.0.0.1.", "0"):
        assert ends(f"http://{host}/1.jpg", settings=settings) == [("refused", "private address")], host
    for host in ("134744072", "0x8.8.8.8", "a.example"):
        with pytest.raises(ProxyError):
            fetch(f"http://{host}/1.jpg", settings=settings)


def test_redirect_to_a_private_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    _, port = server
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.2")
    assert ends(f"http://127.0.0.2:{port}/moved/1", f"http://127.0.0.2:{port}/inside/1") == [
        ("kept", ""),
        ("refused", "private address"),
    ]


def test_name_that_resolves_to_another_address_later(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: a public address when it is looked at, a private one when it is connected to."""
    _, port = server
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.2")
    asked: list[str] = []

    def resolve(host: Any, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        address = "127.0.0.2" if len(asked) % 2 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    async def later() -> list[tuple[str, str]]:
        found = []
        async with Client(SETTINGS) as fetching:
            for _ in range(2):
                outcome = await fetching.fetch(f"http://rebinding.example:{port}/ok/1")
                found.append((outcome.row.status, outcome.row.reason))
                await fetching._session.connector.close()  # type: ignore[union-attr]  # no connection is left open
                await fetching.__aenter__()
                fetching._robots.clear()
        return found

    assert asyncio.run(later()) == [("kept", ""), ("refused", "private address")]
    assert asked == ["rebinding.example"] * 2


def test_redirect_to_another_scheme() -> None:
    with pytest.raises(client._Given) as given:
        client._parsed("file:///etc/passwd", client.URL("http://example.org/"))
    assert (given.value.status, given.value.reason) == ("refused", "redirect to what is not http")


def test_certificates_are_verified(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A self-signed certificate: refused where it is not known, taken where the system knows it. Where no host's is
    valid, as with a wrong clock, no URL is marked as dead."""
    pem = Path(__file__).with_name("self_signed.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    listening = socket.create_server(("", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as opened:
                    wanted = opened.recv(4096)
                    body = b"" if b"robots" in wanted else image("1")
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                    opened.sendall(head.encode() + body)
            except OSError:
                plain.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        port = listening.getsockname()[1]
        url = f"https://127.0.0.1:{port}/1.png"
        others = [f"https://127.0.0.2:{port}/{k}.png" for k in range(GIVE_UP + 2)]
        settings = Settings(allow_private=True, timeout=20)
        assert ends(url, settings=settings) == [("dead", "certificate not valid")]
        (tmp_path / "urls.txt").write_text("\n".join([url, *others]))
        words = ["fetch", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "store"), "--allow-private"]
        assert main(words) == 2
        assert "or are the clock or the certificates of this machine wrong" in capsys.readouterr().err
        assert not list(read_rows(tmp_path / "store"))
        trusted = ssl.create_default_context(cafile=str(pem))
        monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusted)
        assert ends(url, settings=settings) == [("kept", "")]
        assert main(words) == 0
        assert {row["url"]: row["reason"] for row in read_rows(tmp_path / "store")} == {
            url: "",
            **dict.fromkeys(others, "certificate not valid"),  # it names 127.0.0.1 alone; the host is not given up
        }
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)


@pytest.mark.parametrize(
    ("headers", "out"),
    [
        ([], False),
        (["noindex, nofollow"], False),
        (["noai"], True),
        (["noindex, NOIMAGEAI"], True),
        (["noindex", "noai"], True),
        (["otherbot: noai"], False),
        (["otherbot: noindex, noai"], False),
        (["Megatron-LCL: noai"], True),
        (["otherbot: noindex, megatron-lcl: noimageai"], True),
        (["max-snippet: 20, noai"], True),
        (["noaim"], False),
    ],
)
def test_opt_outs(headers: list[str], out: bool) -> None:
    """The agent's name holds for the words after it, as in Google's specification of the header."""
    assert opted_out(headers, "megatron-lcl") is out


def test_robots_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 9309, 2.3.1: 4xx allows all; 5xx allows nothing until it is had. 2.4: kept for a day."""
    status = {"robots": "404 Not Found"}
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wanted = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
        asked.append(wanted)
        line, body = (status["robots"], b"") if wanted == b"/robots.txt" else ("200 OK", image("1"))
        writer.write(f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        writer.close()

    async def all() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/1.png"
        settings = Settings(allow_private=True, timeout=20)
        async with Client(settings) as fetching:
            assert (await fetching.fetch(url)).row.status == "kept"
            assert (await fetching.fetch(url)).row.status == "kept"
            assert asked == [b"/robots.txt", b"/1.png", b"/1.png"]  # asked for once
            loop = asyncio.get_running_loop()
            now = loop.time
            monkeypatch.setattr(loop, "time", lambda: now() + 86_000)
            assert (await fetching.fetch(url)).row.status == "kept"
            monkeypatch.setattr(loop, "time", lambda: now() + 86_400)
            assert (await fetching.fetch(url)).row.status == "kept"
            assert asked[3:] == [b"/1.png", b"/robots.txt", b"/1.png"]  # and once more after a day
        status["robots"] = "500 Oh"
        asked.clear()
        async with Client(settings) as fetching:
            for _ in range(2):
                with pytest.raises(Retry) as retry:
                    await fetching.fetch(url)
                assert retry.value.reason == "robots.txt: status 500"
            assert asked == [b"/robots.txt"] * 2
            status["robots"] = "404 Not Found"
            assert (await fetching.fetch(url)).row.status == "kept"
        server.close()

    asyncio.run(all())


@pytest.fixture
def east_of_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "EAST-5")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("east_of_utc")
@pytest.mark.parametrize(
    ("until", "date", "seconds"),
    [
        ("90", "", 90),
        ("Sun, 06 Nov 1994 08:50:37 GMT", "Sun, 06 Nov 1994 08:49:37 GMT", 60),  # whatever this machine's clock says
        ("Sunday, 06-Nov-94 08:50:37 GMT", "Sun Nov  6 08:49:37 1994", 60),
        ("Sun Nov  6 08:50:37 1994", "Sun, 06 Nov 1994 08:49:37 GMT", 60),
        ("Sun, 06 Nov 1994 08:50:37 -0000", "Sun, 06 Nov 1994 08:49:37 GMT", 60),
        ("Sun, 06 Nov 1994 08:48:37 GMT", "Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Fri, 01 Jan 2100 00:01:00 GMT", "", 60),
        ("Fri, 01 Jan 2100 00:01:00 GMT", "today", 60),
        ("Fri Jan  1 00:01:00 2100", "", 60),
        ("Fri, 01 Jan 2100 02:00:00 GMT", "", client.MAX_WAIT),  # our clock may be two hours behind
        ("Fri, 01 Jan 2100 02:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT", 7200),
        ("soon", "Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("", "", 0),
    ],
)
def test_retry_after(until: str, date: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the server, where it says the time."""
    monkeypatch.setattr(time, "time", lambda: datetime(2100, 1, 1, tzinfo=UTC).timestamp())
    headers = {name: value for name, value in (("Retry-After", until), ("Date", date)) if value}
    assert client._retry_after(headers) == seconds


def test_the_clock_is_compared_with_those_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that answer; what a cache gives was made as long ago as it says."""
    days = ("Fri, 14", "Mon, 03", "Sat, 08")
    said = iter(["", *(f"{day} Jan 2000 00:00:00 GMT" + "\r\nAge: 86400" * (day == days[-1]) for day in days)])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wanted = await reader.readuntil(b"\r\n\r\n")
        date = "" if b"/robots.txt" in wanted else next(said)
        head = f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        writer.close()

    async def all() -> list[float | None]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        monkeypatch.setattr(time, "time", lambda: datetime(2000, 1, 10, tzinfo=UTC).timestamp())
        async with Client(Settings(allow_private=True, timeout=20)) as fetching:
            errors = []
            for _ in range(4):
                await fetching.fetch(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/1.png")
                errors.append(fetching.clock_error)
        server.close()
        return errors

    assert asyncio.run(all()) == [None, -4 * 86_400, -4 * 86_400, 86_400]


@pytest.mark.parametrize("agent", ["User-agent: bot{}", "useragent:{}", "  user  agent bot{}", "USER AGENT: {}*"])
def test_robots_whose_rules_are_too_many(agent: str) -> None:
    """However an agent is written; one that is long by its rules alone, or by its agents, is read."""
    ours = "user-agent: ours\ndisallow: /a\nuser-agent: *\n"
    for agents, rules, said in ((300, 3_000, False), (10, 50_000, False), (300, 3_300, True), (2_000, 1, True)):
        lines = [*map(agent.format, range(agents)), *["disallow: /b"] * rules]
        parsed = client._parsed_rules(ours + "\n".join(lines))
        assert (parsed is client._TOO_LONG) == said
        assert parsed.can_fetch("/b", "ours") != said
        assert not parsed.can_fetch("/a", "ours")
        assert not parsed.can_fetch("/b", "another")


def test_a_robots_txt_that_names_many_agents_is_read() -> None:
    """As those do that refuse hundreds of crawlers by name, in a group each."""
    groups = "\n".join(f"User-agent: bot-{n}\nDisallow: /\n" for n in range(2_000))
    rules = client._parsed_rules(f"{groups}\nUser-agent: *\nDisallow: /a")
    assert [rules.can_fetch("/b", agent) for agent in ("bot-7", "ours")] == [False, True]


def test_as_many_pixels_as_a_corpus_takes() -> None:
    assert Settings().max_pixels == MAX_PIXELS


@pytest.mark.parametrize(("size", "stored"), [((8, 2), (4, 1)), ((2, 8), (1, 4)), ((4, 3), None)])
def test_the_longer_side_is_bounded(size: tuple[int, int], stored: tuple[int, int] | None) -> None:
    """An image within the bound is stored as it came."""
    PIL.Image.new("RGB", size).save(out := io.BytesIO(), "PNG")
    found = client._checked("http://a.example/1.png", out.getvalue(), Settings(max_image_side=4))
    assert (found.row.width, found.row.height) == (stored or size)
    assert (found.data == out.getvalue()) == (stored is None)
