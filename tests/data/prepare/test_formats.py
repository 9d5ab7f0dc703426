"""Protects the importers: the same documents come back through a corpus from every source format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data import writers
from data.helpers import TOKENIZER, check_all_formats, plain, through
from data.writers import picture
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.preprocess import preprocess

# U+2581 is SentencePiece's own mark for a space
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60).filter(str.strip)
items = st.one_of(texts.map(Text), st.integers(0, 30).map(lambda seed: Image(picture(seed))))
some_documents = st.lists(
    st.lists(items, min_size=1, max_size=6).map(lambda x: Document(tuple(x))), min_size=1, max_size=5
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_documents)
def test_arbitrary_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: list[Document]) -> None:
    check_all_formats(documents, tmp_path_factory.mktemp("formats"))


def test_special_token_strings_are_text(tmp_path: Path) -> None:
    documents = [Document((Text("<start_of_text> <img_placehold><s></s><unk><0x41> <end_of_img>"),))]
    writers.write_jsonl(documents, tmp_path / "in")
    assert plain(through("jsonl", tmp_path, tmp_path / "in")) == plain(documents)
    ids = open_corpus(tmp_path / "out-jsonl").shard(0).piece(0)
    assert isinstance(ids, np.ndarray)
    assert ids.max() < TOKENIZER.base_size


awkward_text = st.text(st.sampled_from('ab \t\u00a0é\ud800\0"\\'), max_size=4)
some_names = st.fixed_dictionaries({}, optional=dict.fromkeys(("url", "id"), st.sampled_from([0, "", "a", None, 1.5])))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.lists(awkward_text, max_size=3), some_names), min_size=1, max_size=6), st.booleans())
@example([(["a"], {"id": 0})], False)
def test_lines_of_nothing_but_texts_as_other_lines(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[list[str], dict[str, object]]], escaped: bool
) -> None:
    """Such lines are read another, faster way, which a field that nobody knows rules out."""
    tmp_path, corpora = tmp_path_factory.mktemp("lines"), []
    for extra in ({}, {"extra": 1}):
        file = tmp_path / ("fast" if not extra else "slow") / "in.jsonl"
        file.parent.mkdir()
        lines = [
            json.dumps({"items": [{"text": text, **extra} for text in texts], **names}, ensure_ascii=escaped)
            for texts, names in documents
        ]
        lines.append(json.dumps({"items": [{"text": "good", **extra}]}))
        file.write_text("\n".join(lines), "utf-8", errors="surrogatepass")
        preprocess("jsonl", file, file.parent / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
        corpora.append(open_corpus(file.parent / "out"))
    fast, slow = corpora
    assert plain(fast) == plain(slow)
    called = [[corpus.name(number).partition(" ")[2] for number in range(len(corpus))] for corpus in corpora]
    assert called[0] == called[1]  # without their places in the file
    assert fast.manifest["counts"] == slow.manifest["counts"]
    for kind in ("bad", "left_out", "noted"):
        assert fast.manifest["drops"][kind] == slow.manifest["drops"][kind]
