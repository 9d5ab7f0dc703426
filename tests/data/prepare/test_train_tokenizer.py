"""Training a tokenizer; what it gives: tests/data/corpus/test_tokenizer.py."""

from __future__ import annotations

import random

import pytest

from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece


def test_training_is_deterministic_and_bounded() -> None:
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(3000)]
    texts = [" ".join(rng.choices(words, k=500)) for _ in range(40)] + ["x" * 10_000, "", "\0"]
    first, second = (train_sentencepiece(iter(texts), 1200) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 1200
    with pytest.raises(ValueError, match="--vocab-size 100: give at least"):
        train_sentencepiece(texts, 100)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", " \n"], 1000)
