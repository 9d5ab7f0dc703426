"""Training a tokenizer; what it gives: tests/data/corpus/test_tokenizer.py."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.data.storage.paths import Unreadable
from megatron_lcl.errors import UserError


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


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), OSError(errno.EIO, "broken", "a.jsonl"), UserError("mend it"), Unreadable("an object")],
)
@pytest.mark.parametrize("num_before", [0, 1])
def test_what_ends_the_reading_of_texts_is_raised(error: BaseException, num_before: int) -> None:
    def texts() -> Iterator[str]:
        yield from ["a line of a text"] * num_before
        raise error

    with pytest.raises(type(error)) as raised:
        train_sentencepiece(texts(), 1000)
    assert raised.value is error


def test_texts_that_the_trainer_refuses_are_an_error_of_the_user() -> None:
    """It keeps this character for itself, and takes no line that has it."""
    with pytest.raises(UserError, match="cannot train a tokenizer of 1000 ids on these texts: INTERNAL"):
        train_sentencepiece(["\u2585"], 1000)
