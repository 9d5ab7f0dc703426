"""How messages count and name things."""

from __future__ import annotations

import pytest

from megatron_lcl.errors import counted, listed


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
