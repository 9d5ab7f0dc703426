"""Objects and ranges of them through a proxy with faults: what arrives is what was put, or an error of one line."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import UserDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import boto3
import pytest
from forks import fork
from ports import closed_port
from s3_server import Proxy

from megatron_lcl.data.storage import server
from megatron_lcl.data.storage import store as module
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.data.storage.store import Store

CONTENT = bytes(range(256)) * 4000
LARGE = os.urandom(1 << 20) * 20
"""of more than one part"""


def peer(s3: Proxy) -> object:
    return boto3.client("s3", endpoint_url=s3.url, region_name="us-east-1")


def test_objects_are_what_boto3_reads_and_writes(s3: Proxy, place: str, tmp_path: Path) -> None:
    store, prefix = Store(place), place.removeprefix("s3://bucket/")
    store.put("bytes", CONTENT)
    (tmp_path / "file").write_bytes(LARGE)
    store.put("below/file", tmp_path / "file")
    client = peer(s3)
    assert client.get_object(Bucket="bucket", Key=f"{prefix}/bytes")["Body"].read() == CONTENT
    assert client.get_object(Bucket="bucket", Key=f"{prefix}/below/file")["Body"].read() == LARGE
    client.put_object(Bucket="bucket", Key=f"{prefix}/theirs", Body=b"")
    assert store.list() == [("below/file", len(LARGE)), ("bytes", len(CONTENT)), ("theirs", 0)]
    assert store.list("below") == [("below/file", len(LARGE))]
    assert store.get("theirs") == b""
    assert store.exists("bytes")
    assert not store.exists("other")
    store.fetch(["bytes"], tmp_path)
    assert (tmp_path / "bytes").read_bytes() == CONTENT
    store.delete(["theirs", "never there"])
    assert not store.exists("theirs")


def test_a_large_object_has_no_more_parts_than_s3_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr("obstore.put", lambda _store, _key, _source, chunk_size: told.append(chunk_size))
    monkeypatch.setattr(server, "_open", lambda *_: None)
    monkeypatch.setattr(server.Remote, "_head", lambda *_: None)
    remote, path = server.Remote("s3://bucket/folder"), tmp_path / "object"
    for size in (0, 160_000 << 20, (160_000 << 20) + 1, 5 << 40):
        with path.open("wb") as file:
            file.truncate(size)
        remote.put("object", str(path))
    remote.put("object", b"few")
    assert told == [16 << 20, 16 << 20, 17 << 20, 525 << 20, 16 << 20]
    remote._client.pool.shutdown()


@pytest.mark.timeout(120)
def test_nothing_is_fetched_out_of_a_folder_or_onto_a_full_disk(s3: Proxy, place: str, tmp_path: Path) -> None:
    store, folder = Store(place), tmp_path / "folder"
    folder.mkdir()
    outside = tmp_path / "outside"
    for name in (str(outside), "../outside", "below/../../outside", "", "."):
        store.put(str(outside).removeprefix("/"), b"theirs")
        with pytest.raises(StorageError, match=f"{place}: '{name}' is no name of a file below a folder"):
            store.fetch([name], folder)
    # what a server says may be wrong, and what it sends endless
    head = 'HTTP/1.1 200 OK\r\nContent-Length: {}\r\nETag: "a"\r\nLast-Modified: Thu, 26 Nov 2026 00:00:00 GMT\r\n\r\n'
    s3.reset()
    s3.answer = head.format(shutil.disk_usage(folder).free + 10**9).encode()
    said = rf"{place}: .*B are to be copied, and .* are free in {folder}; make room"
    with pytest.raises(StorageError, match=said) as caught:
        store.fetch(["object"], folder)
    assert str(caught.value) == f"{caught.value.said()}, or data.cache"
    assert "data.cache" not in caught.value.said()
    assert {request.method for request in s3.requests} == {"HEAD"}
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.slow
def test_503s_and_cut_bodies_are_asked_for_again(s3: Proxy, place: str, tmp_path: Path) -> None:
    store = Store(place)
    store.put("object", LARGE)
    ranges = [(i * 100_003, i * 100_003 + 40_000) for i in range(60)]
    s3.unavailable, s3.cut = 5, 4
    assert store.read("object", ranges) == [LARGE[a:b] for a, b in ranges]
    store.fetch(["object"], tmp_path)
    assert (tmp_path / "object").read_bytes() == LARGE
    s3.cut = 0
    store.put("again", LARGE)
    assert {request.status for request in s3.requests} >= {206, 503}
    s3.reset()
    assert store.get("again") == LARGE


SCALED = """
import sys, threading, time
from megatron_lcl.data.storage import server
late = 0.0
def watch():  # seconds for which this process was not given the time, at most
    global late
    while True:
        began = time.monotonic()
        time.sleep(0.05)
        late = max(late, time.monotonic() - began - 0.05)
threading.Thread(target=watch, daemon=True).start()
server.SILENT_SECONDS, server.PUT_SECONDS, server.PATIENCE_SECONDS = 1.5, 30.0, 2.0
remote = server.Remote(sys.argv[1])
remote.put("object", sys.argv[2])
server.CHUNK = 1 << 20
try:
    remote.fetch(["object"], [None], sys.argv[3])
finally:
    print(late)
"""


@pytest.mark.slow
def test_a_slow_link_is_no_failure_and_silence_is(s3: Proxy, place: str, tmp_path: Path) -> None:
    """Eight requests share a link that takes much longer for each than may pass without a byte."""
    content = LARGE[: 8 << 20]
    (tmp_path / "file").write_bytes(content)
    command = [sys.executable, "-c", SCALED, place, str(tmp_path / "file"), str(tmp_path)]
    for _ in range(5):
        s3.reset()
        s3.speed = 2 << 20
        done = subprocess.run(command, timeout=60, capture_output=True, text=True)
        if max(s3.late, float(done.stdout)) < 0.5:  # else an end of the link was silent, on a machine busy with others
            break
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "object").read_bytes() == content
    assert [request.status for request in s3.requests if request.range] == [206] * 8, "each once"
    s3.speed = 1
    ended = subprocess.run(
        [*command[:2], SCALED.replace("remote.put", "#"), *command[3:]], timeout=60, capture_output=True, text=True
    )
    assert "StorageError" in ended.stderr.splitlines()[-1]
    assert "no whole answer from" in ended.stderr.splitlines()[-1]


def test_an_object_that_is_replaced_is_not_mixed(place: str) -> None:
    store = Store(place)
    store.put("object", CONTENT)
    etag = store.head(["object"])[0][1]
    assert store.read("object", [(5, 9)], etag) == [CONTENT[5:9]]
    store.put("object", CONTENT[::-1])
    with pytest.raises(StorageError, match="object was replaced while it was read"):
        store.read("object", [(5, 9)], etag)


def test_forked_processes_ask_and_a_killed_server_comes_back(place: str) -> None:
    store = Store(place)
    store.put("object", CONTENT)
    for _ in range(2):
        child = fork()
        mine = (0, 1000) if child else (1000, 3000)  # both ask at once
        try:
            right = all(store.read("object", [mine]) == [CONTENT[slice(*mine)]] for _ in range(40))
        finally:
            if not child:
                os._exit(0 if right else 1)
        assert right
        assert os.waitpid(child, 0)[1] == 0
        module._server.process.kill()
        assert store.get("object") == CONTENT


def test_a_fork_waits_until_a_server_has_started() -> None:
    """Else what is forked keeps a pipe open whose end the thread that starts it waits for."""
    order = []

    def start() -> None:
        with module._starting:
            begun.set()
            time.sleep(0.5)
            order.append("started")

    begun, thread = threading.Event(), threading.Thread(target=start)
    thread.start()
    assert begun.wait(60)
    if not (child := fork()):
        os._exit(0 if module._starting.acquire(blocking=False) else 1)
    order.append("forked")
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert order == ["started", "forked"]
    assert not module._starting.locked()


def servers() -> list[Path]:
    """The folders of those that this process has started and that run."""
    found = []
    for file in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            for pid in file.read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    if b"megatron_lcl.data.storage.server" in words:
                        found.append(Path(os.fsdecode(words[-2])).parent)
    return found


@pytest.mark.timeout(120)
def test_a_server_ends_once_nobody_asks_it(s3: Proxy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After other settings or an interrupted question; what another thread has asked it is answered first."""
    store = Store(place)
    store.put("object", CONTENT)
    monkeypatch.setenv("AWS_OF_A_TEST", "0")
    s3.reset()
    s3.latency = 2.0
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(store.read, "object", [(5, 9)])
        while not module._server or module._server.settings.get("AWS_OF_A_TEST") != "0":
            time.sleep(0.01)
        first = module._server.address
        while not s3.requests and not asked.done():
            time.sleep(0.01)
        s3.latency = 0.0
        for k in range(1, 4):
            monkeypatch.setenv("AWS_OF_A_TEST", str(k))
            assert store.get("object") == CONTENT
        assert asked.result() == [CONTENT[5:9]]
        assert [request.range for request in s3.requests].count("bytes=5-8") == 1
    s3.latency = 10.0  # seconds in which the signal has to come
    handler = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            store.get("object")
    finally:
        signal.signal(signal.SIGUSR1, handler)
    s3.latency = 0.0
    assert store.get("object") == CONTENT
    deadline = time.monotonic() + 30
    while servers() != [Path(module._server.address).parent] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert servers() == [Path(module._server.address).parent]
    assert not Path(first).parent.exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("length", [70, 90])
def test_the_folder_for_temporary_files_may_have_a_long_path(
    place: str, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="t") as above:
        folder = Path(f"{above}/{'n' * (length - len(above) - 1)}")
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setattr(module, "_server", None)
        Store(place).put("object", CONTENT)
        assert Store(place).get("object") == CONTENT
        assert Path(module._server.address).is_relative_to(folder) == (length == 70)


@pytest.mark.timeout(120)
def test_the_current_folder_is_not_searched_for_code(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("megatron_lcl.py", "queue.py"):
        (tmp_path / name).write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_server", None)
    assert not Store(place).exists("object")


class Changing(UserDict[str, str]):
    """An environment of which another thread deletes a variable that was just listed."""

    def __iter__(self) -> Iterator[str]:
        return iter([*self.data, "AWS_OF_ANOTHER_THREAD"])


@pytest.mark.timeout(120)
def test_another_thread_may_change_the_environment(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_server", None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", Changing(os.environ))
        assert not Store(place).exists("object")


def no_folder(*_: Any, **__: Any) -> str:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_process(*_: Any, **__: Any) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


@pytest.mark.timeout(120)
def test_a_process_that_cannot_be_started_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_server", None)
    long = tmp_path / ("n" * 100)

    def too_long(**_: Any) -> str:
        long.mkdir()
        return str(long)

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", too_long)
        with pytest.raises(StorageError, match=r"did not start .*AF_UNIX path too long"):
            Store(place).exists("object")
    assert not long.exists()
    above = tempfile.gettempdir()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", no_folder)
        with pytest.raises(StorageError, match=f"{above}: No space left on device.*TMPDIR"):
            Store(place).exists("object")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", no_process)
        with pytest.raises(StorageError, match=r"did not start .*Resource temporarily"):
            Store(place).exists("object")
    assert not Store(place).exists("object")


def planted(code: str, status: str = "403 Forbidden") -> bytes:
    """What a server may say, with everything in it that should stay secret."""
    said = f"{os.environ['AWS_ACCESS_KEY_ID']} {os.environ['AWS_SECRET_ACCESS_KEY']}"
    body = f"<Error><Code>{code}</Code><Message>{said}</Message><StringToSign>{said}</StringToSign></Error>".encode()
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("SignatureDoesNotMatch", "403 Forbidden", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", "400 Bad Request", r"refused \(ExpiredToken\); set AWS_"),
        ("NoSuchBucket", "404 Not Found", "there is no bucket 'of-nosuchbucket' at http://127.0.0.1"),
        ("PermanentRedirect", "301 Moved", "set AWS_REGION"),
    ],
)
def test_errors_have_one_line_and_no_secret(s3: Proxy, code: str, status: str, said: str) -> None:
    place = f"s3://of-{code.lower()}/folder"  # not answered yet
    for question in (lambda: Store(place).get("object"), lambda: Store(place).list()):
        s3.answer = planted(code, status)
        with pytest.raises(StorageError, match=said) as raised:
            question()
        s3.answer = b""
        message = str(raised.value)
        assert "\n" not in message
        assert place in message
        assert "PLANTED" not in message
        assert "secret/of" not in message


@pytest.mark.timeout(120)
def test_a_clock_that_is_wrong_for_a_while_is_waited_for(s3: Proxy, place: str) -> None:
    """That of a machine that was suspended, until its time daemon has seen it; one that stays wrong is named."""
    store = Store(place)
    store.put("object", CONTENT)
    s3.reset()
    s3.answer = planted("RequestTimeTooSkewed")
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(store.read, "object", [(5, 9)])
        while not asked.done() and [request.status for request in s3.requests].count(403) < 3:
            time.sleep(0.01)
        s3.answer = b""
        assert asked.result() == [CONTENT[5:9]]
    s3.answer = planted("RequestTimeTooSkewed")
    with pytest.raises(StorageError, match=r"refused the time of this machine \(RequestTimeTooSkewed\)") as raised:
        Store("s3://never-answered/folder").list()
    assert "PLANTED" not in str(raised.value)


def test_credentials_that_were_taken_before_are_read_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a role, which have outlived themselves while the machine was suspended."""
    opened: list[str] = []

    def open_store(*_: Any) -> str:
        opened.append(f"store {len(opened)}")
        return opened[-1]

    monkeypatch.setattr(server, "_open", open_store)
    remote = server.Remote("s3://bucket/folder")
    tried: list[str] = []

    def answered_from(good: int) -> str:
        tried.append(remote._client.store)
        if len(opened) < good:
            raise PermissionError("status: 400, <Code>ExpiredToken</Code>")
        return remote._client.store

    with pytest.raises(StorageError, match="refused"):  # wrong from the first
        remote._again("object", lambda: answered_from(3))
    assert len(tried) == 1
    assert remote._again("object", lambda: answered_from(2)) == "store 0"
    assert remote._again("object", lambda: answered_from(4)) == "store 2"
    assert len(opened) == 4
    tried.clear()
    with pytest.raises(StorageError, match=r"refused \(ExpiredToken\)"):
        remote._again("object", lambda: answered_from(100))
    assert len(tried) == 2


@pytest.mark.timeout(30)
def test_chunks_of_a_file_that_failed_are_written_to_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next file that is opened has the descriptor of the one before."""
    began, opened = threading.Event(), threading.Event()
    monkeypatch.setattr(server, "_open", lambda *_: None)
    monkeypatch.setattr(server, "CHUNK", 4)
    remote = server.Remote("s3://bucket/folder")

    def read(_name: str, _etag: str | None, start: int, stop: int) -> bytes:
        if start == 0:
            assert began.wait(20)
            raise StorageError("no answer")
        began.set()
        assert opened.wait(20)
        return b"x" * (stop - start)

    monkeypatch.setattr(remote, "_range", read)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(remote.fetch, ["first"], [(8, None)], str(tmp_path))
        wait([fetched], timeout=0.3)  # it is not over before its last chunk is
        with (tmp_path / "second").open("wb"):
            opened.set()
            with pytest.raises(StorageError, match="no answer"):
                fetched.result()
            remote._client.pool.shutdown()
    assert (tmp_path / "second").read_bytes() == b""


def test_a_wrong_address_shows_soon(s3: Proxy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        since = time.monotonic()
        with pytest.raises(StorageError, match=f"no whole answer from http://127.0.0.1:{port}; check AWS_ENDPOINT_URL"):
            Store(place).get("object")
        assert time.monotonic() - since < 60  # not the 300 s of a run that has begun
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    with pytest.raises(StorageError, match="there is no bucket 'other'"):
        Store("s3://other/folder").get("object")


def test_missing_credentials_name_the_variables(s3: Proxy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # where a cloud would have some
    with pytest.raises(StorageError, match=r"no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Store(place).get("object")


def test_a_user_without_a_home_folder_has_no_keys_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", without)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert server._profile() == {}


def test_keys_of_a_file_are_taken_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "own")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    for secret in ("chosen%by%(hand)s", "twice%%"):
        (tmp_path / "keys").write_text(f"[own]\naws_access_key_id = me\naws_secret_access_key = {secret}\n")
        assert server._profile() == {"access_key_id": "me", "secret_access_key": secret}


def test_an_object_may_be_named_redirect(s3: Proxy, place: str) -> None:
    """A passing fault at it is one, and no word on the bucket."""
    store = Store(place)
    store.put("redirect.png", CONTENT)
    s3.reset()
    s3.answer = planted("SlowDown", "503 Slow Down")
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(store.get, "redirect.png")
        while not asked.done() and [request.status for request in s3.requests].count(503) < 2:
            time.sleep(0.01)
        s3.answer = b""
        assert asked.result() == CONTENT
