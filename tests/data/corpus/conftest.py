"""A small corpus of every kind of item."""

from __future__ import annotations

from pathlib import Path

import pytest
from data import writers
from data.helpers import TOKENIZER
from data.writers import picture

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.prepare.preprocess import preprocess

DOCUMENTS = [
    Document((Text("one"), Image(picture(0)), Text("two"))),
    Document((Image(picture(1)), Image(picture(0)))),
    Document((Text("only text, a little longer than the others"),)),
    Document((Text("a"), Image(picture(2), "", 0.25, 1), Text("b"), Image(picture(1), "", 0.5, 0))),
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    writers.write_jsonl(DOCUMENTS, tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "corpus", tokenizer=TOKENIZER)
    return tmp_path / "corpus"
