"""Names whose weights are on a hub that refuses, is silent or breaks fail at once; slow downloads do not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from convert.conftest import random_model

from megatron_lcl.convert.export import export_model
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.hub import Remote, by_cache_alone, out_of_reach


@contextlib.contextmanager
def hub(folder: Path, pause: float = 0.0) -> Iterator[str]:
    """A hub on this machine: serves `folder/OWNER/NAME/…`, with a pause before the bytes of a file. Repositories of
    `mute/` never get an answer, those of `broken/` get status 503."""
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
            if self.command == "GET":
                time.sleep(pause)
                self.wfile.write(body)

        do_GET = do_HEAD

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_why_a_host_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    closed = closed_port()
    with hub(tmp_path) as address:
        for plain in (None, tmp_path / "x.npz"):  # of the hub, and of any other server
            for url, said in (
                (f"{address}/a/b/resolve/main/none", None),  # an answer
                (f"{address}/broken/b/resolve/main/c", "HTTP status 503"),
                (f"{address}/mute/b/resolve/main/c", "has not answered for 1 s (HF_HUB_ETAG_TIMEOUT="),
                (f"http://127.0.0.1:{closed}/a/b/resolve/main/c", f"http://127.0.0.1:{closed} cannot be reached ("),
            ):
                started = time.monotonic()
                fault = out_of_reach(Remote(url, "give a path", plain))
                assert time.monotonic() - started < 5
                assert fault is None if said is None else said in str(fault), (url, fault)


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
for spec in sys.argv[1:]:
    started = time.monotonic()
    try:
        said = load_encoder(spec).fingerprint
    except ValueError as error:
        said = str(error)
    print(json.dumps([spec, said, time.monotonic() - started]), flush=True)
"""


def load_all(address: str, cache: Path, *specs: str, **variables: str) -> list[tuple[str, str, float]]:
    """What a process whose hub is at `address` says of each model, and the seconds it took."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *specs],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_names_of_every_library(tmp_path: Path) -> None:
    for library in ("transformers", "timm", "open_clip"):
        pytest.importorskip(library)
    model = random_model()
    served = tmp_path / "served" / "site"
    export_model(model, "hf", served / "hf")
    export_model(model, "timm", served / "timm")
    from megatron_lcl.evaluate.encoders.load import load_encoder

    limit = {"HF_HUB_ETAG_TIMEOUT": "1"}
    loads = {"hf:site/hf": f"hf:{served / 'hf'}", "timm:hf-hub:site/timm": f"timm:local-dir:{served / 'timm'}"}
    names = [
        ("hf:mute/x", "give the folder of a model: hf:DIR"),
        ("hf:broken/x", "HTTP status 503"),
        ("timm:hf-hub:mute/x", "give timm:local-dir:DIR"),
        ("open_clip:hf-hub:mute/x", "give open_clip:local-dir:DIR"),
    ]
    with hub(tmp_path / "served", pause=1.5) as address:  # longer than the limit, at every file
        told = load_all(address, tmp_path / "cache", *loads, *(name for name, _ in names), **limit)
    fingerprints = {spec: said for spec, said, _ in told}
    assert len(fingerprints["timm:hf-hub:site/timm"]) == 32
    assert fingerprints["timm:hf-hub:site/timm"] == load_encoder(loads["timm:hf-hub:site/timm"]).fingerprint
    assert len(fingerprints["hf:site/hf"]) == 32
    for (name, words), (spec, said, seconds) in zip(names, told[2:], strict=True):
        assert spec == name
        assert words in said
        assert "not all in the cache" in said
        assert "\n" not in said
        assert seconds < 6, (spec, seconds)  # of which 1 is waited

    # nobody there: what was fetched before is enough, and a known name says what else there is
    others = ("timm:vit_tiny_patch16_224", "open_clip:ViT-B-32@openai", "open_clip:roberta-ViT-B-32@none")
    again = load_all(f"http://127.0.0.1:{closed_port()}", tmp_path / "cache", *loads, *others)
    for spec, said, seconds in again:
        assert seconds < 6, (spec, seconds)
        if spec in loads:
            assert said == fingerprints[spec]
        else:
            assert "cannot be reached" in said
            assert {"t": "?pretrained=no", "o": "@none" if "openai" in spec else "@FILE"}[spec[0]] in said
