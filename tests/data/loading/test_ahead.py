"""Reading ahead: which files are asked for what, and to let go of it."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lcl.data.loading.ahead import Ahead


class Noted:
    """`Blocks` of a shard, that note what they are asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.released: list[int] = []

    def ahead(self, ranges: Iterable[tuple[int, int]], turn: int) -> None:
        self.asked.append(turn)

    def release(self, turn: int) -> None:
        self.released.append(turn)


@pytest.mark.parametrize("stride", [1, 3])
def test_only_what_a_micro_batch_was_read_from_is_told_of_its_end(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    """Of a corpus of 25,000 shards, telling all takes longer than the batch."""
    tokens, images = ([Noted() for _ in range(100)] for _ in range(2))
    monkeypatch.setattr(Ahead, "_token_ranges", lambda _, turn: {tokens[turn % 100]: [(0, 1)]})
    monkeypatch.setattr(Ahead, "_image_ranges", lambda _, turn: {images[turn * 7 % 100]: [(0, 1)]})
    reader: Any = SimpleNamespace(data=SimpleNamespace(look_ahead=1))
    ahead = Ahead(reader, lambda turn: (turn,), stride, None)
    for turn in range(0, 100 * stride, stride):
        ahead.begin(turn)
        ahead.end(turn)
        for blocks in (*tokens, *images):
            assert blocks.released == [asked for asked in blocks.asked if asked <= turn]
    assert sum(len(blocks.released) for blocks in (*tokens, *images)) == 2 * 100
