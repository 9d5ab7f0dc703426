"""The same documents, written out in every format and read back through a corpus."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from data import writers
from data.writers import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.preprocess import preprocess

TOKENIZER = tokenizers.train_sentencepiece(["The quick brown fox jumps over the lazy dog. " * 20], 400)


def plain(documents: Sequence[Document]) -> list[list[object]]:
    """What a document holds, in order."""
    return [
        [item.text if isinstance(item, Text) else (item.data, item.similarity, item.matched_text) for item in d.items]
        for d in documents
    ]


def pixels(documents: Sequence[Document]) -> list[list[object]]:
    """The same with pixels in place of encoded bytes."""

    def decoded(data: bytes) -> tuple[object, ...]:
        array = np.asarray(Pillow.open(io.BytesIO(data)).convert("RGBA"))
        return array.shape, array.tobytes()

    return [[item.text if isinstance(item, Text) else decoded(item.data) for item in d.items] for d in documents]


def through(
    format: str, tmp_path: Path, input: Path, images: Path | None = None, tokenizer: tokenizers.Tokenizer = TOKENIZER
) -> list[Document]:
    preprocess(format, input, tmp_path / f"out-{format}", images=images, tokenizer=tokenizer)
    return list(open_corpus(tmp_path / f"out-{format}"))


def matched(document: Document) -> Document:
    """Every image before some text, with a similarity that float32 holds."""
    num_texts = len(document.texts)
    images = [Image(i.data, "", 0.25 + k / 64, k % num_texts) for k, i in enumerate(document.images)]
    items: list[Text | Image] = []
    for number, text in enumerate(document.texts):
        items += [image for image in images if image.matched_text == number] + [text]
    return Document(tuple(items))


def check_all_formats(documents: list[Document], tmp_path: Path, tokenizer: tokenizers.Tokenizer = TOKENIZER) -> None:
    writers.write_jsonl(documents, tmp_path / "jsonl")
    assert plain(through("jsonl", tmp_path, tmp_path / "jsonl", None, tokenizer)) == plain(documents)
    for format, structs in (("obelics", False), ("omnicorpus", True)):
        writers.write_parquet(documents, tmp_path / format, tmp_path / f"{format}-images", structs)
        back = through(format, tmp_path, tmp_path / format, tmp_path / f"{format}-images", tokenizer)
        assert plain(back) == plain(documents)
    writers.write_mint1t(documents, tmp_path / "mint1t")
    assert pixels(through("mint1t", tmp_path, tmp_path / "mint1t", None, tokenizer)) == pixels(documents)
    with_texts = [matched(d) for d in documents if d.texts]
    if with_texts:
        writers.write_mmc4(with_texts, tmp_path / "mmc4", tmp_path / "mmc4-images")
        assert plain(through("mmc4", tmp_path, tmp_path / "mmc4", tmp_path / "mmc4-images", tokenizer)) == plain(
            with_texts
        )
    pairs = [Document((d.images[0], d.texts[0])) for d in documents if d.images and d.texts]
    if pairs:
        writers.write_webdataset(pairs, tmp_path / "webdataset")
        assert plain(through("webdataset", tmp_path, tmp_path / "webdataset", None, tokenizer)) == plain(pairs)


# U+2581 is SentencePiece's own mark for a space
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60).filter(str.strip)
items = st.one_of(texts.map(Text), st.integers(0, 30).map(lambda seed: Image(picture(seed))))
some_documents = st.lists(
    st.lists(items, min_size=1, max_size=6).map(lambda x: Document(tuple(x))), min_size=1, max_size=5
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(awkward_text, max_size=3), min_size=1, max_size=6), st.booleans())
def test_lines_of_nothing_but_texts_as_other_lines(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]], escaped: bool
) -> None:
    """Such lines are read another, faster way, which a field that nobody knows rules out."""
    tmp_path, corpora = tmp_path_factory.mktemp("lines"), []
    for extra in ({}, {"extra": 1}):
        file = tmp_path / ("fast" if not extra else "slow") / "in.jsonl"
        file.parent.mkdir()
        lines = [
            json.dumps({"items": [{"text": text, **extra} for text in texts]}, ensure_ascii=escaped)
            for texts in documents
        ]
        lines.append(json.dumps({"items": [{"text": "good", **extra}]}))
        file.write_text("\n".join(lines), "utf-8", errors="surrogatepass")
        preprocess("jsonl", file, file.parent / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
        corpora.append(open_corpus(file.parent / "out"))
    fast, slow = corpora
    assert plain(fast) == plain(slow)
    assert fast.manifest["counts"] == slow.manifest["counts"]
    for kind in ("bad", "left_out", "noted"):
        assert fast.manifest["drops"][kind] == slow.manifest["drops"][kind]
