"""An S3 server (moto, from PyPI) in a process of its own, behind a proxy that plants latency and faults."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

SERVE = (
    "import sys\n"
    "from moto.server import ThreadedMotoServer\n"
    "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
    "server.start()\n"
    "print(server.get_host_and_port()[1], flush=True)\n"
    "sys.stdin.read()\n"  # until the parent closes it, or dies
    "server.stop()\n"
)

PIECE = 1 << 16
"""bytes that the link of a slow proxy passes on at once"""


@contextlib.contextmanager
def moto() -> Iterator[int]:
    """The server's port on 127.0.0.1; it ends with the block, and with this process."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass
class Request:
    """A request that the server has answered."""

    method: str
    path: str
    range: str
    status: int
    sent: int = 0
    """bytes of the answer's body that were sent"""


@dataclass
class Proxy:
    """What is between the clients and the server, in a thread of this process. Each n-th request of those that are
    counted (GET and PUT of objects) fails in the way that is set, but never one that repeats what failed, however
    the requests of several clients alternate: one retry is always enough. 0: none does."""

    server: int
    port: int = 0
    latency: float = 0.0
    """seconds before an answer begins"""
    unavailable: int = 0
    """each n-th: 503 SlowDown"""
    cut: int = 0
    """each n-th: the connection ends in the middle of the body"""
    answer: bytes = b""
    """what every request is answered with: a whole HTTP answer; empty: the server's"""
    speed: float = 0.0
    """bytes a second of all bodies that are received and sent, together; 0: as fast as they are"""
    keeps: bool = False
    """whole objects are kept here after they were first asked for, so that the server's speed is not measured"""
    requests: list[Request] = field(default_factory=list)
    late: float = 0.0
    """seconds by which the link came too late at most, as the process was not given the time"""
    _count: int = 0
    _failed: set[tuple[str, str, str]] = field(default_factory=set)
    """what failed and was not asked for again: method, path, range"""
    _free: float = 0.0
    """when the link has sent what it was given"""
    _kept: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """No faults, and nothing seen."""
        self.latency, self.unavailable, self.cut, self.answer, self._count = 0.0, 0, 0, b"", 0
        self.speed, self._free, self.late = 0.0, 0.0, 0.0
        self._failed.clear()
        self.requests.clear()

    def keep(self, path: str, content: bytes, etag: str) -> None:
        """Answer what is asked of an object from here, where `keeps` is set."""
        self._kept[path] = etag.encode(), content

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while head := await _head(reader):
                body = await reader.readexactly(_length(head))
                method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
                seen = Request(method, path, _header(head, b"range"), 0)
                self.requests.append(seen)
                await self._link(len(body))
                if self.latency:
                    await asyncio.sleep(self.latency)
                counted = method in ("GET", "PUT") and path.count("/") > 1
                self._count += counted
                fails = {n for n in (self.unavailable, self.cut) if counted and n and self._count % n == 0}
                if (what := (method, path, seen.range)) in self._failed:
                    fails.clear()
                (self._failed.add if fails else self._failed.discard)(what)
                if self.answer:
                    reply, content = self.answer.split(b"\r\n\r\n", 1)
                    reply, content = reply + b"\r\n\r\n", b"" if method == "HEAD" else content
                elif self.unavailable in fails:
                    content = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                    reply = b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n" % len(content)
                elif self.keeps and method == "GET" and path in self._kept:
                    reply, content = self._from_kept(path, seen.range)
                else:
                    if upstream is None:
                        upstream = await asyncio.open_connection("127.0.0.1", self.server)
                    reply, content = await _forward(upstream, head, body, method)
                    if b"\r\nconnection: close" in reply.lower():
                        upstream[1].close()
                        upstream = None
                    if self.keeps and method == "GET" and not seen.range and b" 200 " in reply[:20]:
                        self._kept[path] = _header(reply, b"etag").encode(), content
                seen.status = int(reply.split(b" ", 2)[1])
                if self.cut in fails and len(content) > 1:
                    seen.sent = len(content) // 2
                    writer.write(reply + content[: seen.sent])
                    await writer.drain()
                    return
                seen.sent = len(content)
                writer.write(reply)
                piece = PIECE if self.speed else max(len(content), 1)
                for at in range(0, len(content), piece):
                    await self._link(len(part := content[at : at + piece]))
                    writer.write(part)
                    await writer.drain()
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            if upstream is not None:
                upstream[1].close()

    async def _link(self, size: int) -> None:
        """Wait until the link has passed on so many bytes more."""
        if self.speed:
            now = time.monotonic()
            self._free = max(self._free, now) + size / self.speed
            due = self._free
            await asyncio.sleep(due - now)
            self.late = max(self.late, time.monotonic() - due)

    def _from_kept(self, path: str, wanted: str) -> tuple[bytes, bytes]:
        etag, content = self._kept[path]
        start, stop, extra, status = 0, len(content), b"", b"200 OK"
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or 1 << 62) + 1, len(content))
            status, extra = (
                b"206 Partial Content",
                b"Content-Range: bytes %d-%d/%d\r\n" % (start, stop - 1, len(content)),
            )
        part = content[start:stop]
        head = (
            b"HTTP/1.1 %b\r\nContent-Length: %d\r\nETag: %b\r\nLast-Modified: Thu, 26 Nov 2026 00:00:00 GMT\r\n%b\r\n"
        )
        return head % (status, len(part), etag, extra), part


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _header(head: bytes, name: bytes) -> str:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip().decode()
    return ""


def _length(head: bytes) -> int:
    return int(_header(head, b"content-length") or 0)


async def _forward(
    upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter], head: bytes, body: bytes, method: str
) -> tuple[bytes, bytes]:
    reader, writer = upstream
    writer.write(head + body)
    await writer.drain()
    while (reply := await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100"):
        pass
    if method == "HEAD" or b" 204 " in reply[:20] or b" 304 " in reply[:20]:
        return reply, b""
    if _header(reply, b"transfer-encoding") == "chunked":
        content = b""
        while size := int((await reader.readline()).split(b";")[0], 16):
            content += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        kept = [line for line in reply.split(b"\r\n") if not line.lower().startswith(b"transfer-encoding")]
        kept[1:1] = [b"Content-Length: %d" % len(content)]
        return b"\r\n".join(kept), content
    return reply, await reader.readexactly(_length(reply))


@contextlib.contextmanager
def proxied(server: int) -> Iterator[Proxy]:
    """A proxy in front of the server on this port."""
    proxy, loop, ready = Proxy(server), asyncio.new_event_loop(), threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        listener = loop.run_until_complete(asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 20))
        proxy.port = listener.sockets[0].getsockname()[1]
        ready.set()
        loop.run_forever()
        listener.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
