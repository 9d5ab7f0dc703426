"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence


def plain(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, below 10⁹ without an exponent for its size: 0.02, 9.75, 12,345."""
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e9 else f"{value:.{digits}g}"


def in_units(value: float, units: Sequence[str], digits: int = 3) -> str:
    """A number to so many significant digits and with a unit, each 1,000 times the one before it: the first in which
    the number is below 1,000 once it is rounded, or the last."""
    value = float(f"{value:.{digits}g}")
    for unit in units[:-1]:
        if not abs(value) >= 1000:
            return f"{value:.{digits}g}{unit}"
        value /= 1000
    return plain(value, digits) + units[-1]


def in_bytes(size: float) -> str:
    """A number of bytes with a unit, as disks count them (10³)."""
    return in_units(size, (" B", " kB", " MB", " GB", " TB"))


def in_gb(size: float) -> str:
    """Bytes in 10⁹ of them: 0.012, 9.7, 1,234."""
    return f"{size / 1e9:,.0f}" if size >= 10e9 else f"{size / 1e9:.2g}"


def counted(number: int, word: str) -> str:
    """So many of a thing: "1 process", "2 processes"."""
    return f"{number:,} {word if number == 1 else _plural(word)}"


def listed(numbers: Sequence[int], word: str) -> str:
    """Things by their numbers: "process 3", "processes 0, 3"; of many the first eight, and how many more there are."""
    more = f" and {len(numbers) - 8:,} more" if numbers[8:] else ""
    return f"{word if len(numbers) == 1 else _plural(word)} {', '.join(map(str, numbers[:8]))}{more}"


def _plural(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")
