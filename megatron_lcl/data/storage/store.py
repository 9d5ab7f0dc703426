"""A folder of objects, by its URL: `Store("s3://bucket/folder")`.

Settings are everybody's environment variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, AWS_SKIP_SIGNATURE, … (docs/object-storage.md).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_lcl.data.storage.faults import StorageError, bare
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists
from megatron_lcl.processes import make_socket_folder, same_code

About = tuple[int, "str | None"]
"""bytes and ETag of an object"""
_URL = re.compile(r"([a-z][a-z0-9+.-]+):(/+)(.*)", re.DOTALL | re.IGNORECASE)
_SCHEMES = ("s3", "gs", "az", "http", "https")
_TRIES = 3
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_", "HTTP", "http", "NO_PROXY", "no_proxy")
"""how the environment variables begin that a request depends on"""


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL of a folder of objects, without a slash at its end; None: it is a path of a file system.

    A Path has lost one of the two slashes. UserError where the URL has another scheme, or a user, a password or a query
    in it: it would stand in configs, logs and manifests.
    """
    found = _URL.fullmatch(str(path))
    if found is None:
        return None
    scheme = found[1].lower()
    url = f"{scheme}://{found[3]}".rstrip("/")
    if scheme not in _SCHEMES:
        # hf:/models/mine, which a Path also has of hf://models/mine
        if found[2] == "/" and (isinstance(path, str) or exists(Path(f"{found[1]}:"))):
            return None
        raise UserError(
            f"{bare(url)}: {scheme}:// is not known; use {', '.join(f'{known}://' for known in _SCHEMES)}, or a path "
            "of a file system"
        )
    try:
        parts = urlsplit(url)
    except ValueError:  # whose text may hold the password
        raise UserError(f"{bare(url)} is no URL; check the name of the host or bucket") from None
    if not parts.netloc:
        raise UserError(f"{bare(url)} names no bucket; write {scheme}://BUCKET/FOLDER")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{bare(url)}: a URL with a user, a password or a query is not taken, as it would be written into logs; "
            "give credentials by environment variables"
        )
    return url


def to_show(path: str | os.PathLike[str]) -> str:
    """A folder, or one of objects, as a message may name it. UserError as `url_of`."""
    return url_of(path) or str(path)


class Store:
    """The objects below a URL. Cheap to make; every process and thread may use one. Raises StorageError."""

    def __init__(self, url: str) -> None:
        found = url_of(url)
        assert found is not None, url
        self.url = found

    def head(self, names: Sequence[str]) -> list[About | None]:
        """(bytes, ETag) of each object; None where it is not there."""
        return self._ask("head", list(names))

    def exists(self, name: str) -> bool:
        """Whether there is an object."""
        return self.head([name])[0] is not None

    def get(self, name: str) -> bytes:
        """A whole object."""
        about = self.head([name])[0]
        if about is None:
            raise StorageError(f"{self.url}/{name} does not exist", missing=True)
        return self.read(name, [(0, about[0])], about[1])[0]

    def read(self, name: str, ranges: Sequence[tuple[int, int]], etag: str | None = None) -> list[bytes]:
        """Bytes start … stop-1 of an object for each of the ranges, which are asked for at once.

        etag: that of `head`; where the object is another by now, this fails.
        """
        return self._ask("read", name, etag, list(ranges))

    def fetch(self, names: Sequence[str], folder: Path, known: Sequence[About | None] | None = None) -> None:
        """Whole objects into files of the same names in a folder; what is there is overwritten, not durably. Nothing is
        written where a name leads out of the folder, or its disk has no room for all.

        known: of each what `head` has said, None where that is to be asked.
        """
        self._ask("fetch", list(names), list(known or [None] * len(names)), str(folder.absolute()))

    def put(self, name: str, content: bytes | Path) -> None:
        """An object, of these bytes or of a file: all of it is there afterwards, or what was there before."""
        self._ask("put", name, str(content.absolute()) if isinstance(content, Path) else content)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(name, bytes) of all objects below a prefix (whole parts of a path), in order."""
        return [(name, size) for name, size, _ in self._ask("list", prefix, True)]

    def versions(self, deep: bool) -> dict[str, About]:
        """(bytes, ETag) of all objects by name, in order. Not deep: of those directly below, (-1, None) of a folder."""
        return {name: (size, etag) for name, size, etag in self._ask("list", "", deep)}

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, as far as they are there."""
        self._ask("delete", list(names))

    def _ask(self, operation: str, *arguments: Any) -> Any:
        for left in reversed(range(_TRIES)):
            try:
                connection = _connection()
                connection.send((operation, self.url, arguments))
                reply = connection.recv()
                break
            except (EOFError, OSError):  # the server was killed: another one begins again
                _forget()
                if not left:
                    raise StorageError(
                        f"{self.url}: the process that makes requests was killed {_TRIES} times"
                    ) from None
            except BaseException:  # an answer that nobody takes would be that to the next question
                _forget()
                raise
        if reply[0] == "fault":
            raise StorageError(*reply[1:])
        return reply[1]


# --- the process that makes the requests --------------------------------------------------------------------------


class _Server:
    """A process that listens at an address, with the settings that it has. It ends when nobody holds its standard input
    any more: the threads that ask it, here and in processes that were forked."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.process, self.address = _start()
        self.settings = settings

    def __del__(self) -> None:
        if (process := getattr(self, "process", None)) is not None:  # Popen keeps the pipe while the process lives
            assert process.stdin is not None
            process.stdin.close()


class _Mine(threading.local):
    connection: Connection | None = None
    pid = 0
    server: _Server | None = None


_mine = _Mine()
_starting = threading.Lock()
_server: _Server | None = None
"""for new questions; in a process that was forked: its parent's"""


def _connection() -> Connection:
    """This thread's connection, new where it has none."""
    server = _current()
    if _mine.connection is None or _mine.pid != os.getpid() or _mine.server is not server:
        _mine.connection = None  # in a forked process: the parent's, which stays open there
        _mine.server = server
        _mine.connection, _mine.pid = Client(server.address, "AF_UNIX"), os.getpid()
    return _mine.connection


def _forget() -> None:
    """The next question of this thread goes to another process, and whatever else is asked from now on."""
    global _server
    connection, server = _mine.connection, _mine.server
    _mine.connection = _mine.server = None
    with contextlib.suppress(OSError):
        if connection is not None:
            connection.close()
    with _starting:
        if _server is server:
            _server = None


def _current() -> _Server:
    """The process that has this one's settings; it is started where there is none."""
    global _server
    settings = {key: value for key, value in _environment().items() if key.startswith(_SETTINGS)}
    with _starting:
        if _server is None or _server.settings != settings:
            _server = _Server(settings)
        return _server


def _environment() -> dict[str, str]:
    """This process's variables, also while another thread sets and deletes some: a copy of `os.environ` would fail at
    one that has gone since it was listed."""
    return {name: value for name in os.environ if (value := os.environ.get(name)) is not None}


def _start() -> tuple[subprocess.Popen[bytes], str]:
    """A new process and its address, in a folder that only this user may enter. StorageError where it cannot start."""
    try:
        folder = make_socket_folder("megatron-lcl-storage-", "object storage needs")
    except UserError as error:
        raise StorageError(str(error)) from None
    address = os.path.join(folder, "s")
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_lcl.data.storage.server", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the processes that it serves
            env={**_environment(), **same_code()},
        )
        assert process.stdout is not None
        with process.stdout:
            said = process.stdout.readline().decode(errors="replace").strip()
        if said == "ready":
            return process, address
        process.kill()
        process.wait()
    except OSError as error:
        said = str(error.strerror)
    shutil.rmtree(folder, ignore_errors=True)
    raise StorageError(
        f"the process that makes requests to object storage did not start ({sys.executable}, {address}: "
        f"{said or 'no answer'})"
    )


def _before_fork() -> None:
    """A copy of a pipe over which another thread starts the server would be open in what is forked, and that thread
    wait for its end."""
    _starting.acquire()


def _after_fork() -> None:
    _starting.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
