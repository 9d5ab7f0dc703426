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
