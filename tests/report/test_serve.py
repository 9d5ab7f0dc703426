"""`report --watch`: a real process, a run that grows, a browser that follows it; and what is not served."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report.browser import Browser
from report.conftest import STEPS, line, write_lines

from megatron_lcl.cli import main
from megatron_lcl.report.page import RunPage
from megatron_lcl.report.serve import LIMIT, PATIENCE, Watch, _Handler, _Server


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


class Server(_Server):
    """Whose connections end with it, as where its process has ended."""

    def __init__(self, port: int, watch: Watch) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(port, watch)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):  # has hung up
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving(*paths: Path, port: int = 0, every: float = 0.1, limit: float = LIMIT) -> Iterator[tuple[Client, Watch]]:
    """A server in this process, whose page looks ten times a second."""
    watch = Watch(paths, every, limit)
    server = Server(port, watch)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Client(server.server_address[1]), watch
    finally:
        server.shutdown()
        server.server_close()
        server.hang_up()
        thread.join()


@pytest.fixture
def served(run: Path) -> Iterator[Client]:
    """A server on a copy of the run, which looks at it at each request."""
    with serving(run, every=0) as (client, _):
        yield client


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
    known = json.loads(re.findall(r"const known = (.*);", page)[0])
    assert before.pop("error") == ""
    assert known == before | {"every": 0, "limit": 30_000}
    assert served.get("/parts", If_None_Match=tag)[0::2] == (304, "")
    grow(run, STEPS + 1)
    status, headers, text = served.get("/parts", If_None_Match=tag)
    after = json.loads(text)
    assert (status, headers["etag"] != tag, after["page"]) == (200, True, before["page"])
    before, after = before["parts"], after["parts"]
    assert {name for name in after if after[name] != before[name]} == {"status", "curves"}
    status, _, part = served.get("/part/status")
    assert status == 200
    assert f"<b>{STEPS + 1}</b>of {STEPS} steps" in part
    with (run / "audit.jsonl").open("a") as file:
        file.write(json.dumps({"event": "stopped", "step": 7, "signal": 15, "saved": 7}) + "\n")
    assert "signal 15" not in served.get("/part/events")[2]
    assert json.loads(served.get("/parts")[2])["parts"]["events"] != after["events"]
    assert "signal 15" in served.get("/part/events")[2]


@pytest.mark.parametrize("fault", ["a damaged file", "a folder moved away"])
def test_an_error_that_lasts_is_told_beside_what_was_shown(run: Path, fault: str) -> None:
    def spoil() -> str:
        if fault == "a folder moved away":
            run.rename(run.with_name("moved"))
            return f"{run} is neither a run folder"
        (run / "labeled.json").write_text("{damaged}")
        return "labeled.json is damaged"

    every = 1.0
    with serving(run, every=every) as (served, _):
        before = json.loads(served.get("/parts")[2])
        said = spoil()
        time.sleep(every)
        assert json.loads(served.get("/parts")[2]) == before, "at first a file may be in the making"
        time.sleep(PATIENCE * every)
        after = json.loads(served.get("/parts")[2])
        assert said in after.pop("error")
        assert after == {"page": before["page"], "parts": before["parts"]}


def test_what_was_read_before_an_error_is_shown_after_it(tmp_path: Path) -> None:
    a, b = (write_lines(tmp_path / f"s/{n}", [line(1), line(2)], n) for n in range(2))
    watch = Watch([tmp_path / "s"], every=0)
    grow(a, 77)
    config = (b / "config.yaml").read_text()
    (b / "config.yaml").write_text("{damaged")
    assert "77" not in page_section(watch.page(), "runs")
    (b / "config.yaml").write_text(config)
    assert "77" in page_section(watch.page(), "runs")


def test_damaged_lines_are_told_at_each_look_and_those_after_them_are_read(tmp_path: Path) -> None:
    a = write_lines(tmp_path / "s/a", [line(1), line(2)])
    watch = Watch([tmp_path / "s"], every=0)
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo\n')
    said = f"{a / 'metrics.jsonl'}: 1 damaged line passed over (the first is line 3)"
    for _ in range(2):
        assert said in watch.page()
    without_script = ">This page does not follow the {}: it needs JavaScript.</p>"
    assert without_script.format("run") in watch.page()
    write_lines(tmp_path / "s/b", [line(1), line(2)], 1)
    page = watch.page()
    assert "2 runs of" in page, "a second run, with which all is read anew"
    assert without_script.format("runs") in page
    with (a / "metrics.jsonl").open("a") as file:
        file.write("[4]\n")
    grow(a, 77)
    for _ in range(2):
        assert said.replace("1 damaged line ", "2 damaged lines ") in watch.page()
        assert "77" in page_section(watch.page(), "runs")


class Held:
    """A method that waits, once it is told to, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.go, self.calls = threading.Event(), 0
        self.go.set()
        method = getattr(owner, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            assert self.go.wait(240)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, held)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        self.go.clear()
        try:
            yield
        finally:
            self.go.set()


def test_a_page_that_is_long_in_the_making_is_made_once_and_meanwhile_the_last_is_served(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renders = Held(monkeypatch, RunPage, "render")
    with serving(run, limit=0.3) as (served, _):
        first = json.loads(served.get("/parts")[2])
        with renders.holding():
            for step in range(3):  # which a look each would show
                time.sleep(0.1)
                grow(run, STEPS + step)
                assert json.loads(served.get("/parts")[2])["parts"] == first["parts"]
                assert f"<b>{STEPS}</b>of {STEPS} steps" in served.get("/")[2]
                assert f"<b>{STEPS}</b>of {STEPS} steps" in served.get("/part/status")[2]
            assert renders.calls == 2, "the first, and one for all who asked since"
        eventually(lambda: f"<b>{STEPS + 2}</b>of" in served.get("/")[2])


def test_a_look_that_does_not_end_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Held(monkeypatch, RunPage, "changed")
    with serving(run, limit=0.3) as (served, watch):
        watch._took = 0.1  # which makes half a second no longer than usual, however busy this machine was
        with looks.holding():
            time.sleep(0.1)
            eventually(lambda: "takes longer than 0.3 s" in json.loads(served.get("/parts")[2])["error"])
        eventually(lambda: not json.loads(served.get("/parts")[2])["error"])


def test_many_tabs_cause_one_look_in_the_time_between_two(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Held(monkeypatch, RunPage, "changed")
    watch = Watch([run], every=3600)
    for step in range(5):
        grow(run, STEPS + step)
        watch.state()
    assert looks.calls == 1


def eventually(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def page_section(page: str, name: str) -> str:
    return page.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def test_a_page_is_known_by_whose_it_is_and_not_by_how_far_they_are(tmp_path: Path) -> None:
    def known() -> tuple[Any, str, str]:
        state, text = watch.state(), watch.page()
        return state["page"], state["parts"]["head"], text  # type: ignore[index]

    a, sweep = write_lines(tmp_path / "s/a", [line(1), line(2)], 0), tmp_path / "s"
    watch = Watch([sweep], every=0)
    one = known()
    assert "Vision encoder" in one[2]
    (a / "config.yaml").write_text((a / "config.yaml").read_text().replace("lr: 1.0\n", "lr: 7.0\n", 1))
    grow(a, 3)
    assert known()[0] == one[0] == Watch([sweep]).state()["page"]
    assert Watch([a]).state()["page"] != one[0]
    write_lines(tmp_path / "s/b", [line(1), line(2)], 1)
    two = known()
    assert "2 runs of" in two[2], "a run that began beside the first"
    assert two[0] != one[0]
    assert "No two runs differ in the seed alone" in two[2]
    write_lines(tmp_path / "s/c", [line(1), line(2)], 1)
    three = known()
    assert three[0] == two[0]
    assert three[1] != two[1], "the head says how many they are"
    assert "3 runs of" in three[2]
    assert "No two runs differ in the seed alone" not in three[2]


def test_a_folder_whose_name_is_no_utf8_is_served(run: Path) -> None:
    with serving(run.rename(run.with_name("r\udcff"))) as (served, _):
        status, _, page = served.get("/")
        assert (status, "r\\udcff" in page) == (200, True)
        assert json.loads(served.get("/parts")[2])["error"] == ""


def test_a_fault_of_the_program_is_told_here_once_and_there_until_it_is_mended(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    changed, keys = RunPage.changed, iter(("no such key", "no such key", "another"))

    def fails(page: RunPage) -> bool:
        changed(page)  # what has been taken in is not to be lost
        return {}[next(keys)]  # type: ignore[no-any-return,call-overload]

    watch = Watch([run], every=0.001)
    monkeypatch.setattr(RunPage, "changed", fails)
    grow(run, 77)
    grow(run, STEPS + 1)
    for _ in range(3):
        time.sleep(PATIENCE * 0.001)
        state = watch.state()
    assert state["error"] == "a fault of the program, KeyError: 'another'"
    said = capfd.readouterr().err
    assert said.count("Traceback") == 2
    assert (said.count("KeyError: 'no such key'"), said.count("KeyError: 'another'")) == (1, 1)
    monkeypatch.setattr(RunPage, "changed", changed)
    time.sleep(0.001)
    assert f"<b>{STEPS + 1}</b>of {STEPS} steps" in watch.page()
    assert watch.state()["error"] == ""


def test_what_a_stalled_reader_had_is_not_followed_by_another_answer(
    served: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, given_up = _Handler._answer, threading.Event()

    def answered(*arguments: Any, **options: Any) -> None:
        try:
            answer(*arguments, **options)
        finally:
            given_up.set()

    monkeypatch.setattr(_Handler, "timeout", 1.0)
    monkeypatch.setattr(_Handler, "_answer", answered)
    monkeypatch.setattr(Watch, "page", lambda watch: "x" * 50_000_000)
    with socket.create_connection(("127.0.0.1", served.port), 60) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode())
        assert given_up.wait(60)
        time.sleep(0.5)  # for an answer that tells of it
        had = b""
        while chunk := raw.recv(1 << 20):
            had += chunk
    assert had.count(b"HTTP/1.1 ") == 1
    assert len(had) < 50_000_000


def test_a_slow_reader_gets_all_of_it(served: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """In more time than a connection may be silent."""
    monkeypatch.setattr(_Handler, "timeout", 3.0)
    monkeypatch.setattr(Watch, "page", lambda watch: "x" * 50_000_000)
    with socket.create_connection(("127.0.0.1", served.port), 60) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode())
        had = 0
        while had < 50_000_000:
            chunk = raw.recv(1 << 20)
            assert chunk, f"ended after {had:,} bytes"
            had += len(chunk)
            time.sleep(len(chunk) / 10_000_000)


def test_a_run_that_goes_on_has_its_new_settings_beside_the_others(tmp_path: Path) -> None:
    a, b = (write_lines(tmp_path / f"s/{n}", [line(1), line(2)], n) for n in range(2))
    watch = Watch([a, b], every=0)
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
