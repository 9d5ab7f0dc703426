"""Numbers as text: no exponent for a size that a person reads, also where rounding reaches the next unit; counts."""

from __future__ import annotations

import math

import pytest

from megatron_lcl.units import counted, in_bytes, listed, plain


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (999.6e6, "1 GB"),
        (2.5e12, "2.5 TB"),
        (12_345.6e12, "12,300 TB"),
    ],
)
def test_bytes_have_the_unit_in_which_they_are_below_a_thousand_when_rounded(size: float, said: str) -> None:
    assert in_bytes(size) == said


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [
        (0.0, 4, "0"),
        (0.98765, 4, "0.9877"),
        (999.96, 4, "1000"),
        (12_345, 4, "12,345"),
        (1_234_567.8, 4, "1,234,568"),
        (-1_234_567.8, 4, "-1,234,568"),
        (99.96, 3, "100"),
        (100.0, 2, "100"),
        (0.04883, 2, "0.049"),
        (1e12, 4, "1e+12"),
        (math.nan, 4, "nan"),
        (math.inf, 4, "inf"),
    ],
)
def test_a_plain_number(value: float, digits: int, said: str) -> None:
    assert plain(value, digits) == said


@pytest.mark.parametrize(
    ("number", "word", "said"),
    [
        (0, "layout", "0 layouts"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (1024, "micro-batch", "1,024 micro-batches"),
    ],
)
def test_numbers_of_things(number: int, word: str, said: str) -> None:
    assert counted(number, word) == said


def test_things_by_their_numbers() -> None:
    assert listed([3], "process") == "process 3"
    assert listed([0, 3], "process") == "processes 0, 3"
    assert listed(range(8), "job") == "jobs 0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(2000), "job") == "jobs 0, 1, 2, 3, 4, 5, 6, 7 and 1,992 more"
