"""Pages in headless Chromium, by their pixels: narrow, dark, printed; curves drawn; nothing loaded or complained of."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.browser import Browser
from report.conftest import make_run, write_lines

from megatron_lcl.report.page import write_report
from megatron_lcl.report.runs import FINAL, write_runs_report

pytestmark = pytest.mark.slow
LIGHT, DARK = (0x2A, 0x6F, 0x97), (0x5F, 0xB3, 0xE0)
"""of the first curve, --c0 of style.html"""


@pytest.fixture(scope="module")
def pages(whole_run: Path, once: Callable[[str, Callable[[Path], Any]], Any]) -> dict[str, Path]:
    """The page of one run, of two, and of four with results."""

    def make(folder: Path) -> dict[str, Path]:
        runs = [make_run(folder / name, **{"optimizer.lr": rate}) for name, rate in (("a", "0.1"), ("b", "0.2"))]
        text = (runs[1] / "metrics.jsonl").read_text()
        (runs[1] / "metrics.jsonl").write_text(
            re.sub(r'("[a-z/_]+": )(\d+\.)', r"\g<1>1\g<2>", text)
        )  # not the same curves
        one = write_report(whole_run, folder / "one.html")
        for n in range(4):  # results that differ, of two seeds each
            names = {name for name in FINAL if "labeled" not in name and name != "regression"}
            lines = [{"step": step, **dict.fromkeys(names, 0.23456 * step + n)} for step in (1, 2)]
            lines[1] |= {"heldout/chance_at_1": 0.07692, "heldout/chance_at_10": 0.7692}
            own = {
                "optimizer.lr": f"0.00{1 + n // 2}",
                "train.seed": str(n % 2),
                "objective.name": ("lcl", "emu")[n // 2],
            }
            write_lines(folder / f"results/{n}", lines, **own)
        results = write_runs_report([folder / "results"], folder / "results.html")
        return {"one": one, "several": write_runs_report(runs, folder / "several.html"), "results": results}

    return once("report-pages", make)


def count(pixels: np.ndarray, color: tuple[int, int, int], within: int = 6) -> int:
    """Pixels of a color, or nearly: edges are smoothed."""
    return int((np.abs(pixels.astype(int) - color).max(-1) <= within).sum())


@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_phone_shows_all_without_scrolling_sideways(pages: dict[str, Path], kind: str, browser: Browser) -> None:
    browser.open(pages[kind].as_uri(), width=360, height=740)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    wide = """Array.from(document.querySelectorAll("main *")).filter((e) => !e.closest(".wide, pre, svg")
      && e.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML.slice(0, 90))"""
    assert browser.evaluate(wide) == []
    charts = (
        """Array.from(document.querySelectorAll("svg.chart:not(.swatch)"), (e) => e.getBoundingClientRect().width)"""
    )
    widths = [width for width in browser.evaluate(charts) if width]
    assert len(widths) > 10
    assert min(widths) > 290, "a chart fills the width"
    assert browser.complaints() == []
    assert browser.requests() == []


@pytest.mark.parametrize("kind", ["one", "several"])
def test_light_and_dark_by_the_readers_choice(pages: dict[str, Path], kind: str, browser: Browser) -> None:
    for dark, own, other in ((False, LIGHT, DARK), (True, DARK, LIGHT)):
        browser.open(pages[kind].as_uri(), dark=dark)
        pixels = browser.pixels()
        light = pixels.mean(-1)
        for place in (np.median(light), light[3, 3]):  # the sections, and what lies behind them
            assert place < 40 if dark else place > 240
        assert (light > 250).mean() < (0.01 if dark else 1), "no white part in the dark"
        assert count(pixels, own) > 2000, "curves are drawn"
        assert count(pixels, own) > 20 * count(pixels, other)
        first = browser.evaluate("(({x, y, width, height}) => [x, y, width, height].map(Math.round))"
                                 "(document.querySelector('.plot svg.chart').getBoundingClientRect())")  # fmt: skip
        x, y, width, height = first
        columns = (np.abs(pixels[y : y + height, x : x + width].astype(int) - own).max(-1) < 40).any(0)
        assert columns[int(0.15 * width) : int(0.95 * width)].mean() > 0.8, "from the first step to the last"


def test_the_pointer_reads_the_curve(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["one"].as_uri())
    point_at(browser, ".plot svg.chart")
    said = browser.evaluate("document.querySelector('.plot .now').textContent")
    step, value = re.fullmatch(r"step (\d+): ([\d.]+)", said).groups()  # type: ignore[union-attr]
    assert abs(int(step) - 100) <= 1
    assert float(value) == pytest.approx(9.0 - int(step) / 40, abs=0.03)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    assert browser.evaluate("document.querySelector('.plot .now').textContent") == "4"
    steps = [int(said.split(",")[0].split(":")[0].split()[1]) for said in press(browser, 1, ["ArrowRight"] * 201)]
    assert steps == [*range(1, 201), 200], "every point by the keyboard, from the first one"
    ends = press(browser, 2, ["ArrowLeft", "Home", "PageUp", "ArrowRight", "PageDown", "PageDown", "End"])
    assert [re.split("[,:]", said)[0] for said in ends] == [f"step {n}" for n in (200, 1, 5, 6, 2, 1, 200)]
    assert browser.complaints() == []


def press(browser: Browser, chart: int, keys: list[str]) -> list[str]:
    """What is told to a screen reader after each key."""
    told = """((chart, keys) => { chart.focus(); return keys.map((key) => {
      chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      return document.querySelector(".spoken").textContent; }); })"""
    said: list[str] = browser.evaluate(f"{told}(document.querySelectorAll('.plot svg[data-range]')[{chart}], {keys})")
    return said


def test_on_a_host_that_forbids_styles_and_in_a_frame_without_an_address(
    pages: dict[str, Path], browser: Browser
) -> None:
    browser.open(pages["one"].as_uri())
    link = """new Promise((done) => {
      const frame = document.createElement("iframe");
      frame.onload = () => {
        frame.contentDocument.querySelector("a[href='#settings']").click();
        done([frame.contentWindow.location.href, frame.contentWindow.scrollY > 500]);
      };
      frame.srcdoc = document.documentElement.outerHTML;
      document.body.append(frame); })"""
    assert browser.evaluate(link) == ["about:srcdoc", True], "it goes to the section, not to the host's page"
    drawn = """(() => { for (const one of document.querySelectorAll("style")) one.remove();
      return [".chart .line", ".swatch .line", ".chart .axis", ".chart text"].map((name) => {
        const { fill, stroke } = getComputedStyle(document.querySelector(name)); return [fill, stroke]; }); })()"""
    black = "rgb(0, 0, 0)"
    assert browser.evaluate(drawn) == [["none", black]] * 3 + [[black, "none"]]


def point_at(browser: Browser, selector: str, part: float = 0.5) -> None:
    """Move the mouse over a chart (part: of the way from its first step to its last), or a swatch's middle."""
    place = f"""(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{ block: "center" }});
      const r = e.getBoundingClientRect(), at = e.matches(".swatch") ? 0.5 : (44 + {part} * 306) / 360;
      return [r.x + r.width * at, r.y + r.height / 2]; }})()"""
    x, y = browser.evaluate(place)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def test_the_pointer_tells_whose_value_is_which_at_the_step(tmp_path: Path, browser: Browser) -> None:
    """Ten curves of other lengths and steps: those that have nothing there are left out. A swatch is no chart."""
    for n in range(10):
        steps = range(1, 31) if n == 0 else range(4, 201, 4) if n == 9 else range(1, 201)
        write_lines(tmp_path / f"s/{n}", [{"step": step, "loss": 10.0 * n + step / 100} for step in steps], n=n)
    browser.open(write_runs_report([tmp_path / "s"]).as_uri())
    said = "document.querySelector('.plot .now').textContent"
    values = "Array.from(document.querySelectorAll('.plot .values li'), (one) => one.textContent)"
    for selector in (".legend svg.swatch", "td svg.swatch", ".plot svg.chart"):
        point_at(browser, selector, 0.75)
    (step,) = re.fullmatch(r"step (\d+)", browser.evaluate(said)).groups()  # type: ignore[union-attr]
    assert abs(int(step) - 150) <= 1
    read = {}
    for text in browser.evaluate(values):
        name, value = text.split(": ")
        read[name] = float(value)
    assert read == {f"lr {n + 1}": pytest.approx(10.0 * n + int(step) / 100, abs=0.3) for n in range(1, 10)}
    lines = "Array.from(document.querySelectorAll('.plot .values path'), (e) => e.getAttribute('stroke-dasharray'))"
    legend = "Array.from(document.querySelectorAll('.legend path'), (e) => e.getAttribute('stroke-dasharray'))"
    assert browser.evaluate(lines) == browser.evaluate(legend)[1:], "as the legend draws them"
    assert len(set(browser.evaluate(legend)[:4])) == 4, "neighbors are dashed in other ways"
    point_at(browser, ".plot svg.chart", 0.1)
    assert len(browser.evaluate(values)) == 10
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    assert browser.evaluate(said) == ""
    assert browser.evaluate(values) == []
    assert browser.complaints() == []


def test_the_chances_of_both_ways_of_retrieval_look_unlike(tmp_path: Path, browser: Browser) -> None:
    """In the chart as in its key, whatever styles the page gives them."""
    ways = ("image_to_context", "context_to_image")
    line = {f"heldout/{way}_recall_at_10": 0.5 for way in ways}
    line |= {"heldout/chance_at_10": 0.2, "heldout/context_to_image_chance_at_10": 0.1}
    browser.open(write_report(write_lines(tmp_path / "run", [{"step": s, **line} for s in (1, 2)])).as_uri())
    drawn = "Array.from(document.querySelectorAll('.plot path.line.quiet'), (e) => getComputedStyle(e).strokeDasharray)"
    first, second, *key = browser.evaluate(drawn)
    assert first != second
    assert key == [first, second]


def test_values_are_as_fine_as_the_axis(tmp_path: Path, browser: Browser) -> None:
    """Of 60 lines within a hundredth, and of a count of many digits, on a touch screen and by the keyboard."""
    for n in range(60):
        lines = [
            {"step": step, "loss": 71.23 + min(n, 58) * 1e-4 + step * 1e-6, "tokens": 12_340_000 + 10 * step}
            for step in range(1, 201)
        ]
        write_lines(tmp_path / f"s/{n}", lines, n=n)
    browser.open(write_runs_report([tmp_path / "s"]).as_uri())
    assert "line 33 is drawn like the first" in browser.evaluate("document.getElementById('curves').textContent")
    read = "Array.from(document.querySelectorAll('.plot .values li'), (one) => one.textContent)"
    place = """(() => { const r = document.querySelector(".plot svg.chart").getBoundingClientRect();
      return [r.x + r.width * (44 + 0.5 * 306) / 360, r.y + r.height * 0.97]; })()"""
    x, y = browser.evaluate(place)
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    values = browser.evaluate(read)
    assert len(values) == 13
    assert values[-1] == "and 48 more"
    assert [text.split(":")[0] for text in values[:-1]] == [f"lr {n + 1}" for n in range(12)], "the nearest"
    for n, text in enumerate(values[:-1]):
        assert float(text.split(": ")[1]) == pytest.approx(71.23 + n * 1e-4 + 1e-4, abs=1e-5)
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert browser.evaluate(read) == values, "still there when the finger is lifted"
    for key in ("Escape", "Home", "ArrowRight"):
        browser.evaluate("document.querySelector('.plot svg.chart').focus()")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert len(browser.evaluate(read)) == (0 if key == "Escape" else 13)
    assert re.match(r"step 3, lr \d+: 71\.23\d+, lr", press(browser, 0, ["ArrowRight"])[0])
    told = [re.findall(r"lr (\d+): ", said) for said in press(browser, 0, ["ArrowUp"] * 59)]
    lines = [[str(n)] for n in range(1, 59)]
    assert [line for line in told if len(line) < 3] == [*lines, ["59", "60"]], "each by the keyboard, two that coincide"
    browser.call("Emulation.setDeviceMetricsOverride", width=320, height=256, deviceScaleFactor=1, mobile=False)
    press(browser, 0, ["Home"])
    *values, more = browser.evaluate(read)
    assert 2 < len(values) < 12
    assert more == f"and {60 - len(values)} more", "at 400 %, those that are cut off are counted"
    assert browser.evaluate("(({ scrollHeight, clientHeight }) => scrollHeight - clientHeight)"
                            "(document.querySelector('.plot .values'))") == 0  # fmt: skip
    assert browser.complaints() == []


@pytest.mark.parametrize("kind", ["one", "several"])
def test_printed_charts_are_whole(pages: dict[str, Path], kind: str, browser: Browser) -> None:
    """On A4, also by a reader whose screen is dark: every curve inside of its page, on one page."""
    browser.open(pages[kind].as_uri(), dark=True)
    shown = browser.evaluate("Array.from(document.querySelectorAll('.plot svg.chart path.k0.line')).filter((e) => "
                             "e.getAttribute('d').split('L').length > 100).length")  # fmt: skip
    folded = "document.querySelectorAll('details:not([open])').length"
    closed = browser.evaluate(folded)
    assert closed > 0
    sheets = pages_of(browser.pdf())
    assert browser.evaluate(folded) == closed, "what is folded is printed, and folded again"
    curves = [path for sheet in sheets for path in sheet if path.color == tuple(round(c / 255, 3) for c in LIGHT)]
    lines = [path for path in curves if len(path.points) > 100]
    assert len(lines) == shown > 8, "the light colors, each line whole on one page"
    for path in curves:
        x, y = np.array(path.points).T
        assert 0 < x.min() <= x.max() < 595
        assert 0 < y.min() <= y.max() < 842
    browser.call("Emulation.setEmulatedMedia", media="print")
    shows = "document.querySelector('details:not([open]) .plots').checkVisibility()"
    assert browser.evaluate(shows), "without the script, too"
    ends = """Array.from(document.querySelectorAll(".plot .line"), (line, n) => {
      if (!n) line.setAttribute("d", "M50 50h0");
      const { strokeLinecap, strokeLinejoin } = getComputedStyle(line);
      return `${strokeLinecap} ${strokeLinejoin}`; })"""
    alone, *others = browser.evaluate(ends)
    assert (alone, set(others)) == ("round round", {"butt bevel"}), "each dash of a round one is curves, of megabytes"


@pytest.mark.parametrize("width", [1024, 1920])
def test_numbers_are_on_one_line(pages: dict[str, Path], width: int, browser: Browser) -> None:
    browser.open(pages["results"].as_uri(), width)
    lines = """Array.from(document.querySelectorAll("#differences td:not(:empty)"), (cell) => {
      const range = document.createRange(); range.selectNodeContents(cell.firstChild);
      return [cell.textContent, range.getClientRects().length]; })"""
    cells = dict(browser.evaluate(lines))
    assert {"0.001", "0.002", "lcl", "emu"} <= cells.keys()
    assert set(cells.values()) == {1}
    copied = """(() => { const table = document.querySelector("#differences table");
      getSelection().selectAllChildren(table); return [getSelection().toString(), table.rows.length]; })()"""
    text, rows = browser.evaluate(copied)
    assert text.count("(") >= 2
    assert len(text.strip().splitlines()) == rows, "as text, a row is a line"


def test_all_columns_are_printed(pages: dict[str, Path], browser: Browser) -> None:
    """On A4 with Chromium's margins, without making all smaller."""
    browser.open(pages["results"].as_uri(), width=717, media="print")
    heads = "Array.from(document.querySelectorAll('th'), (one) => [one.textContent, one.getBoundingClientRect().right])"
    found = browser.evaluate(heads)
    assert [name for name, _ in found].count("held-out bits a token") == 2
    assert max(right for _, right in found) <= 717


def test_the_index_of_the_documentation_fits_a_phone(tmp_path: Path, browser: Browser) -> None:
    theme = Path(pytest.importorskip("furo").__file__).parent / "theme/furo/static/styles/furo.css"
    own = Path(__file__).parents[2] / "docs/_static/style.css"
    links = "".join(f'<link rel="stylesheet" href="{file.as_uri()}">' for file in (theme, own))
    name = "contexts (megatron_lcl.model.activations.Outputs attribute)"
    cell = f'<td style="width: 33%"><ul><li><a href="#">{name}</a></li></ul>'
    (tmp_path / "index.html").write_text(
        f'<!doctype html>{links}<table style="width: 100%" class="indextable genindextable"><tr>{2 * cell}</table>'
    )
    browser.open((tmp_path / "index.html").as_uri(), width=360, height=740)
    assert browser.evaluate("document.querySelector('td:last-child').getBoundingClientRect().right") <= 360


class Stroke:
    """A path of a PDF's page, in points from its lower left corner."""

    def __init__(self, color: tuple[float, ...], points: list[tuple[float, float]]) -> None:
        self.color, self.points = color, points


def pages_of(pdf: bytes) -> list[list[Stroke]]:
    """What is stroked on each page: enough of PDF for what Chromium writes."""
    sheets = []
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            text = zlib.decompress(stream)
        except zlib.error:
            continue
        if b" cm" in text[:400] and (b"\nS\n" in text or b"\nre\n" in text or b" re\n" in text):
            sheets.append(strokes_of(text.decode("latin-1")))
    return sheets


def strokes_of(text: str) -> list[Stroke]:
    """By the operators q Q cm RG m l c S of a content stream."""
    matrix, color, stack, operands = np.eye(3), (0.0,), [], []  # type: ignore[var-annotated]
    points: list[tuple[float, float]] = []
    found: list[Stroke] = []
    for word in text.split():
        if re.fullmatch(r"-?[\d.]+", word):
            operands.append(float(word))
            continue
        if word == "q":
            stack.append((matrix, color))
        elif word == "Q":
            matrix, color = stack.pop()
        elif word == "cm":
            a, b, c, d, e, f = operands[-6:]
            matrix = np.array([[a, b, 0], [c, d, 0], [e, f, 1]]) @ matrix
        elif word == "RG":
            color = tuple(round(value, 3) for value in operands[-3:])
        elif word in ("m", "l", "c"):
            x, y, _ = np.array([*operands[-2:], 1.0]) @ matrix
            points.append((float(x), float(y)))
        elif word == "S":
            found.append(Stroke(color, points))
            points = []
        elif word in ("n", "f", "f*"):
            points = []
        operands = []
    return found
