"""Charts as inline SVG whose colors are the page's, so that they follow its light, dark and printed form.

A chart is drawn in WIDTH × HEIGHT units and scaled to its place. The page's script reads the numbers under the pointer
back from the paths, by the ranges that the SVG carries; without scripts the chart is whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from megatron_lcl.units import in_units

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 22
NUM_COLORS = 8
"""CSS variables --c0 … of style.html"""
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_LEVEL = 2
"""number of the dashes of the first level, after those of the first two lines; others follow"""
NUM_STYLES = NUM_COLORS * len(_DASHES)
"""lines with larger numbers look like earlier ones"""
_PLAIN = Markup(' fill="none" stroke="currentColor"')
"""how lines are drawn where the host of a page forbids its styles: else all are black areas"""
_PLAIN_TEXT = 'class="tick" font-size="10" fill="currentColor" stroke="none"'
DOTS = 40
"""a line of no more values has a dot for each"""
_LOG_RANGE = 30.0
"""largest over median value, from which on an axis is logarithmic"""


@dataclass(frozen=True)
class Line:
    """A curve; where low and high differ from the mean, a stretch of steps that spans them."""

    label: str
    first: np.ndarray
    """[N] first step of each stretch; ascending"""
    final: np.ndarray
    low: np.ndarray
    """[N], NaN where there is a gap"""
    high: np.ndarray
    color: int = 0
    """its number among the lines, or among the levels, which also says how it is dashed"""
    quiet: bool = False
    """a level to compare with, such as chance"""
    mean: np.ndarray | None = None
    """[N] drawn as the line, with a band from low to high; None: the line goes through both"""


@dataclass(frozen=True)
class Mark:
    """Something at a step: a dashed line for a phase, a tick for an incident."""

    step: int
    kind: str
    text: str


def dashes_of(color: int, quiet: bool = False) -> str:
    """SVG's `stroke-dasharray` of a line with this number: neighbors are told apart without their colors."""
    if quiet:
        color += _LEVEL
    return _DASHES[(color + color // NUM_COLORS) % len(_DASHES)]


def chart(
    lines: Sequence[Line], last_step: int, marks: Sequence[Mark] = (), label: str = "", is_read: bool = True
) -> Markup:
    """The SVG of some lines over the same steps; empty where no line has a value. is_read: whether the page's script
    says steps and values, which it reads from the paths: steps exactly, values to about 1/1,500 of the axis."""
    lines = [line for line in lines if np.isfinite(line.low).any()]
    if not any(not line.quiet for line in lines):
        return Markup("")
    lows = np.concatenate([line.low[np.isfinite(line.low)] for line in lines])
    highs = np.concatenate([line.high[np.isfinite(line.high)] for line in lines])
    low, high = float(lows.min()), float(highs.max())
    is_log = low > 0 and high > _LOG_RANGE * float(np.median(np.concatenate([lows, highs])))
    if is_log:
        low, high = math.log10(low), math.log10(high)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    margin = 0.04 * (high - low)
    low, high = (low if low == 0 else low - margin), high + margin
    start = min(float(line.first[0]) for line in lines)
    stop = max(float(last_step), start + 1)
    area = _Area(start, stop, low, high, is_log)
    parts = [*area.axes(), *(area.mark(mark) for mark in marks if start <= mark.step <= stop)]
    for line in lines:
        parts += area.line(line)
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}"{} role="img" aria-label="{}"{} data-log="{}">{}</svg>'
    ).format(
        WIDTH,
        HEIGHT,
        _PLAIN,
        label,
        Markup(' tabindex="0" data-range="{}"').format(" ".join(f"{v:.9g}" for v in (start, stop, low, high)))
        if is_read
        else "",
        int(is_log),
        Markup("".join(parts)),
    )


def swatch(color: int, quiet: bool = False) -> Markup:
    """A piece of a line, or of a level, with this number, for a key."""
    return Markup(
        '<svg class="swatch chart" viewBox="0 0 28 6" width="28" height="6"{} aria-hidden="true">'
        '<path class="line {}"{} d="M1 3H27"/></svg>'
    ).format(_PLAIN, "quiet" if quiet else f"k{color % NUM_COLORS}", _dashed(color, quiet))


def _dashed(color: int, quiet: bool) -> Markup:
    dashes = dashes_of(color, quiet)
    return Markup(' stroke-dasharray="{}"').format(dashes) if dashes else Markup("")


class _Area:
    def __init__(self, start: float, stop: float, low: float, high: float, is_log: bool) -> None:
        self.start, self.stop, self.low, self.high, self.is_log = start, stop, low, high, is_log
        # of x in a line: rounded, it is off by less than half a step, so that the step can be read back
        self.decimals = max(1, math.floor(math.log10((stop - start) / (WIDTH - LEFT - RIGHT))) + 1)

    def x(self, step: np.ndarray | float) -> np.ndarray:
        return LEFT + (np.asarray(step) - self.start) / (self.stop - self.start) * (WIDTH - LEFT - RIGHT)

    def y(self, value: np.ndarray | float) -> np.ndarray:
        value = np.log10(value) if self.is_log else np.asarray(value)
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> list[str]:
        base = HEIGHT - BOTTOM
        parts = [f'<path class="axis" d="M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}"/>']
        values = self._y_ticks()
        for value, text in zip(values, shorts(values), strict=True):
            y = float(self.y(value))
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text {_PLAIN_TEXT} x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        steps = [tick for tick in ticks(self.start, self.stop, 4) if tick == int(tick)]
        for step, text in zip(steps, shorts(steps), strict=True):
            x = float(self.x(step))
            anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
            parts.append(f'<text {_PLAIN_TEXT} x="{x:.1f}" y="{base + 14}" text-anchor="{anchor}">{text}</text>')
        return parts

    def _y_ticks(self) -> list[float]:
        if not self.is_log:
            return ticks(self.low, self.high, 4)
        powers = range(math.ceil(self.low), math.floor(self.high) + 1)
        every = max(1, len(powers) // 4)
        found = [10.0**power for power in powers if power % every == 0]
        return found if len(found) > 1 else [10**v for v in (self.low, (self.low + self.high) / 2, self.high)]

    def mark(self, mark: Mark) -> str:
        x, title = float(self.x(mark.step)), escape(f"step {mark.step:,}, {mark.text}")
        if mark.kind in ("phase", "resumed"):
            return f'<path class="mark {mark.kind}" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"><title>{title}</title></path>'
        shape = f"M{x:.1f} {TOP}l-3.5 -7h7z"
        return f'<path class="mark incident {escape(mark.kind)}" d="{shape}"><title>{title}</title></path>'

    def line(self, line: Line) -> list[str]:
        color = "quiet" if line.quiet else f"k{line.color % NUM_COLORS}"
        label = escape(line.label)
        parts = []
        if line.mean is None:
            x = np.stack([self.x(line.first), self.x(line.final)], 1)
            y = np.stack([self.y(line.low), self.y(line.high)], 1)
            paths = _path(x, y, self.decimals)
        else:
            middle = self.x((line.first + line.final) / 2)
            y = self.y(line.mean)
            paths = _path(np.stack([middle, middle], 1), np.stack([y, y], 1), self.decimals)
            if shape := _band(middle, self.y(line.high), self.y(line.low)):
                parts.append(f'<path class="band {color}" d="{shape}"/>')
        parts.append(f'<path class="line {color}" data-label="{label}"{_dashed(line.color, line.quiet)} d="{paths}"/>')
        if np.isfinite(line.low).sum() <= DOTS and not line.quiet:
            dots = "".join(
                f"M{a:.1f} {b:.1f}h0"
                for a, b in zip(
                    self.x((line.first + line.final) / 2),
                    self.y(line.high if line.mean is None else line.mean),
                    strict=True,
                )
                if math.isfinite(b)
            )
            parts.append(f'<path class="dots {color}" d="{dots}"/>')
        return parts


def _path(x_N2: np.ndarray, y_N2: np.ndarray, decimals: int) -> str:
    """A line through stretches' least and largest values, broken where there are none; what stands alone is a dot.

    decimals: of x.
    """
    words: list[str] = []
    there = np.isfinite(y_N2[:, 0])
    for i in np.flatnonzero(there):
        begins = i == 0 or not there[i - 1]
        (x0, x1), (y0, y1) = x_N2[i], y_N2[i]
        words.append(f"{'M' if begins else 'L'}{x0:.{decimals}f} {y0:.1f}")
        if f"{y0:.1f}" != f"{y1:.1f}":
            words.append(f"L{x1:.{decimals}f} {y1:.1f}")
        elif begins and (i + 1 == len(there) or not there[i + 1]):
            words.append("h0")
    return "".join(words)


def _band(x_N: np.ndarray, top_N: np.ndarray, bottom_N: np.ndarray) -> str:
    """The area between two edges, one for each part between gaps; nothing of a part where they are the same."""
    there = np.flatnonzero(np.isfinite(top_N))
    words = []
    for part in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1):
        if (top_N != bottom_N)[part].any():
            edge = [*zip(x_N[part], top_N[part], strict=True), *zip(x_N[part][::-1], bottom_N[part][::-1], strict=True)]
            words.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in edge) + "Z")
    return "".join(words)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in a range, about so many."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if (high - low) / (step * f) <= about + 1)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.15g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def shorts(values: Sequence[float]) -> list[str]:
    """Numbers as `short`, with as many digits as it takes to say each to a hundredth of the distance between two."""
    apart = min((abs(b - a) for a, b in itertools.pairwise(values)), default=math.inf)
    for digits in range(3, 16):
        texts = [short(value, digits) for value in values]
        if all(abs(_said(text) - value) <= 0.01 * apart for text, value in zip(texts, values, strict=True)):
            break
    return texts


_UNITS = ("", "k", "M", "G", "T")


def short(value: float, digits: int = 3) -> str:
    """A number in few characters: 1.5k, 2M, 0.02, 3e-5."""
    if value and abs(value) < 1e-3:
        number, _, power = f"{value:.{digits - 2}e}".partition("e")
        return f"{float(number):.{digits}g}e{int(power)}"
    return in_units(value, _UNITS, digits)


def _said(text: str) -> float:
    """The number that `short` has written."""
    number = text.rstrip("kMGT")
    return float(number.replace(",", "")) * 1000.0 ** _UNITS.index(text[len(number) :])
