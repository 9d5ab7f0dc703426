"""Where the special tokens stand in a vocabulary."""

from __future__ import annotations

from typing import NamedTuple


class SpecialTokens(NamedTuple):
    """Ids of the special tokens: the vocabulary's last five, in this order, in every tokenizer."""

    sot: int
    eot: int
    placeholder: int
    soi: int
    eoi: int

    @classmethod
    def of(cls, vocab_size: int) -> SpecialTokens:
        return cls(*range(vocab_size - 5, vocab_size))
