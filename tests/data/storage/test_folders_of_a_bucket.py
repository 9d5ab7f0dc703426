"""One client makes the requests to all folders of a bucket: their objects' names, and what stays open."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from urllib.parse import quote

import boto3
import pytest
from s3_server import Proxy

from megatron_lcl.data.storage import server
from megatron_lcl.data.storage import store as module
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.data.storage.store import Store

ODD = ["a b", "a%20b", "100%", "ü+'{a}[b]", "x", "x y/z"]
"""names of folders and objects; with one of them another begins"""


def test_names_are_those_below_a_folder_whatever_is_in_them(s3: Proxy, place: str) -> None:
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.server}", region_name="us-east-1")
    for folder in ODD:
        for name in ODD:
            key = f"{place.removeprefix('s3://bucket/')}/{folder}/{name}"
            client.put_object(Bucket="bucket", Key=key, Body=key.encode())
    client.put_object(Bucket="bucket", Key=f"{place.removeprefix('s3://bucket/')}/x/", Body=b"")  # as consoles do
    for folder in ODD:
        for url in {f"{place}/{quote(folder)}", f"{place}/./none/../{quote(folder)}"}:
            store = Store(url)
            names = [f"z/{name}" for name in ODD] if folder == "x y" else ODD
            assert [name for name, _ in store.list() if name] == sorted(names)
            top = {name.split("/")[0]: name.count("/") for name in names}
            assert {name: about[0] < 0 for name, about in store.versions(deep=False).items() if name} == top
            for name in names[:3]:
                assert store.get(name).decode().endswith(f"/{folder}/{name}")
    store = Store(f"{place}/a%2520b")
    store.delete(["x"])
    assert not store.exists("x")
    assert len(Store(place).list("a%20b")) == len(ODD) - 1
    assert len(Store(place).list("a b")) == len(ODD)
    with pytest.raises(StorageError, match=rf"{place}/x/none does not exist"):
        Store(f"{place}/x").get("none")


@pytest.mark.parametrize(
    ("url", "address", "folder"),
    [
        ("s3://bucket", "s3://bucket", ""),
        ("s3://bucket/a%20b/100%/%C3%BC", "s3://bucket", "a b/100%/ü/"),
        ("s3://bucket/a//b/../c", "s3://bucket", "a/c/"),
        ("gs://bucket/a/b", "gs://bucket", "a/b/"),
        ("az://container/a", "az://container", "a/"),
        ("http://host:80", "http://host:80", ""),
        ("https://host/caf%C3%A9/b", "https://host", "café/b/"),
        ("https://host/group%2Fproject/a/b", "https://host/group%2Fproject", "a/b/"),
        ("https://s3.us-east-1.amazonaws.com/bucket/a/b", "https://s3.us-east-1.amazonaws.com/bucket", "a/b/"),
        ("https://account.blob.core.windows.net/container", "https://account.blob.core.windows.net/container", ""),
        ("https://s3.us-east-1.amazonaws.com/a/../b/./c/%2e%2e/d", "https://s3.us-east-1.amazonaws.com/b", "d/"),
    ],
)
def test_a_client_has_the_address_of_a_bucket_or_server(url: str, address: str, folder: str) -> None:
    assert server.address_and_folder(url) == (address, folder)


@pytest.mark.timeout(120)
def test_folders_of_a_bucket_share_a_client(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images may be in as many folders as there are documents."""
    folders = [f"{place}/{k}" for k in range(50)]
    Store(folders[0]).put("object", b"content")
    assert module._server is not None
    tasks = Path(f"/proc/{module._server.process.pid}/task")
    before = len(list(tasks.iterdir()))
    for folder in folders:
        assert Store(folder).exists("object") == (folder == folders[0])
    assert len(list(tasks.iterdir())) < before + server.IN_FLIGHT + 1
    opened: list[str] = []
    monkeypatch.setattr(server, "_open", lambda address, *_: opened.append(address))
    clients = server.Clients()
    for folder in folders:
        server.Remote(folder, clients.at)
    assert opened == ["s3://bucket"] * 2, "one that repeats requests, and one that does not"


def test_others_read_while_a_large_object_is_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has more chunks than there are threads, none of which is free before another object was read."""
    read, begun, chunks = threading.Event(), threading.Semaphore(0), server.IN_FLIGHT + 2

    def answer(_: object, name: str, _etag: str | None, start: int, stop: int) -> bytes:
        if name == "small":
            read.set()
        begun.release()
        assert read.wait(60)
        return bytes([start % 256]) * (stop - start)

    monkeypatch.setattr(server, "_open", lambda *_: None)
    monkeypatch.setattr(server, "CHUNK", 7)
    monkeypatch.setattr(server.Remote, "_range", answer)
    remote = server.Remote("s3://bucket/folder")
    copy = threading.Thread(target=remote.fetch, args=(["large"], [(7 * chunks - 3, None)], str(tmp_path)))
    copy.start()
    assert begun.acquire(timeout=60)
    while begun.acquire(timeout=0.3):  # until no more begin
        pass
    assert remote.read("small", None, [(0, 1)]) == [b"\0"]
    copy.join(60)
    expected = b"".join(bytes([7 * k % 256]) * 7 for k in range(chunks))
    assert (tmp_path / "large").read_bytes() == expected[:-3]


def test_credentials_are_opened_once_by_threads_that_were_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def open(*_: object) -> object:
        opened.append(object())
        return opened[-1]

    monkeypatch.setattr(server, "_open", open)
    client = server.Client("s3://bucket")
    refused, before = client.store, len(opened)
    for _ in range(3):
        client.reopen(refused)
    assert len(opened) == 2 * before
    assert client.store is opened[before]


def test_no_more_threads_is_no_fault_of_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(server, "_open", lambda *_: None)
    monkeypatch.setattr(threading.Thread, "start", start)
    state, said, missing = server.reply_to("head", "s3://bucket/folder", [["object"]], server.Clients())
    assert (state, missing) == ("fault", False)
    assert "cannot start another thread" in said
    assert "ulimit -u" in said
    assert "AWS_" not in said


@pytest.mark.parametrize(("odd", "shown"), [("a//b.png", "a//b.png"), ("redirect\t.png", r"redirect\t.png")])
def test_a_name_that_obstore_has_none_of_is_said_at_once(
    s3: Proxy, place: str, monkeypatch: pytest.MonkeyPatch, odd: str, shown: str
) -> None:
    """By a listing of a folder above, and by whatever is asked of the object itself."""
    monkeypatch.setattr(server, "FIRST_SECONDS", 0.5)
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.5)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.server}", region_name="us-east-1")
    client.put_object(Bucket="bucket", Key=f"{place.removeprefix('s3://bucket/')}/folder/{odd}", Body=b"content")
    client.put_object(Bucket="bucket", Key=f"{place.removeprefix('s3://bucket/')}/other/c.png", Body=b"content")
    remote = server.Remote(place)
    said = rf"^{re.escape(f'{place}/folder/{shown}')}: what has //, .* cannot be read, .*; rename it$"
    s3.reset()
    with pytest.raises(StorageError, match=said) as caught:
        remote.list("", True)
    assert not caught.value.missing
    assert len(s3.requests) == 1
    s3.reset()
    for ask in (
        lambda: remote.head([f"folder/{odd}"]),
        lambda: remote.read(f"folder/{odd}", None, [(0, 1)]),
        lambda: remote.delete([f"folder/{odd}"]),
        lambda: remote.put(f"folder/{odd}", b"content"),
    ):
        with pytest.raises(StorageError, match=said):
            ask()
    assert not s3.requests
    assert remote.list("other", True)[0][:2] == ("other/c.png", 7)
