"""`fetch` against a server on loopback that does all that servers do, and killed again and again."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from data.fetch.faulty_server import EXPECTED, LOGIN, WANTS_CREDENTIALS, image, requests_of, serving
from data.fetch.stores import images_in, read_rows

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from megatron_lcl.cli import main
from megatron_lcl.data.fetch.run import _process, fetch, summary
from megatron_lcl.data.fetch.settings import PROXY_LOGIN, Settings, Store
from megatron_lcl.data.prepare.importers.urls import url_key
from megatron_lcl.train.forks import stop_forkserver

QUICK = Settings(
    timeout=10, retries=1, backoff=0.02, concurrency=48, per_host=32, delay=0, max_bytes=100_000, allow_private=True
)
FLAGS = (
    *("--timeout", "10", "--retries", "1", "--backoff", "0.02", "--concurrency", "48", "--per-host", "32"),
    *("--delay", "0", "--max-bytes", "100000", "--allow-private"),
)
Server = tuple[list[str], int]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as (addresses, port):
        yield addresses, port


def mixed(server: Server, number: int, start: int = 0) -> list[str]:
    """URLs of all kinds, in a random order: each fault 1 in 60, slow ones 1 in 600."""
    addresses, port = server
    faults = [kind for kind in EXPECTED if kind not in ("ok", "drip")]
    urls = []
    for k in range(start, start + number):
        kind = faults[k // 4 % len(faults)] if k % 4 == 0 else "ok"
        kind = "drip" if k % 600 == 0 else kind
        urls.append(f"http://{addresses[k % 7 % len(addresses)]}:{port}/{kind}/{k}")
    random.Random(0).shuffle(urls)
    return urls


def check_store(output: Path, urls: Sequence[str]) -> None:
    """Every URL is accounted for once, as its kind expects, and the store has the kept images, each once."""
    table = list(read_rows(output))
    rows = {row["url"]: row for row in table}
    assert Counter(row["url"] for row in table) == Counter(urls)
    members = images_in(output)
    for url in urls:
        kind, number = urlsplit(url).path.strip("/").split("/")
        row = rows[url]
        assert (row["status"], row["reason"]) == EXPECTED[kind], url
        assert row["key"] == hashlib.sha256(url.encode()).hexdigest()
        if row["status"] == "kept":
            data = members.pop(row["key"])
            assert data == image(number)
            assert row["sha256"] == hashlib.sha256(data).hexdigest()
            assert (row["size"], row["width"], row["height"]) == (len(data), 8, 6)
    assert not members
    assert not [*output.glob("*.partial"), *output.glob("*.log"), *output.glob("*.table")]


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            total += 1
    return total


def fetch_with_kills(
    urls: list[str], server: Server, folder: Path, kills: int, shard_urls: int, store: Store = "tar"
) -> None:
    """Begin, and kill soon after something was written, so often; then to the end."""
    listed, output = folder / "urls.txt", folder / "store"
    listed.write_text("\n".join(urls) + "\n")
    stop_forkserver()  # one may have imported something else, and the next one is to
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_lcl.data.fetch.run", "megatron_lcl.data.fetch.work"])
    settings = dataclasses.replace(QUICK, shard_urls=shard_urls, store=store)
    moments = random.Random(1)
    before = requests_of(*server)
    for _ in range(kills):
        size = size_of(output)
        process = context.Process(target=fetch, args=(listed, output, settings))
        process.start()
        deadline = time.monotonic() + 60
        while size_of(output) == size and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, len(urls) / kills / 1000))
        assert process.is_alive(), "done before the last kill"
        process.kill()
        process.join()
    stop_forkserver()
    found = fetch(listed, output, settings)
    assert found["kept"] + found["dead"] + found["refused"] == len(urls)
    check_store(output, urls)
    again = requests_of(*server) - before
    fetched = [urlsplit(url).path for url in urls if "/ok/" in url]
    twice = sum(again[path] for path in fetched) - len(fetched)
    assert 0 <= twice <= kills * settings.concurrency  # only what was under way
    assert fetch(listed, output, settings) == {**found, "todo": 0}
    assert requests_of(*server) - before == again  # nothing is asked for again


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_25_times(server: Server, tmp_path: Path) -> None:
    fetch_with_kills(mixed(server, 5000), server, tmp_path, kills=25, shard_urls=300)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_parquet_killed_8_times(server: Server, tmp_path: Path) -> None:
    fetch_with_kills(mixed(server, 1200, 3 * 10**6), server, tmp_path, kills=8, shard_urls=100, store="parquet")
    assert not list((tmp_path / "store").glob("*.tar"))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_25_times_with_100_000_urls(server: Server, tmp_path: Path) -> None:
    fetch_with_kills(mixed(server, 100_000, 10**6), server, tmp_path, kills=25, shard_urls=3000)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_several_processes_and_their_parent_killed(server: Server, tmp_path: Path) -> None:
    """The processes of a parent that is killed end by themselves, and whoever goes on takes over from them."""
    urls, listed, output = mixed(server, 800, 2 * 10**6), tmp_path / "urls.txt", tmp_path / "store"
    listed.write_text("\n".join([*urls, *urls[:50]]))
    words = ["fetch", str(listed), "--output", str(output), "--workers", "2", "--shard-urls", "100", *FLAGS]
    parent = subprocess.Popen([sys.executable, "-m", "megatron_lcl", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(output.glob("*.log")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert parent.poll() is None
    parent.kill()
    parent.wait()
    assert main(words) == 0
    check_store(output, urls)


def run(urls: Sequence[str], folder: Path, *flags: str) -> dict[str, tuple[str, str]]:
    """{path: (status, reason)} after the command."""
    listed, output = folder / "urls.txt", folder / "store"
    listed.write_text("\n".join(urls))
    assert main(["fetch", str(listed), "--output", str(output), *FLAGS, *flags]) == 0
    return {urlsplit(str(row["url"])).path: (row["status"], row["reason"]) for row in read_rows(output)}  # type: ignore[misc]


def test_what_becomes_of_every_kind(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (address, *_), port = server
    kinds = [kind for kind in EXPECTED if kind != "drip"]
    others = ["http://:x/no-port", "http://127.0.0.1:99999/port", "http://nowhere.invalid/host"]
    found = run([*(f"http://{address}:{port}/{kind}/kind" for kind in kinds), *others], tmp_path)
    assert {path: end for path, end in found.items() if "kind" in path} == {f"/{k}/kind": EXPECTED[k] for k in kinds}
    assert found["/no-port"] == found["/port"] == ("dead", "not a URL")
    assert found["/host"] in (("dead", "host not found"), ("dead", "name not resolved"))
    out = capsys.readouterr().out
    assert f"{len(kinds) + 3} URLs: 3 kept" in out
    assert "refused: robots.txt" in out


def test_retry_after_is_kept(server: Server, tmp_path: Path) -> None:
    (address, *_), port = server
    assert run([f"http://{address}:{port}/wait/1"], tmp_path) == {"/wait/1": ("kept", "")}
    (tar,) = (tmp_path / "store").glob("*.tar")
    waited = float(tar.read_bytes().split(b"number\0")[1][:5])
    assert waited >= 1


def test_host_that_asks_for_a_long_wait_is_left_alone(server: Server, tmp_path: Path) -> None:
    """Its first request says so; no other of its URLs is asked for, and those of other hosts are fetched."""
    (address, other, *_), port = server
    urls = [f"http://{address}:{port}/later/{k}" for k in range(20)]
    found = run([*urls, f"http://{other}:{port}/ok/0.25"], tmp_path)
    assert found.pop("/ok/0.25") == ("kept", "")
    assert found == {f"/later/{k}": ("dead", "status 429, asks for a long wait") for k in range(20)}
    assert summary(tmp_path / "store")["reasons"] == {"dead: status 429, asks for a long wait": 20}
    asked = {path: count for path, count in requests_of(server[0], port).items() if path.startswith("/later/")}
    assert sum(asked.values()) == 1, asked


def test_a_robots_txt_that_holds_up_no_other_host(tmp_path: Path) -> None:
    """One that is small and takes gigabytes when it is parsed, and one that asks for years between requests."""
    with serving(tmp_path, 13) as (addresses, port):
        asked = zip(addresses[-4:], ("ok", "ok", "ok", "busy"), strict=True)
        urls = [f"http://{address}:{port}/{kind}/{address}-{k}" for address, kind in asked for k in range(3)]
        found = run(urls, tmp_path)
        assert requests_of(addresses, port)["/robots.txt"] == 4
    counts = Counter((path.split("-")[0], *end) for path, end in found.items())
    assert counts == {
        ("/ok/127.0.0.10", "kept", ""): 3,
        ("/ok/127.0.0.11", "refused", "robots.txt too long"): 3,
        ("/ok/127.0.0.12", "kept", ""): 1,
        ("/ok/127.0.0.12", "dead", "robots.txt asks for a long wait"): 2,
        ("/busy/127.0.0.13", "dead", "status 429"): 1,
        ("/busy/127.0.0.13", "dead", "robots.txt asks for a long wait"): 2,
    }


def test_images_are_scaled_down(server: Server, tmp_path: Path) -> None:
    (address, *_), port = server
    run([f"http://{address}:{port}/ok/1"], tmp_path, "--max-image-side", "4")
    (row,) = read_rows(tmp_path / "store")
    assert (row["width"], row["height"]) == (4, 3)
    (tar,) = (tmp_path / "store").glob("*.tar")
    with tarfile.open(tar) as archive:
        (member,) = archive
        assert member.name == row["key"] + ".jpg"
        assert hashlib.sha256(archive.extractfile(member).read()).hexdigest() == row["sha256"]  # type: ignore[union-attr]


def test_pixels_are_bounded(server: Server, tmp_path: Path) -> None:
    (address, *_), port = server
    found = run([f"http://{address}:{port}/ok/2"], tmp_path, "--max-pixels", "47")
    assert found == {"/ok/2": ("refused", "too many pixels")}


def test_a_store_that_is_finished_says_that_nothing_is_tried_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (address, *_), port = server
    (tmp_path / "urls.txt").write_text(f"http://{address}:{port}/ok/of-a-private-address")
    fetch = ["fetch", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "store")]
    assert main(fetch) == 0
    assert (first := capsys.readouterr().out).endswith(
        ": 1 URL: 0 kept (0 bytes), 0 dead, 1 refused\n           1  refused: private address\n"
    )
    assert main([*fetch, "--allow-private"]) == 0
    assert requests_of(*server)["/ok/of-a-private-address"] == 0
    assert capsys.readouterr().out.startswith(first + "nothing was left to request; ")


def test_host_that_does_not_answer(server: Server, tmp_path: Path) -> None:
    """Its URLs are not all tried, and those of others are fetched."""
    (address, *_), port = server
    dead = [f"http://127.0.0.9:9/ok/{k}" for k in range(40)]
    found = run([*dead, f"http://{address}:{port}/ok/0.5"], tmp_path, "--retries", "0")
    assert found.pop("/ok/0.5") == ("kept", "")
    reasons = Counter(reason for _, reason in found.values())
    assert set(reasons) == {"no connection", "host does not answer"}
    assert 10 <= reasons["no connection"] <= 10 + 32


@pytest.mark.parametrize(("hosts", "seconds"), [(60, 0.0), (60, 60.0), (2, 60.0)])
def test_nothing_is_reached(
    hosts: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network no URL is called dead; in the first run neither, nor of a short list."""
    monkeypatch.setattr("megatron_lcl.data.fetch.work.OUTAGE_SECONDS", seconds)
    listed = tmp_path / "urls.txt"
    listed.write_text("\n".join(f"http://127.0.1.{k}:9/a" for k in range(hosts)))
    words = ["fetch", str(listed), "--output", str(tmp_path / "store"), *FLAGS, "--retries", "0"]
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-lcl fetch:")]
    assert "is there a network" in line
    assert not list(read_rows(tmp_path / "store"))
    assert not any(log.read_bytes() for log in (tmp_path / "store").glob("*.log"))


def test_a_single_dead_host_tells_nothing_of_the_network(tmp_path: Path) -> None:
    assert run(["http://127.0.0.9:9/a"], tmp_path) == {"/a": ("dead", "no connection")}


def test_full_disk(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the file; once there is room, the same command goes on."""
    disk, listed = tmp_path / "disk", tmp_path / "urls.txt"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=144k", "tmpfs", str(disk)]
    if (mounted := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"only root mounts a small file system: {mounted.stderr.strip()}")
    try:
        urls = [f"http://{server[0][0]}:{server[1]}/ok/full{k}" for k in range(300)]
        listed.write_text("\n".join(urls))
        words = ["fetch", str(listed), "--output", str(disk / "store"), *FLAGS, "--shard-urls", "200"]
        assert main(words) == 2
        assert re.search(r"^megatron-lcl fetch: .*/disk/store/\S+: No space left", capsys.readouterr().err, re.M)
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        assert main(words) == 0
        check_store(disk / "store", urls)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_worker_says_what_its_disk_cannot_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the error names no file: else it would be taken for one that was killed, and started again."""

    class Full:
        def __init__(self, *_: object, **__: object) -> None: ...

        async def run(self) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("megatron_lcl.data.fetch.work.Worker", Full)
    plan: Any = None
    said = _process(tmp_path, plan, [0], QUICK, 1, None, None)
    assert said is not None
    assert said.startswith(f"{tmp_path}: Disk quota exceeded (")


def refused(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that exits with 2."""
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_bad_input_leaves_nothing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses, port = server
    urls, empty, output = tmp_path / "urls.txt", tmp_path / "empty.txt", tmp_path / "store"
    urls.write_text(f"http://{addresses[0]}:{port}/ok/1\nhttps://127.0.0.3:{port}/ok/1\n")
    empty.write_text("pictures/1.jpg\nftp://example.org/2.jpg\n")
    picture = tmp_path / "picture.png"
    picture.write_bytes(image("1"))
    for words, said in (
        ([str(empty)], "no image URL"),
        ([str(tmp_path / "gone.txt")], "does not exist"),
        ([str(picture)], "is none of .parquet"),
        ([str(urls), "--proxy", "http://127.0.0.1:9"], "proxy 127.0.0.1:9 refuses"),
        ([str(urls), "--proxy", f"http://me:secret@127.0.0.2:{port}"], f"proxy 127.0.0.2:{port} refuses (status 407)"),
        ([str(urls), "--proxy", "socks5://127.0.0.1:9"], "give http://host:port"),
        ([str(urls), "--proxy", "http://me@:9"], "--proxy: give http://host:port"),
        ([str(urls), "--proxy", "https://me:secret@host:8080"], "--proxy https://host:8080: give http://host:port"),
        ([str(urls), "--proxy", "me:secret@host:8080"], "--proxy host:8080: give http://host:port"),
        ([str(urls), "--proxy", "http://me:a/secret@b@host:80/"], "--proxy http://host:80: give http://host:port"),
        ([str(urls), "--proxy", "http://me:secret"], "--proxy: give http://host:port"),
        ([str(urls), "--proxy", "http://host:80"], f"{PROXY_LOGIN} is not user:password as in a URL"),
        ([str(urls), "--per-host", "0"], "--per-host 0: give 1 or more"),
        ([str(urls), "--delay", "nan"], "--delay nan: give 0"),
        ([str(urls), "--workers", "0"], "--workers 0"),
        ([str(urls), "--user-agent", " "], "--user-agent"),
    ):
        with monkeypatch.context() as patch:
            if PROXY_LOGIN in said:
                patch.setenv(PROXY_LOGIN, "me:a/secret")
            line = refused(["fetch", *words, "--output", str(output), "--allow-private"], capsys)
        assert said in line, line
        assert "secret" not in line
        assert not output.exists()
    output.mkdir()
    (output / "mine").write_text("")
    assert "is not empty" in refused(["fetch", str(urls), "--output", str(output)], capsys)
    assert [path.name for path in output.iterdir() if path.name != ".lock"] == ["mine"]


def test_a_store_is_of_one_input(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (address, *_), port = server
    urls = [f"http://{address}:{port}/ok/1"]
    run(urls, tmp_path)
    again = ["fetch", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "store"), *FLAGS]
    assert main([*again, "--per-host", "1"]) == 0
    assert "images fetched without --max-image-side: take another --output" in refused(
        [*again, "--max-image-side", "4"], capsys
    )
    assert "with --store tar" in refused([*again, "--store", "parquet"], capsys)
    (tmp_path / "urls.txt").write_text(urls[0] + "2\n")
    assert "the images of another input" in refused(again, capsys)


def test_through_a_proxy(server: Server, tmp_path: Path) -> None:
    """Names are the proxy's; what names a local machine is refused by its name."""
    port = server[1]
    urls = ["http://pictures.example/ok/7", "http://localhost/ok/8", "http://10.0.0.1/ok/9", "http://[::1]/ok/10"]
    listed, output = tmp_path / "urls.txt", tmp_path / "store"
    listed.write_text("\n".join(urls))
    flags = [flag for flag in FLAGS if flag != "--allow-private"]
    proxy = f"http://{LOGIN}@{WANTS_CREDENTIALS}:{port}"
    assert main(["fetch", str(listed), "--output", str(output), *flags, "--proxy", proxy]) == 0
    found = {row["url"]: (row["status"], row["reason"]) for row in read_rows(output)}
    assert found == {urls[0]: ("kept", ""), **dict.fromkeys(urls[1:], ("refused", "private address"))}


def test_keys_are_those_of_the_urls_as_given() -> None:
    assert url_key("http://example.org/ä b") == hashlib.sha256("http://example.org/ä b".encode()).hexdigest()
