"""The colors of pages by WCAG 2.2's contrast (1.4.3 and 1.4.11), and how the deuteranopic see curves (Viénot 1999)."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files

import numpy as np
import pytest

from megatron_lcl.report.charts import NUM_COLORS, NUM_STYLES, dashes_of

# linear RGB → that of a deuteranope: Viénot, Brettel & Mollon, "Digital video colourmaps …" (1999), through LMS
_LMS = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
_DEUTERANOPE = np.array([[1.0, 0.0, 0.0], [0.494207, 0.0, 1.24827], [0.0, 0.0, 1.0]])


def linear(color: str) -> np.ndarray:
    part = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    light = sorted(float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def seen(color: str) -> np.ndarray:
    """In sRGB, 0 to 255."""
    found = (np.linalg.inv(_LMS) @ _DEUTERANOPE @ _LMS @ linear(color)).clip(0, 1)
    return 255 * np.where(found <= 0.0031308, 12.92 * found, 1.055 * found ** (1 / 2.4) - 0.055)


def variables(package: str, template: str) -> tuple[dict[str, str], dict[str, str]]:
    """Of a template, in light and in dark."""
    style = files(package).joinpath(template).read_text()
    light, dark = re.split(r"@media screen and \(prefers-color-scheme: dark\)", style, maxsplit=1)
    named = re.compile(r"--([\w-]+): (#[0-9a-f]{3}(?:[0-9a-f]{3})?);")

    def of(text: str) -> dict[str, str]:
        return {n: c if len(c) == 7 else "#" + "".join(2 * d for d in c[1:]) for n, c in named.findall(text)}

    return of(light), of(light) | of(dark)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_curves_stand_out(dark: bool) -> None:
    colors = variables("megatron_lcl.report", "style.html")[dark]
    for paper in ("paper", "ground", "code"):
        for text in ("ink", "quiet", "accent", "good-ink", "bad-ink"):
            assert contrast(colors[text], colors[paper]) >= 4.5, (text, paper)
    for n in range(NUM_COLORS):
        assert contrast(colors[f"c{n}"], colors["paper"]) >= 3, n
    packs = variables("megatron_lcl.data.pages", "templates/packs.html")[dark]
    for text, paper in (("ink", "card"), ("quiet", "card"), ("quiet", "chip")):
        assert contrast(packs[text], packs[paper]) >= 4.5, (text, paper)
    assert contrast(packs["target"], packs["card"]) >= 3, "the line under targets"
    assert contrast(packs["pair"], packs["card"]) >= 3, "the frames of pairs"
    corpus = variables("megatron_lcl.data.pages", "templates/corpus_style.html")[dark]
    for text in ("ink", "quiet", "link"):
        assert contrast(corpus[text], corpus["paper"]) >= 4.5, text
    assert contrast(corpus["bar"], corpus["paper"]) >= 3


def test_white_on_a_pairs_token_can_be_read() -> None:
    style = files("megatron_lcl.data.pages").joinpath("templates/packs.html").read_text()
    background, text = re.search(r"\.token\.pair { background: (#\w+); color: (#\w+); }", style).groups()  # type: ignore[union-attr]
    assert contrast(background, text + text[1:] if len(text) == 4 else text) >= 4.5


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_lines_differ_without_red_and_green(dark: bool) -> None:
    """In what a deuteranope sees of their colors, or in their dashes."""
    colors = variables("megatron_lcl.report", "style.html")[dark]
    styles = {(n % NUM_COLORS, dashes_of(n)) for n in range(NUM_STYLES)}
    assert len(styles) == NUM_STYLES
    for a, b in itertools.combinations(range(NUM_COLORS), 2):
        apart = np.linalg.norm(seen(colors[f"c{a}"]) - seen(colors[f"c{b}"]))
        assert apart >= 30 or dashes_of(a) != dashes_of(b), (a, b, apart)
