"""Protects the white space between texts of one document: sentences and paragraphs must not run into each other."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from data import writers
from data.helpers import TOKENIZER, byte_level, contents, spaced
from data.writers import picture
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.corpus.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_lcl.data.prepare import train_tokenizer
from megatron_lcl.data.prepare.importers import separated
from megatron_lcl.data.prepare.importers.mmc4 import Mmc4Importer
from megatron_lcl.data.prepare.preprocess import preprocess

BYTES = JsonTokenizer(byte_level().to_str().encode())
SENTENCES = ["Product Features.", "and more with it.", "The quick brown fox!", "jumps (over) the dog.", "The end"]
MATCHED = Document(
    (Image(picture(0), "", 0.1, 0), *(Text(sentence) for sentence in SENTENCES[:2]), Image(picture(1), "", 0.9, 2),
     Image(picture(2), "", 0.5, 2), *(Text(sentence) for sentence in SENTENCES[2:]))
)  # fmt: skip


def read_in_a_row(corpus: Corpus, document: int) -> str:
    """All ids of a document's texts, without its images, decoded at once."""
    shard = corpus.shard(0)
    first, last = shard.document_offsets[document : document + 2].tolist()
    pieces = [shard.pieces(k, k + 1) for k in range(first, last) if shard.modes[k] == 0]
    return corpus.tokenizer.decode(np.concatenate(pieces))


def mmc4(folder: Path, tokenizer: Tokenizer, lost: Iterable[int] = ()) -> Corpus:
    """A corpus of MATCHED, and of the same without images; without the files of some of its images."""
    if not (folder / "in").exists():
        writers.write_mmc4([MATCHED, Document(tuple(MATCHED.texts))], folder / "in", folder / "images")
    for k in lost:
        next((folder / "images").rglob(writers.name_of(MATCHED.images[k]))).unlink()
    output = folder / f"out-{len(list(folder.iterdir()))}"
    preprocess("mmc4", folder / "in", output, images=folder / "images", tokenizer=tokenizer, max_bad_fraction=1)
    return open_corpus(output)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTES], ids=["sentencepiece", "byte-level"])
@pytest.mark.parametrize("lost", [[], [1, 2], [0, 1, 2]], ids=["all images", "one image", "no image"])
def test_sentences_read_as_running_text(tmp_path: Path, tokenizer: Tokenizer, lost: list[int]) -> None:
    """Also where an image stands between two of them, which training may place elsewhere, or not select."""
    corpus = mmc4(tmp_path, tokenizer, lost)
    assert [read_in_a_row(corpus, k) for k in range(len(corpus))] == 2 * [" ".join(SENTENCES)]
    shard = corpus.shard(0)
    texts = [shard.pieces(k, k + 1).tolist() for k in range(shard.num_pieces) if shard.modes[k] == 0]
    forms = [SENTENCES[0], *(" " + sentence for sentence in SENTENCES[1:])]
    assert texts == 2 * tokenizer.encode_batch(forms)
    stays = [image for k, image in enumerate(MATCHED.images) if k not in lost]
    before = [[1] * sum(image.matched_text == k for image in stays) + [0] for k in range(len(SENTENCES))]
    assert shard.modes.tolist() == [*itertools.chain(*before), *[0] * len(SENTENCES)]
    assert shard.matched_text.tolist() == [image.matched_text for image in stays]


def test_a_shard_of_mmc4(tmp_path: Path, shared: Path) -> None:
    lines = (shared / "samples/mmc4/docs_no_face_shard_151_v3.jsonl").read_text("utf-8").splitlines()[:30]
    (tmp_path / "docs_shard_0_v2.jsonl").write_text("\n".join(lines), "utf-8")
    preprocess("mmc4", tmp_path / "docs_shard_0_v2.jsonl", tmp_path / "out", tokenizer=BYTES, max_bad_fraction=1)
    corpus = open_corpus(tmp_path / "out")
    assert [read_in_a_row(corpus, k) for k in range(len(corpus))] == [
        " ".join(json.loads(line)["text_list"]) for line in lines
    ]


def test_corpora_of_clip_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tokenizers.load("clip")
    now = mmc4(tmp_path, clip)
    shard = now.shard(0)
    texts = [shard.pieces(k, k + 1).tolist() for k in range(shard.num_pieces) if shard.modes[k] == 0]
    assert texts == 2 * clip.encode_batch(SENTENCES)
    monkeypatch.setattr(Mmc4Importer, "separator", "")
    assert contents(Path(now.path)) == contents(Path(mmc4(tmp_path, clip).path))


def test_rules_differ_only_where_documents_do(tmp_path: Path) -> None:
    recipes = [mmc4(tmp_path, tokenizer).manifest["recipe"] for tokenizer in (TOKENIZER, tokenizers.load("clip"))]
    assert [recipe.get("rules") for recipe in recipes] == [4, 2]


def test_the_tokenizer_is_trained_on_what_it_will_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def train(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        seen.extend(texts)
        return TOKENIZER

    monkeypatch.setattr(train_tokenizer, "train_sentencepiece", train)
    blank = (Text(" "), *MATCHED.texts[:1], Text("\n"), *MATCHED.texts[1:], Text("\n\n"))
    writers.write_mmc4([Document(blank)] * 2, tmp_path / "in", tmp_path / "images")
    preprocess("mmc4", tmp_path / "in", tmp_path / "out", limit=1)
    read = " ".join(SENTENCES).replace(" and", "\nand")
    assert "".join(seen) == read_in_a_row(open_corpus(tmp_path / "out"), 0) == read


def write_lists(folder: Path, document: Document, format: str) -> Path:
    """Without the file of the image."""
    writers.write_parquet([document], folder / "in", folder / "images", format == "omnicorpus")
    next((folder / "images").iterdir()).unlink()
    return folder / "in"


def write_tar(folder: Path, document: Document, format: str) -> Path:
    """Without the TIFF of the image."""
    images, texts = writers._lists(document)
    (folder / "in").mkdir()
    with tarfile.open(folder / "in/00000.tar", "w") as archive:
        writers._add(archive, "000000.json", json.dumps({"texts": texts, "images": images}).encode())
    return folder / "in"


def write_page(folder: Path, document: Document, format: str) -> Path:
    """With a damaged image, and one that stays."""
    (folder / "in").mkdir()
    (folder / "in/bad.png").write_bytes(picture(1, 80, 80)[:-100])
    (folder / "in/good.png").write_bytes(picture(2, 80, 80))
    first, second = (text.text for text in document.texts)
    html = f'<p>{first}</p><img src="bad.png"/>\n\n<p>{second}</p><img src="good.png"/>'
    (folder / f"in/a.{'md' if format == 'markdown' else 'html'}").write_text(html)
    return folder / "in"


def write_lines(folder: Path, document: Document, format: str) -> Path:
    writers.write_jsonl([document], folder / "in")
    (folder / "in" / writers.name_of(document.images[0])).unlink()
    return folder / "in"


@pytest.mark.parametrize(
    ("format", "write", "between"),
    [
        ("obelics", write_lists, "\n\n"), ("omnicorpus", write_lists, " "), ("mint1t", write_tar, " "),
        ("html", write_page, "\n"), ("markdown", write_page, "\n"), ("jsonl", write_lines, ""),
    ],
)  # fmt: skip
def test_texts_whose_image_is_lost(
    tmp_path: Path, format: str, write: Callable[[Path, Document, str], Path], between: str
) -> None:
    document = Document((Text("First paragraph."), Image(picture(0)), Text("and the second")))
    source = write(tmp_path, document, format)
    images = tmp_path / "images" if write is write_lists else None
    preprocess(format, source, tmp_path / "out", images=images, tokenizer=TOKENIZER, max_bad_fraction=1)
    assert read_in_a_row(open_corpus(tmp_path / "out"), 0) == f"First paragraph.{between}and the second"


def test_white_space_that_is_there_is_enough() -> None:
    image = Image(b"")
    texts = ["a", "", "b ", "c", image, "\nd", "\u3000", image, image, "e\u3000", "f", "g"]
    document = Document(tuple(Text(item) if isinstance(item, str) else item for item in texts), "name", {"id": "x"})
    expected = ["a", "", "--b ", "c", image, "\nd", "\u3000", image, image, "\u3000e\u3000", "f", "--g"]
    found = separated(document, "--")
    assert [item.text if isinstance(item, Text) else item for item in found.items] == expected
    assert (found.name, found.metadata) == ("name", {"id": "x"})
    without_blank = Document(tuple(item for item in document.items if not isinstance(item, Text) or item.text.strip()))
    assert separated(without_blank, "") == without_blank
    (again,) = spaced([without_blank], "--")  # the expectation of other tests, written independently
    assert again.items == separated(without_blank, "--").items


@given(st.lists(st.one_of(st.text(" \n\u3000ab."), st.just(None))), st.sampled_from(["", " ", "\n\n"]))
def test_white_space_between_texts_is_not_lost(pieces: list[str | None], separator: str) -> None:
    """Of two texts that meet without white space, the blank ones between them; images play no part."""
    document = Document(tuple(Image(b"") if text is None else Text(text) for text in pieces), kind="natural")
    found = separated(document, separator, "pairs")
    texts = [text for text in pieces if text is not None]
    expected = texts[:]
    last = None
    for k, text in enumerate(texts):
        if text.strip():
            if last is not None and not re.search(r"\s", texts[last][-1] + text[0]):
                expected[k] = ("".join(texts[last + 1 : k]) or separator) + text
            last = k
    assert [text.text for text in found.texts] == expected
    captions = Document(document.items, kind="captions")
    assert separated(captions, "") == captions
    assert separated(Document(document.items), "", "pairs").items == document.items


@pytest.mark.parametrize("image", [[], [{"image": "a.png"}]], ids=["texts only", "with an image"])
def test_blank_texts_of_jsonl_stand_between_words(tmp_path: Path, image: list[dict[str, str]]) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    lines: list[list[str]] = [["first words", " ", "second words"], ["first paragraph.", "\n\n", "second paragraph."]]
    items = [[*image, *({"text": text} for text in texts)] for texts in lines]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"items": line}) for line in items))
    found = []
    for tokenizer in (BYTES, tokenizers.load("clip")):
        summary = preprocess("jsonl", tmp_path / "a.jsonl", tmp_path / str(len(found)), tokenizer=tokenizer)
        corpus = open_corpus(summary.path)
        found.append(([read_in_a_row(corpus, k) for k in range(2)], corpus.manifest["recipe"].get("rules")))
        assert corpus.manifest["drops"]["left_out"] == {"text: blank": 2}
    assert found[0] == (["".join(texts) for texts in lines], 3)
    assert found[1] == (["first words second words", "first paragraph . second paragraph ."], 2)  # as before


def test_tokenizers_that_separate_texts_themselves() -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["The quick brown fox jumps over the lazy dog. " * 20]), model_writer=model,
        vocab_size=330, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    with_prefix = SentencePieceTokenizer(model.getvalue())  # as Llama 2's
    assert with_prefix.decode(with_prefix.encode("x.") + with_prefix.encode("and")) == "x. and"
    found = [tokenizer.separates_texts for tokenizer in (with_prefix, tokenizers.load("clip"), TOKENIZER, BYTES)]
    assert found == [True, True, False, False]
