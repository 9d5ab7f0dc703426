"""Training a tokenizer; what it gives: tests/data/corpus/test_tokenizer.py."""

from __future__ import annotations

import collections
import errno
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from data.helpers import TOKENIZER
from data.writers import picture

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.tokenizer import SentencePieceTokenizer
from megatron_lcl.data.prepare import train_tokenizer
from megatron_lcl.data.prepare.bars import Bars
from megatron_lcl.data.prepare.chosen import choose
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.preprocess import preprocess
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


@pytest.mark.parametrize("sources", [2, 40])
def test_of_much_text_each_source_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: int) -> None:
    """Files of 300 kB each, sorted by language; as many bytes are taken as before, of whole documents."""
    for n in range(sources):
        line = json.dumps({"items": [{"text": f"word{n:02d} " * 100}]}) + "\n"
        (tmp_path / f"language-{n:02d}.jsonl").write_text(line * (300_000 // len(line)))
    trained_on: list[str] = []
    monkeypatch.setattr(train_tokenizer, "train_sentencepiece", lambda texts, _: trained_on.extend(texts))
    monkeypatch.setattr(train_tokenizer, "MAX_BYTES", 120_000)
    importer = create("jsonl", tmp_path, None, {})
    tasks = [[unit] for unit in importer.units()]
    choose(importer, tasks, None, None, 1000, ["more" * 5000], 1, Bars(False))
    *of_input, more = trained_on
    seen = collections.Counter(text[:6] for text in of_input)
    assert more == "more" * 5000
    assert list(seen) == sorted(seen)
    assert len(seen) == (2 if sources == 2 else 16)
    assert max(seen.values()) - min(seen.values()) <= 10
    if sources == 40:
        gaps = np.diff([-1, *(int(word[4:]) for word in seen), 40])
        assert gaps.max() <= 5  # a sixteenth of them is 2.5
    assert 100_000 <= sum(map(len, of_input)) < 100_000 + 1000
    monkeypatch.setattr(train_tokenizer, "MAX_BYTES", 10**9)
    trained_on.clear()
    choose(importer, tasks, None, None, 1000, [], 1, Bars(False))
    everything = [text.text for unit in importer.units() for d in importer.documents(unit, Drops()) for text in d.texts]
    assert trained_on == everything


def test_texts_are_those_that_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what stands between the texts of a document."""
    (tmp_path / "in").mkdir()
    for page in range(3):
        (tmp_path / f"in/{page}.png").write_bytes(picture(page, 90, 80))
        (tmp_path / f"in/{page}.html").write_text(f"<p>One {page}</p><p>two</p><img src={page}.png><p>three</p>")
    trained_on: list[str] = []

    def train(texts: Iterable[str], _: int) -> SentencePieceTokenizer:
        trained_on.extend(texts)
        return TOKENIZER

    monkeypatch.setattr(train_tokenizer, "train_sentencepiece", train)
    preprocess("html", tmp_path / "in", tmp_path / "out", vocab_size=400)
    assert trained_on == [text.text for document in open_corpus(tmp_path / "out") for text in document.texts]
    assert trained_on[:2] == ["One 0\ntwo", "\nthree"]
