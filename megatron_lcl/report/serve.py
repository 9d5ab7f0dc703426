"""`report --watch`: the page on this machine's loopback address, which follows the run while it is written.

    GET /          the page
    GET /parts     its sections, each with a hash of what it says, as JSON; with an ETag: 304 where nothing has changed
    GET /part/ID   a section

Nothing else is served, no file at all, and to no other host's name (against DNS rebinding: a page of the web whose name
is turned to 127.0.0.1 would otherwise read this one).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

from megatron_lcl.errors import UserError
from megatron_lcl.report.page import RunPage
from megatron_lcl.report.runs import RunsPage, find_runs

HOST = "127.0.0.1"
EVERY = 2.0
"""seconds between two looks of the page"""
_SECTION = re.compile(r'<section id="([\w-]+)"[^>]*>(.*?)</section>', re.DOTALL)
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Page(Protocol):
    """Of one run, or of several."""

    def changed(self) -> bool: ...

    def render(self, folder: Path | None = None, live: float = 0.0) -> str: ...


def page_of(paths: Sequence[Path]) -> Page:
    """UserError where there is no run."""
    found = find_runs(paths)
    return RunPage(found[0]) if len(found) == 1 else RunsPage(paths)


class Watch:
    """A page that is made again when its runs have written something."""

    def __init__(self, page: Page, files: Callable[[], object] = lambda: None, every: float = EVERY) -> None:
        """files: what the page also depends on, in any form that can be compared."""
        self._page, self._files, self._every = page, files, every
        self._lock = threading.Lock()
        self._seen: object = None
        self._stale = True
        """what was taken in is not yet on the page"""
        self._text = ""
        self._parts: dict[str, str] = {}

    def page(self) -> str:
        """The whole page; it knows what each of its sections says."""
        with self._lock:
            self._update()
            return self._text.replace("const shown = {};", f"const shown = {json.dumps(self._digests())};", 1)

    def digests(self) -> dict[str, str]:
        """Of each section."""
        with self._lock:
            self._update()
            return self._digests()

    def part(self, name: str) -> str | None:
        """A section's inside, as it was last looked at."""
        with self._lock:
            return self._parts.get(name)

    def _digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in self._parts.items()}

    def _update(self) -> None:
        try:
            files = self._files()
            self._stale = self._page.changed() or files != self._seen or self._stale
            if not self._stale:
                return
            text = self._page.render(live=self._every)
        except (UserError, OSError):
            if not self._text:
                raise
            return  # a file is just being written: what was shown stays until the next look
        self._seen, self._text, self._stale = files, text, False
        self._parts = dict(_SECTION.findall(text))


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a connection may be silent

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        if self.headers.get_all("Host", []) not in ([f"{HOST}:{port}"], [f"localhost:{port}"]):
            self._answer(403, "this page is served to this machine alone\n")
            return
        watch, path = self.server.watch, self.path
        try:
            if path == "/":
                self._answer(200, watch.page(), "text/html")
            elif path == "/parts":
                text = json.dumps(watch.digests())
                tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
                if self.headers.get("If-None-Match") == tag:
                    self._answer(304, "", tag=tag)
                else:
                    self._answer(200, text, "application/json", tag)
            elif path.startswith("/part/") and (part := watch.part(path.removeprefix("/part/"))) is not None:
                self._answer(200, part, "text/html")
            else:
                self._answer(404, "there is no such page\n")
        except (UserError, OSError) as error:
            self._answer(503, f"{error}\n")

    do_HEAD = do_GET

    def _answer(self, status: int, text: str, kind: str = "text/plain", tag: str = "") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD" and status != 304:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each look of the page would be a line every two seconds."""

    def version_string(self) -> str:
        return "megatron-lcl"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, watch: Watch) -> None:
        self.watch = watch
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that hangs up is no error."""


def serve(paths: Sequence[Path], port: int = 0) -> None:
    """Serve the page about one or several runs until Ctrl-C; prints its address first. port: 0: a free one.

    UserError where there is no run, or the port is taken.
    """
    page = page_of(paths)
    watch = Watch(page, lambda: [_files_of(folder) for folder in find_runs(paths)])
    watch.digests()
    try:
        server = _Server(port, watch)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--port {port} on {HOST}: {said}; give another, or none for a free one") from None
    with server:
        print(f"http://{HOST}:{server.server_address[1]}/ follows the run; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print("ended", flush=True)


def _files_of(run: Path) -> list[tuple[str, int, int]]:
    """The JSON files in a run folder and in the folders in it, which evaluations write."""
    found = []
    for pattern in ("*.json", "*/results.json"):
        for path in sorted(run.glob(pattern)):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return found
