"""Training a tokenizer; what it gives: tests/data/corpus/test_tokenizer.py."""

from __future__ import annotations

import collections
import errno
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.helpers import TOKENIZER
from data.writers import picture

from megatron_lcl.data.corpus.document import Document
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.tokenizer import SentencePieceTokenizer
from megatron_lcl.data.prepare import chosen, train_tokenizer
from megatron_lcl.data.prepare.bars import Bars
from megatron_lcl.data.prepare.chosen import choose
from megatron_lcl.data.prepare.importers import Importer, Unit, create
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


class Recorder:
    """A source that has one unit open at a time, and says which."""

    def __init__(self, importer: Importer) -> None:
        self.importer, self.separator, self.place = importer, importer.separator, importer.place
        self.kind = importer.kind
        self.units: list[Unit] = []
        self.open = False

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        assert not self.open
        self.open = True
        self.units.append(unit)
        try:
            yield from self.importer.documents(unit, drops)
        finally:
            self.open = False


@pytest.mark.parametrize(("sources", "at_least"), [(2, 256), (40, 256), (40, 10)])
def test_of_much_text_each_source_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: int, at_least: int
) -> None:
    """Files of 300 kB each, sorted by language, of which the first alone fills the room; two texts a document."""
    for n in range(sources):
        line = json.dumps({"items": [{"text": f"word{n:02d} " * 100}, {"text": f"wörd{n:02d} " * 20}]}) + "\n"
        (tmp_path / f"language-{n:02d}.jsonl").write_text(line * (300_000 // len(line)))
    trained_on: list[str] = []
    monkeypatch.setattr(train_tokenizer, "train_sentencepiece", lambda texts, _: trained_on.extend(texts))
    monkeypatch.setattr(train_tokenizer, "MAX_BYTES", 120_000)
    monkeypatch.setattr(chosen, "_UNITS", at_least)
    source: Any = Recorder(create("jsonl", tmp_path, None, {}))
    units = source.importer.units()
    tasks = [units[: len(units) // 2], units[len(units) // 2 :]]
    choose(source, tasks, None, None, 1000, ["more" * 5000], 1, Bars(False))
    *of_input, more = trained_on
    assert more == "more" * 5000
    seen = collections.Counter[str]()
    language = ""
    for text in of_input:
        language = text[4:6] if len(text) > 5 else language  # the last one is cut
        seen[language] += len(text.encode())
    languages = list(map(int, seen))
    assert languages == sorted(languages)
    assert len(languages) == min(sources, at_least)
    assert 0 <= 100_000 - seen.total() < 2 * len(languages)  # a character may be cut
    assert max(seen.values()) - min(seen.values()) <= 100_000 // 256 + 2
    assert max(np.diff([-1, *languages, sources])) <= -(-sources // at_least) + 1
    assert source.units == [units[0], *(units[n] for n in languages)]
    monkeypatch.setattr(train_tokenizer, "MAX_BYTES", 10**9)
    trained_on.clear()
    choose(source, tasks, None, None, 1000, [], 1, Bars(False))
    everything = [text.text for unit in units for d in source.documents(unit, Drops()) for text in d.texts]
    assert trained_on == everything


def test_texts_beside_the_input_leave_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text(json.dumps({"items": [{"text": "own"}]}))
    trained_on: list[str] = []
    monkeypatch.setattr(train_tokenizer, "train_sentencepiece", lambda texts, _: trained_on.extend(texts))
    monkeypatch.setattr(train_tokenizer, "MAX_BYTES", 10)
    importer = create("jsonl", tmp_path, None, {})
    choose(importer, [importer.units()], None, None, 1000, ["of another corpus"], 1, Bars(False))
    assert trained_on == ["own", "of another corpus"]


def test_so_many_bytes_are_read_and_no_more_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tokenizer, "MAX_BYTES", 10)
    assert [*train_tokenizer._training_lines(["水水水水", "b"])] == ["水水水水"]


def test_other_texts_beside_the_input_make_another_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"items": [{"text": "own"}]}))
    options: dict[str, Any] = {"input": tmp_path / "a.jsonl", "output": tmp_path / "out", "vocab_size": 400}
    preprocess("jsonl", **options, more_texts=["of another corpus"])
    with pytest.raises(UserError, match=r"\(its tokenizer differ\)"):
        preprocess("jsonl", **options, more_texts=["of a third one"])


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
