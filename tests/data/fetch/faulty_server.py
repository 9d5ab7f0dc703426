"""A web server on loopback addresses whose paths say what is wrong with it: /KIND/NUMBER.

    python faulty_server.py PORT_FILE [ADDRESSES]

`photo.jpg` beside the port file, if it is there, is what `/photo/…` answers.

Each kind is a method of `_Connection`; `EXPECTED` says what a fetch makes of it. `/stats` counts requests by path.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

EXPECTED = {
    "ok": ("kept", ""),
    "moved": ("kept", ""),
    "busy": ("kept", ""),
    "reset": ("dead", "connection lost"),
    "drip": ("dead", "not done after 10 s"),
    "long": ("dead", "connection lost"),
    "short": ("dead", "malformed HTTP"),
    "html": ("dead", "HTML, not an image"),
    "loop": ("dead", "redirect loop"),
    "hops": ("dead", "more than 5 redirects"),
    "gone": ("dead", "status 404"),
    "down": ("dead", "status 503"),
    "optout": ("refused", "X-Robots-Tag"),
    "secret": ("refused", "robots.txt"),
    "large": ("refused", "over 100,000 bytes"),
}
"""with --timeout 10 --max-bytes 100000"""
WANTS_CREDENTIALS = "127.0.0.2"
"""the address at which it is a proxy that wants LOGIN; at others it answers itself"""
LOGIN = "me:the-right-password"
_ROBOTS = b"User-agent: *\nDisallow: /secret/\n"
_LINES = [*(f"useragent:{k}" for k in range(1_800)), *["allow:/"] * 3_200]
ODD_ROBOTS = {
    "127.0.0.11": "\n".join(_LINES).encode(),  # of 5.8 million rules, if each agent keeps its own
    **dict.fromkeys(("127.0.0.12", "127.0.0.13"), b"User-agent: *\nCrawl-delay: 1e9\n"),
}
"""the robots.txt of some addresses"""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_HEADER = _SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 6, 8, 2, 0, 0, 0))
_PIXELS = _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(range(k, k + 24)) for k in range(6)))) + _chunk(
    b"IEND", b""
)


def image(number: str) -> bytes:
    """A PNG of 8 x 6 pixels that no other number has."""
    return _HEADER + _chunk(b"tEXt", b"number\0" + number.encode()) + _PIXELS


class _Connection(asyncio.Protocol):
    requests: ClassVar[Counter[str]] = Counter()
    asked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.received.endswith(b"\r\n\r\n"):
            return
        method, path, _ = self.received.decode().split(" ", 2)
        received, self.received = self.received, b""
        if method == "CONNECT" or path.startswith("http://"):  # as a proxy is asked
            wanted = self.transport.get_extra_info("sockname")[0] == WANTS_CREDENTIALS
            if wanted and b"Proxy-Authorization: Basic " + base64.b64encode(LOGIN.encode()) not in received:
                self.answer(b"", "407 Proxy Authentication Required")
                return
            path = "/" + path.split("/", 3)[-1]
        if path != "/stats":
            self.requests[path] += 1
        kind, _, number = path.strip("/").partition("/")
        getattr(self, kind.replace(".", "_"), self.gone)(number)

    def answer(self, body: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = None) -> None:
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)

    def stats(self, _: str) -> None:
        self.answer(json.dumps(self.requests).encode())

    def robots_txt(self, _: str) -> None:
        self.answer(ODD_ROBOTS.get(self.transport.get_extra_info("sockname")[0], _ROBOTS))

    def ok(self, number: str) -> None:
        self.answer(image(number))

    photograph = b""

    def photo(self, _: str) -> None:
        self.answer(self.photograph)

    def moved(self, number: str) -> None:
        self.answer(b"", "302 Found", f"Location: /ok/{number}")

    def busy(self, number: str) -> None:
        if self.requests[f"/busy/{number}"] == 1:
            self.answer(b"", "429 Too Many Requests", "Retry-After: 0")
        else:
            self.answer(image(number))

    def wait(self, number: str) -> None:
        """Says how long to wait, and tells by its image how long it was."""
        if self.requests[f"/wait/{number}"] == 1:
            type(self).asked = time.monotonic()
            self.answer(b"", "503 Service Unavailable", "Retry-After: 1")
        else:
            self.answer(image(f"{time.monotonic() - type(self).asked:.3f}"))

    def later(self, _: str) -> None:
        self.answer(b"", "429 Too Many Requests", "Retry-After: 3600")

    def reset(self, _: str) -> None:
        opened = self.transport.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def drip(self, number: str) -> None:
        self.answer(b"", length=1000)
        self._drip()

    def _drip(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"\x89")
            asyncio.get_running_loop().call_later(0.2, self._drip)

    def long(self, number: str) -> None:
        self.answer(image(number), length=1000)
        self.transport.close()

    def short(self, number: str) -> None:
        body = image(number)
        self.answer(body, length=len(body) - 40)
        self.transport.close()

    def html(self, _: str) -> None:
        self.answer(b"<!DOCTYPE html><html><body>Not here</body></html>", "200 OK", "Content-Type: image/png")

    def loop(self, number: str) -> None:
        self.answer(b"", "301 Moved Permanently", f"Location: /loop/{number}")

    def hops(self, number: str) -> None:
        self.answer(b"", "302 Found", f"Location: /hops/{number}+")

    def gone(self, _: str) -> None:
        self.answer(b"gone", "404 Not Found")

    def down(self, _: str) -> None:
        self.answer(b"down", "503 Service Unavailable")

    def expired(self, _: str) -> None:
        """As of a proxy that takes its login no more."""
        self.answer(b"", "407 Proxy Authentication Required")

    def optout(self, number: str) -> None:
        self.answer(image(number), "200 OK", "X-Robots-Tag: noimageai")

    def secret(self, number: str) -> None:
        self.answer(image(number))

    def large(self, _: str) -> None:
        self.answer(bytes(200_000))

    def inside(self, _: str) -> None:
        self.answer(b"", "302 Found", "Location: http://127.0.0.1:9/ok/1")


async def _serve(port_file: Path, addresses: list[str]) -> None:
    loop = asyncio.get_running_loop()
    photo = port_file.with_name("photo.jpg")
    _Connection.photograph = photo.read_bytes() if photo.exists() else b""
    server = await loop.create_server(_Connection, addresses[0], 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    others = [await loop.create_server(_Connection, address, port, backlog=1024) for address in addresses[1:]]
    port_file.with_suffix(".new").write_text(str(port))
    port_file.with_suffix(".new").rename(port_file)
    del others
    await asyncio.Event().wait()


@contextlib.contextmanager
def serving(folder: Path, addresses: int = 4) -> Iterator[tuple[list[str], int]]:
    """(addresses, port) of a server in a process of its own."""
    port_file = folder / "port"
    names = [f"127.0.0.{k + 1}" for k in range(addresses)]
    process = subprocess.Popen([sys.executable, "-S", __file__, str(port_file), *names])
    try:
        deadline = time.monotonic() + 60
        while not port_file.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield names, int(port_file.read_text())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        port_file.unlink(missing_ok=True)


def requests_of(addresses: list[str], port: int) -> Counter[str]:
    """How often each path was asked for."""
    with urllib.request.urlopen(f"http://{addresses[0]}:{port}/stats") as answer:
        return Counter(json.load(answer))


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2:]))
