"""`report --watch`: the page on this machine's loopback address, which follows the run while it is written.

    GET /          the page
    GET /parts     as JSON: `page`, a hash that is the same as long as the same runs are served by the same release;
                   `parts`, by id a hash of what each says; `error`, why it no longer follows, or "";
                   with an ETag: 304 where nothing has changed
    GET /part/ID   the inside of a part: of a section, of the head, of the links to the sections

Nothing else is served, no file at all, and to no other host's name (against DNS rebinding: a page of the web whose name
is turned to 127.0.0.1 would otherwise read this one).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

from megatron_lcl.errors import UserError
from megatron_lcl.report.page import RunPage
from megatron_lcl.report.runs import RunsPage, find_runs

HOST = "127.0.0.1"
EVERY = 2.0
"""seconds between two looks of the page"""
PATIENCE = 5
"""looks of the page for which an error is not told: a file that is just being written is read at the next"""
_PART = re.compile(r'(<(section|header|nav) id="([\w-]+)"[^>]*>)(.*?)</\2>', re.DOTALL)
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Page(Protocol):
    """Of one run, or of several."""

    def changed(self) -> bool: ...

    def render(self, folder: Path | None = None, live: float = 0.0) -> str: ...


class Watch:
    """A page that is made again when its runs have written something, or others have begun beside them."""

    def __init__(self, paths: Sequence[Path], every: float = EVERY) -> None:
        """paths: of runs, or of folders of runs. every: seconds between two looks."""
        self._paths, self._every = paths, every
        self._lock = threading.Lock()
        self._page: Page | None = None
        self._alone: Path | None = None
        """the run that the page is about; None: it is about several"""
        self._seen: object = None
        self._stale = True
        """what was taken in is not yet on the page"""
        self._text = ""
        self._parts: dict[str, str] = {}
        self._frame = ""
        """a hash of what lies outside of the parts, and of whose page it is"""
        self._failing: tuple[float, str] | None = None
        """since when it is not to be made again, by time.monotonic, and why now"""

    def page(self) -> str:
        """The whole page; it knows what each of its parts says. UserError or OSError where it was never to be made."""
        with self._lock:
            self._update()
            known = {"page": self._frame, "parts": self._digests()}
            return self._text.replace("const known = null;", f"const known = {json.dumps(known)};", 1)

    def state(self) -> dict[str, object]:
        """What /parts says; errors as `page`."""
        with self._lock:
            self._update()
            since, error = self._failing or (0.0, "")
            is_told = self._failing is not None and time.monotonic() - since >= PATIENCE * self._every
            return {"page": self._frame, "parts": self._digests(), "error": error if is_told else ""}

    def part(self, name: str) -> str | None:
        """A part's inside, as it was last looked at."""
        with self._lock:
            return self._parts.get(name)

    def _digests(self) -> dict[str, str]:
        return {name: _hash(text) for name, text in self._parts.items()}

    def _update(self) -> None:
        try:
            found = find_runs(self._paths)
            files = [_files_of(run) for run in found]
            alone = found[0] if len(found) == 1 else None
            if self._page is None or alone != self._alone:
                self._page, self._alone = RunPage(alone) if alone else RunsPage(self._paths), alone
                self._stale = True
            self._stale = self._page.changed() or files != self._seen or self._stale
            text = self._page.render(live=self._every) if self._stale else self._text
        except (UserError, OSError) as error:
            if not self._text:
                raise
            # what was shown stays; of what was taken in until the error, no later look says that it is new
            self._stale = True
            since, _ = self._failing or (time.monotonic(), "")
            self._failing = since, str(error)
            return
        if text is not self._text:
            self._parts = {name: inside for _, _, name, inside in _PART.findall(text)}
            whose = [str(path.absolute()) for path in self._paths]
            self._frame = _hash(json.dumps([whose, _PART.sub(r"\1", text)]))
        self._text, self._seen, self._stale, self._failing = text, files, False, None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


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
                text = json.dumps(watch.state())
                tag = f'"{_hash(text)}"'
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
        except Exception as error:
            self._answer(500, f"{type(error).__name__}: {error}\n")
            raise

    do_HEAD = do_GET

    def _answer(self, status: int, text: str, kind: str = "text/plain", tag: str = "") -> None:
        body = text.encode(errors="backslashreplace")
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
        """A browser that hangs up is no error; all else keeps its traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def serve(paths: Sequence[Path], port: int = 0) -> None:
    """Serve the page about one or several runs until Ctrl-C; prints its address first. port: 0: a free one.

    UserError where there is no run, or the port is taken.
    """
    watch = Watch(paths)
    watch.state()
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
