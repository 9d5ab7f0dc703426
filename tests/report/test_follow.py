"""The page in a browser while what is served changes: another run, an end, an error; and the reader keeps his place."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import hold_port
from report.browser import Browser
from report.conftest import STEPS, line, write_lines
from report.test_browser import point_at
from report.test_serve import Held, grow, serving

from megatron_lcl.report.page import RunPage
from megatron_lcl.report.serve import Watch, _Handler

pytestmark = pytest.mark.slow
LIVE = "(document.getElementById('live')?.textContent ?? '')"
HEAD = "(document.querySelector('h1')?.textContent ?? '')"
STEP = "document.querySelector('#status .tile b')?.textContent"


@pytest.fixture(autouse=True)
def leave(browser: Browser) -> Iterator[None]:
    """The next test's tab asks no server of this one's."""
    yield
    browser.call("Page.navigate", url="about:blank")


@pytest.fixture
def port() -> Iterator[int]:
    """Nobody else's, also while nobody listens."""
    with hold_port() as held:
        yield held.getsockname()[1]


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}/"


def test_a_sweep_is_followed_from_its_first_run_to_the_third(tmp_path: Path, browser: Browser) -> None:
    """The page of one run becomes that of two by a reload, and that of three without one."""
    write_lines(tmp_path / "s/a", map(line, range(1, 4)))
    with serving(tmp_path / "s") as (served, _):
        browser.open(url(served.port))
        assert "A vision encoder" in browser.evaluate(HEAD)
        write_lines(tmp_path / "s/b", map(line, range(1, 4)), 1)
        browser.wait_for(f"document.readyState === 'complete' && {HEAD}.startsWith('2 runs of')")
        assert "No two runs differ" in browser.evaluate("document.getElementById('head').textContent")
        browser.evaluate("window.same = document.querySelector('#differences .wide'); undefined")
        write_lines(tmp_path / "s/c", map(line, range(1, 4)), 1)
        browser.wait_for(f"{HEAD}.startsWith('3 runs of')")
        assert "with the same settings are one line" in browser.evaluate("document.getElementById('head').textContent")
        assert browser.evaluate("window.same.isConnected"), "no reload"
        assert browser.evaluate(LIVE) == "This page follows the runs."
        assert browser.complaints() == []


def test_links_to_sections_come_with_them(run: Path, browser: Browser) -> None:
    """So does the newest checkpoint at the head."""
    (run / "labeled.json").rename(run / "later")
    with serving(run) as (served, _):
        browser.open(url(served.port))
        links = "Array.from(document.querySelectorAll('nav a'), (e) => e.textContent)"
        assert "Labeled images" not in browser.evaluate(links)
        browser.evaluate("window.same = document.querySelector('nav a[href=\"#curves\"]'); window.same.focus()")
        (run / "later").rename(run / "labeled.json")
        browser.wait_for(f"{links}.includes('Labeled images')")
        assert browser.evaluate("document.activeElement === window.same"), "a link keeps the focus"


def test_a_tab_goes_over_to_the_run_that_is_served_at_its_address(tmp_path: Path, browser: Browser, port: int) -> None:
    a, b = (write_lines(tmp_path / name, map(line, range(1, steps)), n) for n, (name, steps) in
            enumerate((("a", 4), ("b", 9))))  # fmt: skip
    with serving(a, port=port):
        browser.open(url(port))
        browser.evaluate("window.same = true; document.querySelector('#settings').scrollIntoView()")
    browser.wait_for(f"{LIVE}.endsWith('no connection: the command has ended, or the tunnel to it')")
    box = browser.evaluate(
        "(({top, bottom}) => [top, bottom])(document.getElementById('live').getBoundingClientRect())"
    )
    assert 0 <= box[0] < box[1] < 900, "seen wherever the reader is"
    assert browser.evaluate("scrollY") > 100
    assert browser.evaluate("document.getElementById('live').getAttribute('role')") == "status"
    with serving(a, port=port):
        browser.wait_for(f"{LIVE} === 'This page follows the run.'")
        assert browser.evaluate("window.same"), "the same run: as it was"
        assert browser.evaluate("document.getElementById('live').getBoundingClientRect().bottom") < 0
    with serving(b, port=port):
        browser.wait_for(f"document.readyState === 'complete' && {STEP} === '8'")
        assert str(b) in browser.evaluate("document.querySelector('h1 + p').textContent")
        assert str(a) not in browser.evaluate("document.body.textContent")


def test_the_page_says_why_it_does_not_follow(run: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(page: RunPage) -> Any:
        raise RuntimeError("of the program")

    looks, states = Held(monkeypatch, RunPage, "changed"), Held(monkeypatch, Watch, "state")
    with serving(run, limit=1.5) as (served, watch):
        watch._took = 0.1
        browser.open(url(served.port))
        run.rename(run.with_name("moved"))
        browser.wait_for(f"{LIVE}.includes('up to date: {run} is neither a run folder')")
        run.with_name("moved").rename(run)
        browser.wait_for(f"{LIVE} === 'This page follows the run.'")
        with looks.holding():  # as where a file system does not answer
            browser.wait_for(f"{LIVE}.includes('takes longer than')")
        browser.wait_for(f"{LIVE} === 'This page follows the run.'")
        with states.holding():
            browser.wait_for(f"{LIVE}.endsWith('no answer for 1.5 s')")
        browser.wait_for(f"{LIVE} === 'This page follows the run.'")
        with monkeypatch.context() as patch:
            patch.setattr(RunPage, "changed", fail)
            browser.wait_for(f"{LIVE}.endsWith('a fault of the program, RuntimeError: of the program')")
        browser.wait_for(f"{LIVE} === 'This page follows the run.'")
        with monkeypatch.context() as patch:
            patch.setattr(Watch, "part", lambda *_: None)
            grow(run, STEPS + 1)
            browser.wait_for(f"{LIVE}.includes('is 404 there is no such page')")
        browser.wait_for(f"{LIVE} === 'This page follows the run.'")


def test_an_answer_that_is_long_in_coming_is_waited_for(
    run: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as long as the page waits where nothing comes."""
    answer = _Handler._answer

    def slowly(handler: _Handler, status: int, text: str, kind: str = "text/plain", tag: str = "") -> None:
        if not handler.path.startswith("/part/"):
            return answer(handler, status, text, kind, tag)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body := text.encode())))
        handler.end_headers()
        for piece in range(12):
            time.sleep(0.2)
            handler.wfile.write(body[piece * len(body) // 12 : (piece + 1) * len(body) // 12])

    with serving(run, limit=1.2) as (served, _):
        browser.open(url(served.port))
        monkeypatch.setattr(_Handler, "_answer", slowly)
        with (run / "audit.jsonl").open("a") as file:
            file.write(json.dumps({"event": "stopped", "step": 7, "signal": 15, "saved": 7}) + "\n")
        browser.wait_for("document.querySelector('#events').textContent.includes('signal 15')")


def test_a_part_that_was_not_had_is_asked_for_again(
    run: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, asked = Watch.part, []

    def not_at_first(watch: Watch, name: str) -> str | None:
        asked.append(name)
        return part(watch, name) if asked.count(name) > 2 else None

    monkeypatch.setattr(Watch, "part", not_at_first)
    with serving(run) as (served, _):
        browser.open(url(served.port))
        grow(run, STEPS + 1)
        browser.wait_for(f"{STEP} === '{STEPS + 1}'")
        browser.wait_for(f"{LIVE} === 'This page follows the run.'")
        assert asked.count("curves") >= 3


def test_the_reader_stays_where_he_is_at_each_update(run: Path, browser: Browser) -> None:
    """What is scrolled, focused, open; the numbers under the pointer are those of the chart as it is now."""
    with serving(run) as (served, _):
        browser.open(url(served.port), width=600)
        browser.evaluate("""{
          const summary = document.querySelector("#curves summary");
          summary.parentElement.open = true;
          summary.focus();
          const style = document.head.appendChild(document.createElement("style"));
          style.textContent = "#events table { width: 3000px }";
          document.querySelector("#events .wide").scrollLeft = 300;
          window.focused = summary;
        }""")
        opened = "Array.from(document.querySelectorAll('#curves details[open] summary'), (e) => e.textContent)"
        before = browser.evaluate(opened)
        assert before == ["What the steps read"]
        point_at(browser, ".plot svg.chart")
        read = "document.querySelector('.plot .now').textContent"
        assert browser.evaluate(read).startswith("step 100: 6.5")
        with (run / "metrics.jsonl").open("a") as file:
            for one in [
                *map(line, range(STEPS + 1, 2 * STEPS + 1)),
                {"step": 2 * STEPS, "health": {"says": "one more"}},
            ]:
                file.write(json.dumps(one) + "\n")
        browser.wait_for("document.querySelector('#events').textContent.includes('one more')")
        browser.wait_for(f"document.querySelector('.plot .tick:last-of-type').textContent === '{2 * STEPS}'")
        assert browser.evaluate("document.activeElement === window.focused")
        assert browser.evaluate("document.querySelector('#events .wide').scrollLeft") == 300
        assert browser.evaluate(opened) == before
        assert browser.evaluate(read).startswith("step 200: 4"), "as many pixels from the left"
        assert browser.evaluate("document.querySelectorAll('.pointer').length") == 1
        browser.evaluate("document.querySelector('.plot svg.chart').focus()")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="End")
        assert browser.evaluate(read).startswith(f"step {2 * STEPS}: ")
        grow(run, 3 * STEPS)
        browser.wait_for(f"{read}.startsWith('step {3 * STEPS}: ')")
        assert browser.complaints() == []


def test_a_group_of_charts_that_comes_before_others_opens_and_closes_none(tmp_path: Path, browser: Browser) -> None:
    run = write_lines(tmp_path / "run", [{"step": n, "loss": 1.0 / n, "num_pairs": n} for n in (1, 2, 3)])
    summaries = "Array.from(document.querySelectorAll('#curves summary'), (e) => [e.textContent, e.parentElement.open])"
    with serving(run) as (served, _):
        browser.open(url(served.port))
        browser.evaluate("document.querySelector('#curves details').open = true")
        assert browser.evaluate(summaries) == [["What the steps read", True]]
        with (run / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(line(n) | {"checkpoint_bytes": n}) + "\n" for n in (4, 5, 6)))
        browser.wait_for(f"{summaries}.length > 1")
        assert browser.evaluate(summaries) == [["Checkpoints", False], ["What the steps read", True]]


def test_what_the_reader_has_closed_stays_closed(run: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    render = RunPage.render
    monkeypatch.setattr(RunPage, "render", lambda *a, **k: render(*a, **k).replace("<details>", "<details open>"))
    is_open = "document.querySelector('#curves details').open"
    with serving(run) as (served, _):
        browser.open(url(served.port))
        assert browser.evaluate(is_open)
        browser.evaluate(f"{is_open} = false")
        grow(run, STEPS + 1)
        browser.wait_for(f"document.querySelector('#curves').textContent.includes('{STEPS + 1} steps')")
        assert not browser.evaluate(is_open)


def test_selected_text_stays_until_it_is_let_go(run: Path, browser: Browser) -> None:
    with serving(run) as (served, _):
        browser.open(url(served.port))
        browser.evaluate("getSelection().selectAllChildren(document.querySelector('#status .tile'))")
        selected = browser.evaluate("String(getSelection())")
        grow(run, STEPS + 1)
        browser.wait_for(f"document.querySelector('#curves').textContent.includes('{STEPS + 1} steps')")
        browser.wait_for(f"{LIVE} === 'This page follows the run, except where text is selected.'")
        time.sleep(0.3)
        assert browser.evaluate("String(getSelection())") == selected
        assert browser.evaluate(STEP) == str(STEPS)
        browser.evaluate("getSelection().removeAllRanges()")
        browser.wait_for(f"{STEP} === '{STEPS + 1}'")
        browser.wait_for(f"{LIVE} === 'This page follows the run.'")
