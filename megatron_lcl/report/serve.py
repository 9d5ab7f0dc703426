"""`report --watch`: the page on this machine's loopback address, which follows the run while it is written.

    GET /          the page
    GET /parts     as JSON: `page`, a hash of what lies outside of its parts, and of the paths that it is about;
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
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

from megatron_lcl.errors import UserError, without_secrets
from megatron_lcl.filesystem import matching
from megatron_lcl.report.page import RunPage
from megatron_lcl.report.runs import RunsPage, find_runs
from megatron_lcl.train.telemetry.lines import results_inside

HOST = "127.0.0.1"
EVERY = 2.0
"""seconds between two looks of the page"""
LIMIT = 30.0
"""seconds of silence after which a browser says that there is no answer"""
_PIECE = 1 << 16
"""bytes that are written at once: each write has the connection's `timeout` for all that it is given"""
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

    def render(self, folder: Path | None = None, live: bool = False) -> str: ...


@dataclass(frozen=True)
class Made:
    """A page as it was made."""

    text: str
    parts: Mapping[str, str]
    """by id, what is inside"""
    known: Mapping[str, object]
    """`page` and `parts` of what /parts says"""

    @classmethod
    def of(cls, text: str, paths: Sequence[Path]) -> Made:
        whose = [str(path.absolute()) for path in paths]
        parts = {name: inside for _, _, name, inside in _PART.findall(text)}
        frame = _hash(json.dumps([whose, _PART.sub(r"\1", text)]))
        return cls(text, parts, {"page": frame, "parts": {name: _hash(inside) for name, inside in parts.items()}})


class Watch:
    """A page that is made again when its runs have written something, or others have begun beside them.

    One thread at a time looks at the runs and makes the page, however many ask for it; a request starts it where none
    is at work and it is time, waits for it for a third of `limit`, and is answered with the page that was made last.
    """

    _made: Made

    def __init__(self, paths: Sequence[Path], every: float = EVERY, limit: float = LIMIT) -> None:
        """Makes the page. paths: of runs, or of folders of runs. every: seconds between two looks at them. limit:
        seconds after which a silent server, or a look that does not end, is told of.

        UserError or OSError where there is no page to be made.
        """
        self._paths, self._every, self._limit = paths, every, limit
        self._page: Page | None = None
        self._alone: Path | None = None
        """the run that the page is about; None: it is about several"""
        self._seen: object = None
        self._stale = True
        """what was taken in is not yet on the page"""
        self._failing: tuple[float, str] | None = None
        """since when the page is not to be made again, by time.monotonic, and why now"""
        self._lock = threading.Lock()
        """of whoever starts a look"""
        self._idle = threading.Event()
        """no look is at work"""
        self._idle.set()
        self._took = 0.0
        """seconds of the last look that made a page"""
        self._began = time.monotonic()
        self._update()
        self._ended = time.monotonic()

    def page(self) -> str:
        """The whole page; it knows what each of its parts says."""
        made = self._latest()
        known = {**made.known, "every": round(1000 * self._every), "limit": round(1000 * self._limit)}
        return made.text.replace("const known = null;", f"const known = {json.dumps(known)};", 1)

    def state(self) -> dict[str, object]:
        """What /parts says."""
        return {**self._latest().known, "error": self._error()}

    def part(self, name: str) -> str | None:
        """A part's inside, as it was last made."""
        return self._made.parts.get(name)

    def _latest(self) -> Made:
        with self._lock:
            if self._idle.is_set() and time.monotonic() >= self._ended + self._every:
                self._idle.clear()
                self._began = time.monotonic()
                threading.Thread(target=self._look, daemon=True).start()
        self._idle.wait(self._limit / 3)  # so that a browser, which is more patient, has an answer
        return self._made

    def _error(self) -> str:
        """Why the page does not follow; empty: it does, or may only be late."""
        now, longest, failing = time.monotonic(), max(self._limit, 2 * self._took), self._failing
        if not self._idle.is_set() and now - self._began > longest:
            return f"making it anew takes longer than {round(longest, 1):g} s"
        return failing[1] if failing and now - failing[0] >= PATIENCE * self._every else ""

    def _look(self) -> None:
        try:
            self._update()
            self._failing = None
        except Exception as error:  # noqa: BLE001 - whatever it is, the page says it
            # what was shown stays; of what was taken in until the error, no later look says that it is new
            self._stale = True
            since, before = self._failing or (time.monotonic(), "")
            is_expected = isinstance(error, UserError | OSError)
            said = str(error) if is_expected else f"a fault of the program, {type(error).__name__}: {error}"
            if not is_expected and said != before:
                traceback.print_exc()
            self._failing = since, without_secrets(said)
        finally:
            self._ended = time.monotonic()
            self._idle.set()

    def _update(self) -> None:
        found = find_runs(self._paths)
        files = [_files_of(run) for run in found]
        alone = found[0] if len(found) == 1 else None
        if self._page is None or alone != self._alone:
            self._page, self._alone = RunPage(alone) if alone else RunsPage(self._paths), alone
            self._stale = True
        self._stale = self._page.changed() or files != self._seen or self._stale
        if self._stale:
            self._made = Made.of(self._page.render(live=True), self._paths)
            self._took = time.monotonic() - self._began
        self._seen, self._stale = files, False


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
            for at in range(0, len(body), _PIECE):
                self.wfile.write(body[at : at + _PIECE])

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
    for path in (*matching(run, "*.json"), *results_inside(run)):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return found
