"""The process that makes the requests, with obstore (the Rust crate object_store): `python -m … SOCKET`.

It answers the process that started it and those that this one forks, over a socket in a folder that only their user may
enter, each connection in a thread; it ends when the last of them has (its standard input ends then). A request is
(operation, url, arguments); an answer ("ok", value) or ("fault", message, missing) with
remedies behind that, where there are any.

All folders of a bucket, or of a server, are asked over one client's connections: corpora may have images in millions of
folders, and a client takes threads and 0.3 MB.

A request that may succeed later is made again, after a pause that doubles: for FIRST_SECONDS where no request to the
bucket was answered yet (a wrong address shows soon), otherwise for PATIENCE_SECONDS after it first failed (of what
puts, whose parts obstore itself repeats, after it began). How long an answer takes depends on the link, which many
share, so only silence is a failure. A body with fewer bytes than were asked for counts as one that failed.

Credentials that were taken before and are refused are obtained again, once for each request.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from configparser import ConfigParser
from configparser import Error as ConfigError
from datetime import timedelta
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from megatron_lcl.data.storage.faults import KEYS, Fault, StorageError, explained, status_of
from megatron_lcl.data.storage.names import is_within
from megatron_lcl.errors import free_space
from megatron_lcl.units import in_bytes

FIRST_SECONDS = 6.0
PATIENCE_SECONDS = 300.0
SILENT_SECONDS = 60.0
"""without a byte of an answer, after which a request that reads has failed"""
PUT_SECONDS = 300.0
"""until a request that puts is answered, with the time to send its bytes; 12 share the link"""
IN_FLIGHT = 32
"""requests made at once to a bucket, or to a server, for one process that reads"""
COPYING = 24
"""of these for a whole object that is fetched, however large: others are read meanwhile"""
CHUNK = 16 << 20
"""bytes of a request, of a whole object that is fetched, and of a part, of one that is put, at least"""
MOST_PARTS = 10_000
"""that S3 takes of an object"""
T = TypeVar("T")


class Client:
    """Connections to a bucket, or to a server, and the threads that make requests over them."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._open()
        self.answered = False
        self.pool = ThreadPoolExecutor(IN_FLIGHT)

    def _open(self) -> None:
        self.store, self.retrying = _open(self.address, 0, SILENT_SECONDS), _open(self.address, 10, PUT_SECONDS)

    def reopen(self, store: Any) -> None:
        """With the credentials that there are now, if `store` is still that of this client: else another thread has
        done it."""
        with self._lock:
            if self.store is store:
                self._open()


class Clients:
    """Those that are open. Threads may use it at once."""

    def __init__(self) -> None:
        self._by_address: dict[str, Client] = {}
        self._lock = threading.Lock()

    def at(self, address: str) -> Client:
        """The client of an address, which is opened the first time."""
        with self._lock:
            if address not in self._by_address:
                self._by_address[address] = Client(address)
            return self._by_address[address]


class Remote:
    """A folder of objects. Cheap to make, but for the client of its address."""

    def __init__(self, url: str, client_at: Callable[[str], Client] = Client) -> None:
        self.url = url
        address, self._folder = address_and_folder(url)
        self._client = client_at(address)

    def _key(self, name: str) -> str:
        """The name that an object of this folder has at the client's address."""
        return f"{self._folder}{name.removeprefix('/')}"

    def head(self, names: list[str]) -> list[tuple[int, str | None] | None]:
        """(bytes, ETag) of each object; None where it is not there."""
        return list(self._client.pool.map(self._head, names))

    def read(self, name: str, etag: str | None, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Bytes start … stop-1 of an object, for each range."""
        return list(self._client.pool.map(lambda r: self._range(name, etag, *r), ranges))

    def fetch(self, names: list[str], known: list[tuple[int, str | None] | None], folder: str) -> None:
        """Whole objects into files of the same names in a folder, one after another in many requests.

        StorageError, before anything is written, where a name leads out of the folder, or there is no room for all.
        """
        if strange := [name for name in names if not is_within(name)]:
            raise StorageError(f"{self.url}: {strange[0]!r} is no name of a file below a folder, and is not copied")
        asked = iter(self.head([name for name, about in zip(names, known, strict=True) if about is None]))
        found = {}
        for name, given in zip(names, known, strict=True):
            about = given or next(asked)
            if about is None:
                raise StorageError(f"{self.url}/{name} does not exist", missing=True)
            found[name] = about
        if (total := sum(size for size, _ in found.values())) > shutil.disk_usage(folder).free:
            raise StorageError(
                f"{self.url}: {in_bytes(total)} are to be copied, and {free_space(Path(folder))}; make room, or set "
                "XDG_CACHE_HOME or TMPDIR to a folder with more",
                remedies={"--data.cache": ", or data.cache"},
            )
        for name, (size, etag) in found.items():
            self._fetch(name, etag, size, Path(folder) / name)

    def _fetch(self, name: str, etag: str | None, size: int, path: Path) -> None:
        path.write_bytes(b"")

        def one(start: int) -> None:
            content = self._range(name, etag, start, min(start + CHUNK, size))
            with open(path, "r+b") as file:
                file.seek(start)
                file.write(content)

        running: set[Future[None]] = set()
        try:
            for start in range(0, size, CHUNK):
                if len(running) == COPYING:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for chunk in done:
                        chunk.result()
                running.add(self._client.pool.submit(one, start))
            for chunk in running:
                chunk.result()
        finally:
            wait([chunk for chunk in running if not chunk.cancel()])

    def put(self, name: str, content: bytes | str) -> None:
        """An object, of these bytes or of a file at this path; as it was or whole, whatever ends this process."""
        import obstore

        source = Path(content) if isinstance(content, str) else content
        if not self._client.answered:
            self._head(name)  # a wrong address shows soon

        def one() -> None:
            size = source.stat().st_size if isinstance(source, Path) else len(source)
            obstore.put(self._client.retrying, self._key(name), source, chunk_size=_part_bytes(size))

        # of the requests for its parts each is made again; all of them together seldom succeed. When it fails, that may
        # have taken longer than PATIENCE_SECONDS
        self._again(name, one, time.monotonic())

    def delete(self, names: Sequence[str]) -> None:
        """Objects, as far as they are there."""
        import obstore

        def one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._client.store, self._key(name))

        for name in names:
            self._again(name, lambda name=name: one(name))  # type: ignore[misc]

    def list(self, prefix: str, deep: bool) -> list[tuple[str, int, str | None]]:
        """(name, bytes, ETag) of all objects below a prefix, in order of their names. Not deep: only those directly
        below, and the folders there as (name, -1, None)."""
        import obstore

        below = self._key(prefix) or None

        def listed() -> list[tuple[str, int, str | None]]:
            if deep:
                items = [item for page in obstore.list(self._client.store, below) for item in page]
                folders = []
            else:
                found = obstore.list_with_delimiter(self._client.store, below)
                items, folders = list(found["objects"]), list(found["common_prefixes"])
            objects = [(item["path"], item["size"], item["e_tag"]) for item in items]
            all_of_them = objects + [(key, -1, None) for key in folders]
            return sorted((key[len(self._folder) :], size, etag) for key, size, etag in all_of_them)

        return self._again(prefix, listed)

    def _head(self, name: str) -> tuple[int, str | None] | None:
        import obstore
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        def one() -> tuple[int, str | None] | None:
            try:
                about = obstore.head(self._client.store, self._key(name))
            except FileNotFoundError:
                if urlsplit(self.url).scheme == "s3" and not self._client.answered:
                    self._say_why(name)
                return None
            except BaseError as error:
                # S3 answers with 400 where a token has expired
                if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status_of(error) == 400:
                    self._say_why(name)
                raise
            return about["size"], about["e_tag"]

        return self._again(name, one)

    def _say_why(self, name: str) -> None:
        """The answer to `head` has no body that says what is wrong (bucket, keys, clock); that to `get` has."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            try:
                obstore.get(self._client.store, self._key(name))
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise StorageError(explained(error, self.url, name, os.environ).message) from None

    def _range(self, name: str, etag: str | None, start: int, stop: int) -> bytes:
        import obstore

        def one() -> bytes:
            options: dict[str, Any] = {"range": (start, stop)}
            if etag is not None and not etag.startswith("W/"):  # a weak one says nothing of bytes
                options["if_match"] = etag
            content = obstore.get(self._client.store, self._key(name), options=options).bytes()  # type: ignore[arg-type]
            if len(content) != stop - start:
                raise _CutShort
            return content.to_bytes()

        return self._again(name, one) if stop > start else b""

    def _again(self, name: str, action: Callable[[], T], failed: float = 0.0) -> T:
        """failed: from when patience counts; 0: from the first failure on."""
        began, pause, reopened = time.monotonic(), 0.1, False
        while True:
            store = self._client.store
            try:
                result = action()
                self._client.answered = True
                return result
            except StorageError:
                raise
            except _CutShort:
                self._client.answered = True
                fault = Fault(f"{self.url}/{name}: the answer ended too early, each time; check the network", True)
            except Exception as error:  # noqa: BLE001 of whatever kind, it is explained
                fault = explained(error, self.url, name, os.environ)
            if fault.refused and self._client.answered and not reopened:
                # a role's token, whose age obstore takes by a clock that stands still in a suspend, or keys of a file
                # that were replaced
                reopened = True
                self._client.reopen(store)
                continue
            self._client.answered |= fault.answered
            now = time.monotonic()
            failed = failed or now
            end = failed + PATIENCE_SECONDS if self._client.answered else began + FIRST_SECONDS
            if not fault.passing or now + pause > end:
                raise StorageError(fault.message, fault.missing)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 8.0)


class _CutShort(Exception):
    """Fewer bytes than were asked for."""


def _part_bytes(size: int) -> int:
    """Bytes of a part of an object that is put, which has `size` of them: whole MiB."""
    return max(CHUNK, -(-size // (MOST_PARTS << 20)) << 20)


def address_and_folder(url: str) -> tuple[str, str]:
    """The URL of a bucket, or of a server, and what the names of the objects of a folder there begin with: empty, or
    with a slash at its end and without escapes (%20)."""
    from obstore import parse_scheme

    parts = urlsplit(url)
    path, kept = parts.path, ""
    if parts.scheme in ("http", "https"):
        # other servers than clouds' may tell the escape of an ASCII character (%2F) from the character
        pattern = r".*%(?![89a-f])[^/]*"
        if parse_scheme(url) != "http":  # clouds have addresses of which the first part of the path is the bucket
            path = posixpath.normpath("/" + re.sub("%2e", ".", path, flags=re.IGNORECASE).lstrip("/"))
            pattern = r"/[^/]*"
        kept = found[0] if (found := re.match(pattern, path, re.IGNORECASE)) else ""
    folder = posixpath.normpath("/" + unquote(path[len(kept) :], errors="strict")).strip("/")
    return f"{parts.scheme}://{parts.netloc}{kept}", folder and f"{folder}/"


def _open(url: str, retries: int, silent: float) -> Any:
    from obstore.store import from_url

    scheme = urlsplit(url).scheme
    client: Any = {
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=silent),
        "timeout": timedelta(days=1),  # of the whole request; it cannot be left out
        "allow_http": scheme == "http" or _endpoint().startswith("http://"),
    }
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=silent + PATIENCE_SECONDS)}
    config: dict[str, Any] = {}
    if scheme == "s3":
        if _endpoint():
            config["endpoint"] = _endpoint()
        config["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        config |= _profile()
    return from_url(
        url if scheme in ("http", "https") else f"{url}/", client_options=client, retry_config=retry, **config
    )


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _profile() -> dict[str, str]:
    """Keys from the file that the tools of AWS write, where the environment has none."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    parser = ConfigParser(interpolation=None)  # a % is part of a key
    name = os.environ.get("AWS_PROFILE", "default")
    try:
        parser.read(Path(file).expanduser())
        section = parser[name]
    except (OSError, ConfigError, KeyError, UnicodeDecodeError, RuntimeError):  # the last of a user without a home
        if "AWS_PROFILE" in os.environ:
            raise StorageError(f"AWS_PROFILE is {name!r}, which {file} does not have; set {KEYS}") from None
        return {}
    keys = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key"}
    keys["aws_session_token"] = "session_token"
    return {ours: section[theirs] for theirs, ours in keys.items() if theirs in section}


def reply_to(operation: str, url: str, arguments: Sequence[Any], clients: Clients) -> tuple[Any, ...]:
    """The answer to a request, as the head of this file says."""
    try:
        return "ok", getattr(Remote(url, clients.at), operation)(*arguments)
    except StorageError as error:
        return "fault", error.said(), error.missing, error.remedies
    except OSError as error:  # of a file of ours
        return "fault", f"{arguments[-1]}: {error.strerror or type(error).__name__}", False
    except ImportError:
        return "fault", "object storage needs obstore: pip install 'megatron-lcl[storage]'", False
    except Exception as error:  # noqa: BLE001 its text may repeat what is secret
        said = f"{type(error).__name__} in obstore, of the settings in AWS_… variables"
        if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            said = (
                "the process that makes requests cannot start another thread; raise the limit of this user's processes "
                "and threads (ulimit -u), or that of the container or job (pids.max)"
            )
        return "fault", f"{url}: {said}", False


def main(address: str) -> None:
    """Say "ready" and answer until standard input ends; where that cannot be, say why and end."""
    clients = Clients()

    def answer(connection: Connection) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            while True:
                operation, url, arguments = connection.recv()
                connection.send(reply_to(operation, url, arguments, clients))

    try:
        listener = Listener(address, "AF_UNIX", backlog=128)
    except OSError as error:  # such a path is too long, or the disk full
        print(error.strerror or error, flush=True)
        return
    print("ready", flush=True)

    def listen() -> None:
        with listener:
            while True:
                threading.Thread(target=answer, args=(listener.accept(),), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    sys.stdin.buffer.read()
    shutil.rmtree(Path(address).parent, ignore_errors=True)
    os._exit(0)  # whatever requests are still being made: nobody waits for them


if __name__ == "__main__":
    main(sys.argv[1])
