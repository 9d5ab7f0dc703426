"""`report --watch`: a real process, a run that grows, a browser that follows it; and what is not served."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report.browser import Browser
from report.conftest import STEPS, line, write_lines

from megatron_lcl.cli import main
from megatron_lcl.report.serve import Watch, _Server, page_of


class Client:
    """Asks one server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, body


@pytest.fixture
def served(run: Path) -> Iterator[Client]:
    """A server in this process, on a copy of the run."""
    server = _Server(0, Watch(page_of([run]), every=0.1))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Client(server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join()


def grow(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(step)) + "\n")


def test_what_has_changed_is_told_and_nothing_else(served: Client, run: Path) -> None:
    status, headers, page = served.get("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "connect-src 'self'" in headers["content-security-policy"]
    status, headers, text = served.get("/parts")
    assert status == 200
    tag, before = headers["etag"], json.loads(text)
    assert f"const shown = {text};" in page, "the page knows what it shows"
    assert served.get("/parts", If_None_Match=tag)[0::2] == (304, "")
    grow(run, STEPS + 1)
    status, headers, text = served.get("/parts", If_None_Match=tag)
    after = json.loads(text)
    assert (status, headers["etag"] != tag) == (200, True)
    assert {name for name in after if after[name] != before[name]} == {"status", "curves"}
    status, _, part = served.get("/part/status")
    assert status == 200
    assert f"<b>{STEPS + 1}</b>of {STEPS} steps" in part
    with (run / "audit.jsonl").open("a") as file:
        file.write(json.dumps({"event": "stopped", "step": 7, "signal": 15, "saved": 7}) + "\n")
    assert "signal 15" not in served.get("/part/events")[2]
    assert json.loads(served.get("/parts")[2])["events"] != after["events"]
    assert "signal 15" in served.get("/part/events")[2]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{damaged}\n")
    assert served.get("/parts")[0] == 200, "what was shown stays"


def test_a_run_that_goes_on_has_its_new_settings_beside_the_others(tmp_path: Path) -> None:
    a, b = (write_lines(tmp_path / f"s/{n}", [line(1), line(2)], n) for n in range(2))
    watch = Watch(page_of([a, b]))
    assert "lr 1 " in watch.page()
    config = (a / "config.yaml").read_text()
    (a / "config.yaml").write_text(config.replace("lr: 1.0\n", "lr: 7.0\n", 1))
    grow(a, 3)
    page = watch.page()
    assert "lr 7 " in page
    assert "lr 1 " not in page


def test_nothing_but_the_page_is_served_and_to_this_machine_alone(served: Client, run: Path) -> None:
    for path in ("/config.yaml", "/../config.yaml", "/part/", "/part/..%2fconfig.yaml", f"{run}/config.yaml", "/x"):
        status, _, body = served.get(path)
        assert (status, body) == (404, "there is no such page\n"), path
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert served.get("/", method)[0] == 501
    status, headers, body = served.get("/", "HEAD")
    assert (status, body) == (200, "")
    assert int(headers["content-length"]) > 10_000
    for host in (
        "evil.example",
        f"evil.example:{served.port}",
        "127.0.0.1",
        f"127.0.0.1:{served.port + 1}",
        "",
        "[::1]",
    ):
        status, _, body = served.get("/parts", Host=host)
        assert (status, "status" in body) == (403, False), host
    assert served.get("/parts", Host=f"localhost:{served.port}")[0] == 200
    with socket.create_connection(("127.0.0.1", served.port), 60) as raw:  # two names, of which one is right
        raw.sendall(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nHost: evil\r\nConnection: close\r\n\r\n".encode()
        )
        assert b" 403 " in raw.recv(100)


def test_the_command_refuses_what_does_not_go_together(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, said in (
            (["--watch", "--output", "x.html"], "leave out --output"),
            (["--port", "5"], "--port goes with --watch"),
            (["--watch", "--port", port], f"--port {port} on 127.0.0.1: Address already in use"),
            (["--watch", "--port", "99999"], "--port 99999 on 127.0.0.1"),
        ):
            assert main(["report", str(run), *words]) == 2
            assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_browser_follows_a_real_process_until_ctrl_c(run: Path, browser: Browser) -> None:
    command = [sys.executable, "-m", "megatron_lcl", "report", str(run), "--watch"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            browser.open(url)
            steps = "document.querySelector('#status .tile b').textContent"
            curve = "document.querySelector('.plot path.line').getAttribute('d').match(/[ML]/g).length"
            assert browser.evaluate(steps) == str(STEPS)
            points = browser.evaluate(curve)
            browser.evaluate("window.same = document.querySelector('#settings table'); undefined")
            browser.evaluate("document.querySelector('#curves details').open = true")
            for step in range(STEPS + 1, STEPS + 4):
                grow(run, step)
            browser.wait_for(f"{steps} === '{STEPS + 3}'")
            browser.wait_for(f"{curve} === {points + 3}")
            assert browser.evaluate("window.same.isConnected"), "what has not changed stays as it is"
            assert browser.evaluate("document.querySelector('#curves details').open"), "and what was opened, open"
            assert browser.complaints() == []
            assert {request.removeprefix(url) for request in browser.requests()} <= {
                "parts", "part/status", "part/curves", "favicon.ico"
            }  # fmt: skip
            process.send_signal(signal.SIGINT)
            assert process.wait(240) == 0
            browser.wait_for("document.getElementById('live').textContent.includes('has ended')")
            assert process.stdout.read() == "ended\n"
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()
