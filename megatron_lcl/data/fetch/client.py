"""One URL: fetched, or why not. The rules that every request keeps are here; whose turn it is, is `schedule.py`'s.

robots.txt as RFC 9309 says (Koster et al. 2022): longest match, 4xx allows all, 5xx and no answer allow nothing;
`X-Robots-Tag: noai` and `noimageai` (img2dataset, Beaumont 2021, honors the same) refuse an image. Needs the extra
`fetch`: aiohttp and Protego.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import functools
import hashlib
import re
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import TracebackType
from urllib.parse import unquote_to_bytes

from megatron_lcl.data.corpus.probe import TOO_MANY_PIXELS, BadImage, downscale, probe
from megatron_lcl.data.fetch.addresses import PrivateAddress, is_public, public_socket
from megatron_lcl.data.fetch.settings import Settings, proxy_parts
from megatron_lcl.data.fetch.store import Row, Status
from megatron_lcl.data.storage.open_files import allow_open_files
from megatron_lcl.errors import UserError

try:
    import aiohttp
    from protego import Protego
    from yarl import URL

    from megatron_lcl.data.fetch.targets import target_of
except ImportError as error:
    raise UserError(f"{error.name} is not installed: pip install 'megatron-lcl[fetch]'") from None

MAX_REDIRECTS = 5
MAX_ROBOTS = 500 << 10
"""bytes of a robots.txt that are read (RFC 9309, 2.5)"""
MAX_RULES = 1_000_000
"""lines of a robots.txt, each counted once for every agent of its group, as Protego keeps it"""
MAX_WAIT = 600.0
"""seconds; a host that asks by Retry-After or Crawl-delay to wait longer is not asked again"""
MAX_CLOCK_ERROR = 86_400.0
"""seconds; a clock that differs by more from those of all hosts that say the time is wrong"""
_REDIRECTS = (301, 302, 303, 307, 308)
_TEMPORARY = (408, 429, 500, 502, 503, 504)
_ROBOTS_KEPT, _ROBOTS_SECONDS = 20_000, 86_400.0
"""robots.txt files in memory, and for how long (RFC 9309, 2.4)"""
_MAX_LINE = 65_536
"""bytes of a header; a Content-Security-Policy may be longer than the 8,190 that aiohttp takes"""
_KEEP_ALIVE = 5.0
"""seconds that a connection waits for another request"""
_RESOLVERS = 64
"""threads, as getaddrinfo waits in one"""
_OPT_OUTS = ("noai", "noimageai")
_DIRECTIVES_WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_LOCAL_NAMES = ("localhost", "local", "internal")
_RULE = re.compile(r"(dis)?allow\s*:")
"""a line behind which an agent begins another group"""
_TOO_LONG, _ENCODED = (Protego.parse("User-agent: *\nDisallow: /") for _ in range(2))
"""stand for a robots.txt of more than MAX_RULES, and for one whose Content-Encoding is not known"""
_GZIP = b"\x1f\x8b"
"""how a gzip file begins"""
_UNKNOWN_CODINGS = ("br", "zstd", "compress")
_NOT_FOUND = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


class ProxyError(UserError):
    """The proxy lets nothing through."""


class _Given(Exception):
    """A URL's end without an image."""

    def __init__(
        self, status: Status, reason: str, reached: bool | None = True, leave: bool = False, alone: bool = False
    ) -> None:
        self.status, self.reason, self.reached, self.leave, self.alone = status, reason, reached, leave, alone


class Retry(Exception):
    """What may go better the next time. `wait`: seconds that the server asks for; `reached`: as of `Outcome`."""

    def __init__(self, reason: str, wait: float = 0.0, reached: bool | None = True) -> None:
        self.reason, self.wait, self.reached = reason, wait, reached


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a URL."""

    row: Row
    data: bytes = b""
    reached: bool | None = True
    """whether the host was reached; None where that was not tried or is not known"""
    leave: bool = False
    """the host wants no more requests for a long time"""
    alone: bool = False
    """other URLs of the host may be reached all the same"""


class Client:
    """Fetches images, many at a time, in the event loop in which it is entered (`async with`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._agent = settings.user_agent.partition("/")[0].strip()
        self._proxy, login = proxy_parts(settings.proxy) if settings.proxy else ("", "")
        """without credentials"""
        self._login = _basic(login) if login else ""
        self._robots: dict[str, tuple[float, asyncio.Task[Protego | None]]] = {}
        """by origin; since when, by the event loop's time"""
        self._crawl_delays: dict[str, float] = {}
        self.clock_error: float | None = None
        """seconds by which our clock is ahead, by the host that differs least so far; None: none has said the time"""

    async def __aenter__(self) -> Client:
        settings = self._settings
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_RESOLVERS, "resolve"))
        self._decoder = ThreadPoolExecutor(1, "decode")
        allow_open_files()  # connections that are kept for a while are many with many hosts
        checked = None if settings.allow_private or settings.proxy else public_socket
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, ttl_dns_cache=300, keepalive_timeout=_KEEP_ALIVE, socket_factory=checked
            ),
            timeout=aiohttp.ClientTimeout(total=None, connect=min(10.0, settings.timeout)),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": settings.user_agent, "Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity"},
            auto_decompress=False,  # it has no limit before aiohttp 3.13.3 (CVE-2025-69223)
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        await self._session.close()
        self._decoder.shutdown(cancel_futures=True)

    async def fetch(self, url: str) -> Outcome:
        """The image of a URL, or why there is none. Retry where it may be there later; ProxyError."""
        try:
            async with asyncio.timeout(self._settings.timeout):
                with _named_errors(self._proxy):
                    data = await self._image(url)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._decoder, _checked, url, data, self._settings)
        except _Given as given:
            return Outcome(
                Row(url, given.status, given.reason), reached=given.reached, leave=given.leave, alone=given.alone
            )
        except TimeoutError:
            raise Retry(f"not done after {self._settings.timeout:g} s", reached=None) from None

    def crawl_delay(self, url: str) -> float:
        """Seconds between requests that the robots.txt of a URL's host asks for; 0 where it does not."""
        try:
            return self._crawl_delays.get(_parsed(url).raw_host or "", 0.0) if self._crawl_delays else 0.0
        except _Given:  # it is not a URL
            return 0.0

    async def reach(self, url: str) -> None:
        """Ask for a URL, whatever it answers. ProxyError where a proxy does not even connect to its host."""
        try:
            async with asyncio.timeout(self._settings.timeout), self._get(_parsed(url)) as response:
                status = response.status
        except aiohttp.ClientHttpProxyError as error:
            raise ProxyError(_says(self._proxy, f"status {error.status}")) from None
        except aiohttp.ClientProxyConnectionError:
            raise ProxyError(_says(self._proxy, "no connection")) from None
        except (_Given, aiohttp.ClientError, TimeoutError, ValueError):
            return
        if status == 407:
            raise ProxyError(_says(self._proxy, "status 407"))

    async def _image(self, url: str) -> bytes:
        target, seen = _parsed(url), set[URL]()
        while True:
            if target in seen:
                raise _Given("dead", "redirect loop")
            if len(seen) > MAX_REDIRECTS:
                raise _Given("dead", f"more than {MAX_REDIRECTS} redirects")
            seen.add(target)
            self._check_name(target)
            rules = await self._rules(target)
            if rules is not None and not rules.can_fetch(str(target), self._agent):
                odd = " too long" if rules is _TOO_LONG else " compressed" if rules is _ENCODED else ""
                raise _Given("refused", f"robots.txt{odd}")
            async with self._get(target) as response:
                self._compare_clocks(response.headers)
                if opted_out(response.headers.getall("X-Robots-Tag", ()), self._agent):
                    raise _Given("refused", "X-Robots-Tag")
                if response.status in _REDIRECTS and "Location" in response.headers:
                    target = _parsed(response.headers["Location"], target)
                    continue
                self._check_status(response)
                return await self._content(response)

    def _get(self, target: URL) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if not self._proxy:
            return self._session.get(target, allow_redirects=False)
        # not in the proxy's URL nor as `proxy_auth`, which stand in aiohttp's text of a connection, and so in warnings
        login = {"Proxy-Authorization": self._login} if self._login else {}
        ask = functools.partial(self._session.get, target, allow_redirects=False, proxy=f"http://{self._proxy}")
        # of https a host gets what is among `headers`, and the proxy does not
        return ask(headers=login) if target.scheme == "http" else ask(proxy_headers=login)

    def _compare_clocks(self, headers: Mapping[str, str]) -> None:
        """One host that agrees is enough: others may have a wrong clock themselves."""
        if self.clock_error is not None and abs(self.clock_error) <= MAX_CLOCK_ERROR:
            return
        said, age = _timestamp(headers.get("Date", "")), headers.get("Age", "").strip()
        if said is not None:  # of a cache: when the answer was made (RFC 9111, 5.1)
            error = time.time() - said - (float(age) if age.isdecimal() and len(age) < 10 else 0.0)
            self.clock_error = min(error, error if self.clock_error is None else self.clock_error, key=abs)

    def _check_status(self, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status == 407 and self._settings.proxy:
            raise ProxyError(_says(self._proxy, "status 407"))
        if status in _TEMPORARY:
            wait = _retry_after(response.headers)
            if wait > MAX_WAIT:
                raise _Given("dead", f"status {status}, asks for a long wait", leave=True)
            raise Retry(f"status {status}", wait)
        if status != 200:
            raise _Given("dead", f"status {status}")

    async def _content(self, response: aiohttp.ClientResponse) -> bytes:
        """The response's body. A longer one than wanted is not read to its end."""
        limit = self._settings.max_bytes
        chunks, size = [], response.content_length or 0
        if size <= limit:
            size = 0
            async for chunk in response.content.iter_any():
                chunks.append(chunk)
                size += len(chunk)
                if size > limit:
                    break
        if size > limit:
            raise _Given("refused", f"over {limit:,} bytes")
        body = b"".join(chunks)
        if "Content-Encoding" in response.headers:  # few have one; to inflate much takes long
            body = await asyncio.to_thread(_inflated, body, response.headers, limit)
        if len(body) > limit:
            raise _Given("refused", f"over {limit:,} bytes")
        return body

    def _check_name(self, target: URL) -> None:
        """A proxy resolves names itself, so what names a local machine is refused here by its name."""
        checked = self._settings.proxy and not self._settings.allow_private
        if checked and not _may_be_public((target.host or "").rstrip(".")):
            raise _Given("refused", str(PrivateAddress()), reached=None)

    async def _rules(self, target: URL) -> Protego | None:
        """The robots.txt of a URL's host, asked for once a day; None: none. Retry where it cannot be had."""
        origin = str(target.origin())
        now = asyncio.get_running_loop().time()
        kept = self._robots.get(origin)
        if kept is None or now - kept[0] >= _ROBOTS_SECONDS:
            self._robots.pop(origin, None)
            while len(self._robots) >= _ROBOTS_KEPT:
                self._robots.pop(next(iter(self._robots)))
            kept = self._robots[origin] = now, asyncio.create_task(self._read_rules(target.origin()))
            kept[1].add_done_callback(lambda task: self._keep_if_had(origin, task))
        return await asyncio.shield(kept[1])

    def _keep_if_had(self, origin: str, task: asyncio.Task[Protego | None]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed and self._robots.get(origin, (0.0, None))[1] is task:
            del self._robots[origin]

    async def _read_rules(self, origin: URL) -> Protego | None:
        target = origin / "robots.txt"
        try:
            async with asyncio.timeout(self._settings.timeout):
                with _named_errors(self._proxy):
                    for _ in range(MAX_REDIRECTS + 1):
                        self._check_name(target)
                        async with self._get(target) as response:
                            self._compare_clocks(response.headers)
                            if response.status in _REDIRECTS and "Location" in response.headers:
                                target = _parsed(response.headers["Location"], target)
                                continue
                            if response.status == 429 or response.status >= 500:
                                wait = _retry_after(response.headers)
                                raise Retry(f"robots.txt: status {response.status}", min(wait, MAX_WAIT))
                            if response.status != 200:
                                return None
                            if _coding(response.headers) in _UNKNOWN_CODINGS:
                                return _ENCODED
                            text = _inflated(await _beginning(response, MAX_ROBOTS), response.headers, MAX_ROBOTS)
                            rules = _parsed_rules(text[:MAX_ROBOTS].decode(errors="replace"))
                            if delay := rules.crawl_delay(self._agent):
                                self._crawl_delays[origin.raw_host or ""] = delay
                            return rules
        except TimeoutError:
            raise Retry(f"robots.txt: not done after {self._settings.timeout:g} s", reached=None) from None
        return None  # too many redirects: none that can be had


def _parsed_rules(text: str) -> Protego:
    kept, agents, ended = 0, 0, False
    for line in map(str.strip, text.lower().splitlines()):
        if line.startswith("user"):  # "user agent x" is one for Protego, too
            agents, ended = (1, False) if ended else (agents + 1, False)
        elif _RULE.match(line):
            ended = True
        kept += agents
    return Protego.parse(text) if kept <= MAX_RULES else _TOO_LONG


def opted_out(values: Iterable[str], agent: str) -> bool:
    """Whether X-Robots-Tag headers forbid use for training: noai or noimageai, for all or for `agent` by name."""
    for value in values:
        named = "*"
        for word in value.lower().split(","):
            name, colon, rest = word.partition(":")
            if colon and name.strip() not in _DIRECTIVES_WITH_VALUES:
                named, word = name.strip(), rest
            if word.strip() in _OPT_OUTS and named in ("*", agent.lower()):
                return True
    return False


@contextmanager
def _named_errors(proxy: str) -> Iterator[None]:
    """What aiohttp raises as what it means for the URL. proxy: its address, without credentials."""
    try:
        yield
    except UserError:  # named already, as by the robots.txt of the host; it is a ValueError, too
        raise
    except aiohttp.ClientProxyConnectionError:
        raise ProxyError(_says(proxy, "no connection")) from None
    except aiohttp.ClientHttpProxyError as error:
        if error.status == 407:
            raise ProxyError(_says(proxy, "status 407")) from None
        if error.status in _TEMPORARY:
            raise Retry(f"the proxy answers status {error.status}", reached=None) from None
        raise _Given("dead", f"the proxy answers status {error.status}", reached=None) from None
    except aiohttp.ClientConnectorCertificateError:
        # where the clock is wrong, or there are no authorities, this holds for all hosts: as if none were reached
        # (but plain http goes on, and it may be that of another host, to which this one redirects)
        raise _Given("dead", "certificate not valid", reached=False, alone=True) from None
    except aiohttp.ClientConnectorDNSError as error:
        if error.os_error.errno in _NOT_FOUND:
            raise _Given("dead", "host not found", reached=False) from None
        raise Retry("name not resolved", reached=False) from None
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, PrivateAddress):
            raise _Given("refused", str(error.os_error), reached=None) from None
        if error.os_error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError("too many open files: raise `ulimit -n`, or give a smaller --concurrency") from None
        raise Retry("no connection", reached=False) from None
    except aiohttp.ConnectionTimeoutError:
        raise Retry("no connection", reached=False) from None
    except ValueError:  # InvalidURL; of a name: UnicodeError as it is looked up (a..b), ssl's own of it (.host)
        raise _Given("dead", "not a URL", reached=None) from None
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
        raise Retry("connection lost") from None
    except aiohttp.ClientError:
        raise _Given("dead", "malformed HTTP") from None


def _may_be_public(host: str) -> bool:
    """Whether a host is a public address, in any spelling that C libraries read (2852039166, 0xa9fea9fe, 127.1), or a
    name that is not one of local machines."""
    try:
        return is_public(host)
    except ValueError:  # no address as the standards write one
        pass
    try:
        return is_public(socket.inet_ntoa(socket.inet_aton(host)))
    except (OSError, ValueError):  # a name
        return host.rpartition(".")[2].lower() not in _LOCAL_NAMES


def _parsed(text: str, base: URL | None = None) -> URL:
    """A URL of the web."""
    try:
        url = target_of(text, base)
        usable = url.scheme in ("http", "https") and bool(url.host) and url.port is not None
    except (ValueError, TypeError):
        raise _Given("dead", "not a URL", reached=None) from None
    if not usable:
        raise _Given("refused" if base else "dead", "redirect to what is not http" if base else "not a URL")
    return url


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, from a number or a date; 0 where nothing is said."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    until, now = _timestamp(text), _timestamp(headers.get("Date", ""))
    if until is None:
        return 0.0
    if now is None:  # our clock may be wrong, so the host is not to be left for this
        return min(max(0.0, until - time.time()), MAX_WAIT)
    return max(0.0, until - now)


def _timestamp(date: str) -> float | None:
    """Seconds since 1970 of a date in a header; None where it is none."""
    try:
        parsed = parsedate_to_datetime(date)
        # of the forms that RFC 9110, 5.6.7, has, one names no zone; all are UTC
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


async def _beginning(response: aiohttp.ClientResponse, limit: int) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) >= limit:
            break
    return bytes(content[:limit])


def _coding(headers: Mapping[str, str]) -> str:
    return headers.get("Content-Encoding", "").strip().lower()


def _inflated(body: bytes, headers: Mapping[str, str], limit: int) -> bytes:
    """A body without its Content-Encoding, of no more than `limit` + 1 bytes: some send gzip to whom asks for identity.

    What is no coding (utf-8, binary, none) is sent by mistake and says nothing. Retry where the body is cut; what is
    as long as the limit may have been cut by the reader.
    """
    coding = _coding(headers)
    if coding in _UNKNOWN_CODINGS:
        raise _Given("dead", f"Content-Encoding {coding}")
    if coding not in ("gzip", "x-gzip", "deflate"):
        return body
    found, left = b"", body
    while (
        left and len(found) <= limit and (not found or left.startswith(_GZIP))
    ):  # a gzip file may have several members
        try:
            stream = zlib.decompressobj(_window(left, coding))
            found += stream.decompress(left, limit + 1 - len(found))
        except zlib.error:
            return body  # compressed in name alone, or damaged
        if not stream.eof and len(found) <= limit and len(body) < limit:  # else it is the beginning of a robots.txt
            raise Retry("connection lost")
        left = stream.unused_data
    return found


def _window(body: bytes, coding: str) -> int:
    """zlib's `wbits` for a gzip file (RFC 1952), for zlib's format, or, as some send it, for deflate without a header
    (RFC 9110, 8.4.1.2)."""
    if body.startswith(_GZIP) or coding != "deflate":
        return 16 + zlib.MAX_WBITS
    has_header = body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


def _basic(login: str) -> str:
    """The header of user:password as they stand in a URL (RFC 7617)."""
    return "Basic " + base64.b64encode(unquote_to_bytes(login if ":" in login else f"{login}:")).decode()


def _says(proxy: str, what: str) -> str:
    return f"the proxy {proxy} refuses ({what}): give another --proxy, or none"


def _checked(url: str, data: bytes, settings: Settings) -> Outcome:
    """Whether the bytes are an image, which is scaled down if that is wanted."""
    try:
        found = probe(data, settings.max_pixels)
        side = settings.max_image_side
        if side is not None and max(found.width, found.height) > side:
            data = downscale(data, side)
            found = probe(data)
    except BadImage as bad:
        status: Status = "refused" if str(bad) == TOO_MANY_PIXELS else "dead"
        return Outcome(Row(url, status, str(bad)))
    digest = hashlib.sha256(data).hexdigest()
    return Outcome(Row(url, "kept", "", digest, len(data), found.width, found.height, found.format), data)
