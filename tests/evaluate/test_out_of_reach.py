"""Names whose weights are on a hub that refuses, is silent or breaks fail at once; slow downloads do not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from convert.conftest import random_model
from ports import closed_port, hold_port

from megatron_lcl.convert.export import export_model
from megatron_lcl.convert.pool import POOL
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.hub import Remote, by_cache_alone, out_of_reach


@contextlib.contextmanager
def hub(folder: Path, pause: float = 0.0, port: int = 0) -> Iterator[str]:
    """A hub on this machine: serves `folder/OWNER/NAME/…`, with a pause before the bytes of each file of `site/hf`.
    Repositories of `mute/` never get an answer, those of `broken/` get status 503."""
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            owner = self.path.lstrip("/").split("/")[0]
            if owner == "mute":
                stop.wait(60)
                self.close_connection = True
                return
            name, _, file = self.path.partition("/resolve/main/")
            path = folder / name.lstrip("/") / file
            found = bool(file) and path.is_file()
            body = path.read_bytes() if found else b""
            self.send_response(503 if owner == "broken" else 200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET" and found:
                time.sleep(pause if name == "/site/hf" else 0.0)
                self.wfile.write(body)

        do_GET = do_HEAD

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_why_a_host_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(tmp_path) as address, closed_port() as closed:
        for plain in (None, tmp_path / "x.npz"):  # of the hub, and of any other server
            for url, said in (
                (f"{address}/a/b/resolve/main/none", None),  # an answer
                (f"{address}/broken/b/resolve/main/c", "HTTP status 503"),
                (f"{address}/mute/b/resolve/main/c", "has not answered for 1 s (HF_HUB_ETAG_TIMEOUT="),
                (f"http://127.0.0.1:{closed}/a/b/resolve/main/c", f"http://127.0.0.1:{closed} cannot be reached ("),
            ):
                monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1" if "/mute/" in url else "20")
                started = time.monotonic()
                fault = out_of_reach(Remote(url, "give a path", plain))
                assert time.monotonic() - started < 30
                assert fault is None if said is None else said in str(fault), (url, fault)


def test_a_load_by_the_cache_alone_keeps_no_other_thread_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "20")
    with hub(tmp_path) as address, ThreadPoolExecutor(1) as pool:
        remote = Remote(f"{address}/a/b/resolve/main/none", "give a path")
        with by_cache_alone("hf:x", remote, "out"):
            other = pool.submit(out_of_reach, remote)
            time.sleep(0.3)
        assert other.result(30) is None


def test_a_file_of_another_server_is_taken_from_where_it_was_kept(tmp_path: Path) -> None:
    remote = Remote("http://127.0.0.1:1/x.npz", "give timm:local-dir:DIR", tmp_path / "x.npz")
    with pytest.raises(UserError, match=f"timm:x: out, .* not all in the cache {tmp_path}; give timm:local-dir:DIR"):  # noqa: SIM117
        with by_cache_alone("timm:x", remote, "out"):
            raise AssertionError("nothing is to be loaded")
    (tmp_path / "x.npz").write_bytes(b"")
    with by_cache_alone("timm:x", remote, "out"):
        pass


LOADS = """
import json, sys, time
import timm, transformers, open_clip
from megatron_lcl.evaluate.encoders.load import load_encoder
for line in sys.stdin:
    spec, started = line.strip(), time.monotonic()
    try:
        said = load_encoder(spec).fingerprint
    except ValueError as error:
        said = str(error)
    print(json.dumps([spec, said, time.monotonic() - started]), flush=True)
"""


class Loader:
    """A process whose hub is at `address`."""

    def __init__(self, address: str, cache: Path) -> None:
        variables = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_ETAG_TIMEOUT": "3"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOADS], env={**os.environ, **variables}, stdin=pipe, stdout=pipe, text=True
        )

    def __call__(self, spec: str) -> tuple[str, float]:
        """What it says of the model, and the seconds it took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(spec + "\n")
        self.process.stdin.flush()
        name, said, seconds = json.loads(self.process.stdout.readline())
        assert name == spec
        assert "\n" not in said
        return said, seconds


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_names_of_every_library(tmp_path: Path) -> None:
    for library in ("transformers", "timm", "open_clip"):
        pytest.importorskip(library)
    from megatron_lcl.evaluate.encoders.load import load_encoder

    model, served = random_model(), tmp_path / "served" / "site"
    export_model(model, "hf", served / "hf")
    export_model(model, "timm", served / "timm")
    shutil.copytree(served / "hf", served / "plain", ignore=shutil.ignore_patterns("lcl"))
    pooled, plain = (load_encoder(f"hf:{served / name}").fingerprint for name in ("hf", "plain"))
    assert pooled != plain
    ours = load_encoder(f"timm:local-dir:{served / 'timm'}").fingerprint
    # of nobody else, also when the hub has ended
    with hold_port() as held, contextlib.ExitStack() as stack:
        port = held.getsockname()[1]
        address = stack.enter_context(hub(tmp_path / "served", pause=4.0, port=port))  # longer than the limit
        load = Loader(address, tmp_path / "cache")
        try:
            of_hf, seconds = load("hf:site/hf")
            assert of_hf == pooled, "our attention pool lies on the hub, too"
            assert seconds > 8  # two files at least
            assert load("hf:site/plain")[0] == plain
            assert load("timm:hf-hub:site/timm")[0] == ours
            for spec, words in (
                ("hf:mute/x", "give the folder of a model: hf:DIR"),
                ("hf:broken/x", "HTTP status 503"),
                ("timm:hf-hub:mute/x", "give timm:local-dir:DIR"),
                ("open_clip:hf-hub:mute/x", "give open_clip:local-dir:DIR"),
            ):
                said, seconds = load(spec)
                assert words in said
                assert "not all in the cache" in said
                assert seconds < 30, (spec, seconds)  # the libraries try for a minute and more
            stack.close()
            # nobody there: what was fetched before is enough, and a known name says what else there is
            assert load("hf:site/hf")[0] == of_hf
            assert load("hf:site/plain")[0] == plain
            # as of a cache that transformers filled, of which nobody knows whether there was a pool
            cached = tmp_path / "cache" / "hub" / "models--site--hf" / "snapshots" / ("0" * 40)
            (cached / POOL).unlink()
            said, _ = load("hf:site/hf")
            assert "not all in the cache" in said
            assert "give the folder of a model: hf:DIR" in said
            assert load("timm:hf-hub:site/timm")[0] == ours
            for spec, words in (
                ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224?pretrained=no"),
                ("open_clip:ViT-B-32@openai", "open_clip:ViT-B-32@none"),
                ("open_clip:roberta-ViT-B-32@none", "open_clip:local-dir:DIR"),  # a config on the hub
            ):
                said, seconds = load(spec)
                assert f"{spec}: {address} cannot be reached" in said
                assert words in said
                assert seconds < 30, (spec, seconds)
        finally:
            load.process.kill()
            load.process.communicate()
