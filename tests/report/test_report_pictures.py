"""Pictures of the report in headless Chromium: pixels of the screen are those of the pictures that were planted."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from data.helpers import TOKENIZER
from data.writers import write_jsonl
from report.browser import Browser

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.loading.images import thumbnail
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.evaluate.gallery import Gallery, Mark, Named
from megatron_lcl.evaluate.heldout_results import Example, HeldOut, Pair
from megatron_lcl.evaluate.results import Metric, Result
from megatron_lcl.report.page import write_report
from megatron_lcl.run_folder import EXAMPLES, GALLERY, HELDOUT

pytestmark = pytest.mark.slow
Color = tuple[int, int, int]
COLORS: list[Color] = [(200 * r + 25, 200 * g + 25, 200 * b + 25) for r, g, b in itertools.product((0, 1), repeat=3)]
CELLS = [(0, 0), (5, 0), (2, 1), (4, 2), (1, 3), (6, 3), (3, 4), (5, 4)]
"""column and row on the map of each of its pictures"""
COLUMNS, ROWS = 7, 5
GROUND = (0xFB, 0xFC, 0xFD)
"""of the map"""
RECTANGLES = """Array.from(document.querySelectorAll(%r), (e) => { const r = e.getBoundingClientRect();
  return [r.x + scrollX, r.y + scrollY, r.width, r.height]; })"""


def halves(number: int) -> tuple[Color, Color]:
    """Colors of a picture's left and right half, of which no two pictures have the same."""
    return COLORS[number % 8], COLORS[(number + 3 + number // 8) % 8]


def encoded(number: int, width: int, height: int) -> bytes:
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = halves(number)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_retrieval(run: Path, numbers: list[int]) -> None:
    """A held-out corpus of an image a document, and the examples of an evaluation on it."""
    documents = [Document((Text(f"mill {n}"), Image(encoded(n, 120, 80)))) for n in numbers]
    write_jsonl(documents, run / "pages")
    preprocess("jsonl", run / "pages", run / "corpus", tokenizer=TOKENIZER)
    pairs = [Pair(i, 0, i, f"mill {n}") for i, n in enumerate(numbers)]
    examples = [Example(pair, 1 + i, tuple(pairs[:2])) for i, pair in enumerate(pairs)]
    shares = dict.fromkeys(("image_to_context_recall_at_1", "image_to_context_recall_at_10"), 0.5)
    measured = HeldOut(str(run / "corpus"), 3, 3, 0, **shares, chance_at_1=0.3, chance_at_10=1.0, median_rank=1.0)
    (run / HELDOUT).write_text(json.dumps(asdict(measured)))
    (run / EXAMPLES).write_text(json.dumps([asdict(example) for example in examples]))


def make_gallery(run: Path, right: list[int], wrong: list[int], marks: list[int]) -> None:
    def url(number: int, side: int) -> str:
        return thumbnail(encoded(number, side, side), side, "WEBP")

    def named(number: int, rank: int) -> Named:
        return Named(url(number, 96), f"name {number}", f"name {number + rank - 1}", rank)

    metrics = dict.fromkeys(("accuracy", "accuracy, top 5"), Metric(0.5, 0.4, 0.6, 0.125))
    result = Result("zero-shot classification", "ours", "pictures", 8, metrics, {"classes": 8})
    on_map = [Mark(url(n, 48), f"name {n}", f"name {n}", *cell) for n, cell in zip(marks, CELLS, strict=True)]
    shown = tuple(named(n, 1) for n in right), tuple(named(n, 4) for n in wrong)
    gallery = Gallery(result, "", len(right), *shown, COLUMNS, ROWS, tuple(on_map))
    (run / GALLERY).write_text(json.dumps(asdict(gallery)))


@pytest.fixture(scope="module")
def page(whole_run: Path, once: Callable[[str, Callable[[Path], Any]], Any]) -> Path:
    """Of a run with three retrieval examples (0 … 2), a gallery (3 … 8) and a map (9 … 16)."""

    def make(folder: Path) -> Path:
        run = folder / "run"
        run.mkdir()
        (run / "config.yaml").write_bytes((whole_run / "config.yaml").read_bytes())
        (run / "metrics.jsonl").write_bytes((whole_run / "metrics.jsonl").read_bytes())
        make_retrieval(run, [0, 1, 2])
        make_gallery(run, [3, 4, 5], [6, 7, 8], list(range(9, 17)))
        return write_report(run)

    return once("report-pictures", make)


def sampled(pixels: np.ndarray, rectangle: list[float]) -> np.ndarray:
    """Colors [2, 3] of a rectangle x, y, width, height: medians inside of its left and of its right half."""
    x, y, width, height = rectangle
    rows = slice(round(y + 0.3 * height), round(y + 0.7 * height))
    columns = [slice(round(x + a * width), round(x + b * width)) for a, b in ((0.15, 0.35), (0.65, 0.85))]
    return np.array([np.median(pixels[rows, part].reshape(-1, 3), 0) for part in columns])


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_pictures_are_drawn(page: Path, width: int, dark: bool, browser: Browser) -> None:
    """Each in its own place, neither mirrored nor in another's; on the map as far apart as their cells are."""
    browser.open(page.as_uri(), width=width, dark=dark)
    pixels = browser.pixels()
    for selector, numbers in (
        ("#retrieval .example img", [0, 1, 2]),
        ("#names .pictures figure.right img", [3, 4, 5]),
        ("#names .pictures figure.wrong img", [6, 7, 8]),
        ("#names svg.map image", list(range(9, 17)) if width == 1200 else []),  # narrow, it scrolls inside
    ):
        found = browser.evaluate(RECTANGLES % selector)
        for number, rectangle in zip(numbers, found, strict=bool(numbers)):
            assert np.abs(sampled(pixels, rectangle) - halves(number)).max() <= 10, (selector, number)
    assert browser.complaints() == []
    assert browser.requests() == []
    map_at, places = browser.evaluate(RECTANGLES % "#names svg.map")[0], np.array(found)
    cell = (map_at[2] - 2) / (COLUMNS + 0.2)  # without its border, a pixel a side
    assert places[:, :2] / cell - places[0, :2] / cell == pytest.approx(np.array(CELLS) - CELLS[0], abs=0.02)
    assert places[:, 2:] / cell == pytest.approx(0.92, abs=0.02)
    if width == 1200:
        for column, row in set(itertools.product(range(COLUMNS), range(ROWS))) - set(CELLS):
            x, y = (round(map_at[i] + 1 + cell * (place + 0.6)) for i, place in enumerate((column, row)))
            assert tuple(pixels[y, x]) == GROUND, "nothing is drawn where no picture stands"
    keys = """["Right", "Right", "Right", "Down", "Left", "Up", "Up", "Left", "Up"].map((key) => {
      const map = document.querySelector("svg.map[tabindex='0']"); map.focus();
      map.dispatchEvent(new KeyboardEvent("keydown", { key: `Arrow${key}`, bubbles: true }));
      return [document.querySelector("[data-named]").textContent, map.querySelector(".named title").textContent]; })"""
    names = [f"name {n}" for n in (9, 11, 12, 15, 13, 11, 11, 9, 9)]
    assert browser.evaluate(keys) == [[name, name] for name in names], "from one to the nearest in this direction"
    if width == 1200:
        first = browser.evaluate(RECTANGLES % "#names svg.map image")[0]
        assert np.abs(sampled(browser.pixels(), first) - halves(9)).max() <= 10, "what shows it hides no picture"
