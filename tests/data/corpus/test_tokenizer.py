"""Protects token ids: the same as those of the reference's tokenizer; texts survive encoding and decoding."""

from __future__ import annotations

import html
import json
import pickle
import random
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
from data.helpers import byte_level
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.clip_text import clip_clean
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece

CLIP = tokenizers.load("clip")


@pytest.fixture(scope="module")
def open_clip() -> Any:
    """Its module of tokenizers: imported here, and not by every process of the tests."""
    return pytest.importorskip("open_clip.tokenizer")


@pytest.fixture(scope="module")
def reference(open_clip: Any) -> Any:
    """The reference's tokenizer."""
    return open_clip.SimpleTokenizer(additional_special_tokens=["<img_placehold>", "<start_of_img>", "<end_of_img>"])


def names_a_special_token(text: str) -> bool:
    """There alone the reference differs, on purpose: it encodes such a string as the special token."""
    return any(token in clip_clean(text) for token in tokenizers.SPECIAL_TOKENS)


# what ftfy, HTML-unescaping, lower-casing and Unicode classes act on
FRAGMENTS = [
    "'s", "'LL", "'ſ", "’s", "â€™", "Ã©", "&amp;amp;", "&amp;amp;amp;amp;lt;",
    "&lt;", "é", "e\u0301", "ﬁ", "İ", "ß", "ΣΑΣ", "Ⅷ", "½", "漢字", "ｆｕｌｌ",
    "\u200b", "\xad", "\xa0", "\u3000", "\r\n", "\t", "“hi”", "…", "—", "😀",
    "👩‍👩‍👧", "٣", "ก็", "a", " ", "  ", "1", "23", "<b>", "_", "-", "\x1b[31m",
    "\ufeff", "Â", "Ñ", "â", "€", "œ", "™", "K", "\u2028", "ʼ", "ǆ", "\u0345",
    "\U0001f1e6", "\x85", "\x1c", "`", "ﾔ", "\u0130", "\U00018e3b", "ＡＢ", "ŉ",
    "«", "\ud7ff", "\n", "\nÃ ", "Â ", "Ã\n",
]  # fmt: skip


def test_special_ids_as_in_the_reference(reference: Any) -> None:
    ours = [CLIP.sot, CLIP.eot, CLIP.placeholder, CLIP.soi, CLIP.eoi]
    assert ours == [reference.encoder[t] for t in tokenizers.SPECIAL_TOKENS] == [49406, 49407, 49408, 49409, 49410]
    assert CLIP.vocab_size == reference.vocab_size == 49411


def test_real_texts(reference: Any, shared: Path) -> None:
    lines = (shared / "samples/mmc4/docs_no_face_shard_151_v3.jsonl").read_text("utf-8").splitlines()
    texts = [text for line in lines for text in json.loads(line)["text_list"]]
    assert len(texts) > 1000
    assert CLIP.encode_batch(texts) == [reference.encode(text) for text in texts]


@settings(max_examples=600)
@given(st.text(max_size=40))
def test_any_text_as_in_the_reference(reference: Any, text: str) -> None:
    assume(not names_a_special_token(text))
    assert CLIP.encode(text) == reference.encode(text)


@settings(max_examples=600)
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(codec="latin-1"), max_size=3)), max_size=8))
def test_awkward_text_as_in_the_reference(open_clip: Any, reference: Any, parts: list[str]) -> None:
    text = "".join(parts)
    assume(not names_a_special_token(text))
    assert clip_clean(text) == open_clip._clean_lower(text)
    assert CLIP.encode(text) == reference.encode(text)


AMPERSANDS = st.lists(st.sampled_from(["amp;", "AMP;", "#38;", "#x26;", "#0038;"]), max_size=12).map("".join)
DEEP = st.integers(17, 24).map("amp;".__mul__)
"""more levels of escaping than are left to ftfy"""
BEHIND = ["", "lt;", "#233;", "Atilde;", "copy;", "amp", " ", "<", "\n<"]


@settings(max_examples=200)
@given(AMPERSANDS, st.sampled_from(BEHIND), DEEP, st.sampled_from(BEHIND), st.sampled_from(FRAGMENTS))
def test_nested_ampersands_as_in_the_reference(first: str, tail: str, deep: str, end: str, fragment: str) -> None:
    text = f"{fragment}&{first}{tail}{fragment}&{deep}{end}"
    assert clip_clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


@pytest.mark.parametrize("level", ["amp;", "#38;", "#x0026;"])
def test_deeply_nested_ampersands_take_few_passes(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    unescape_html = ftfy.FIXERS["unescape_html"]
    monkeypatch.setitem(ftfy.FIXERS, "unescape_html", lambda line: passes.append(1) or unescape_html(line))
    assert clip_clean(f"a &{level * 1000}lt; b\n<") == "a < b <"
    assert len(passes) < 25


@pytest.mark.parametrize("between", ["", "amp;", "amp;" * 3])
def test_numbers_of_characters_longer_than_python_reads(between: str) -> None:
    for digits, character in (("1" * 4301, "\ufffd"), ("0" * 5000 + "65", "a"), ("0" * 5000, "\ufffd")):
        assert clip_clean(f"x &{between}#{digits}; y") == f"x {character} y"
        assert clip_clean(f"x &{between}#{digits} y") == f"x {character} y"
    assert clip_clean(f"&#x{'1' * 5000};") == "\ufffd"


def test_the_word_cache_is_bounded(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_MAX_WORDS", 50)
    clip = pickle.loads(pickle.dumps(CLIP))
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdef", k=rng.randint(1, 90))) for _ in range(300)]
    assert clip.encode_batch(texts) == [reference.encode(text) for text in texts]
    assert len(clip._words) <= 50


@pytest.mark.parametrize("special", tokenizers.SPECIAL_TOKENS)
def test_special_strings_are_text(special: str) -> None:
    sentencepiece = train_sentencepiece(["abc <start_of_text> de " * 50], 400)
    for tokenizer in (CLIP, sentencepiece):
        ids = tokenizer.encode(f"a {special} b")
        assert ids
        assert max(ids) < tokenizer.base_size
        assert tokenizer.decode([tokenizer.sot, *ids, tokenizer.eoi]).startswith("<start_of_text>a")
    assert sentencepiece.decode(sentencepiece.encode(f"a {special} b")) == f"a {special} b"


SENTENCEPIECE = train_sentencepiece(["The quick brown fox jumps over the lazy dog. " * 20], 400)
JSON = tokenizers.JsonTokenizer(byte_level().to_str().encode())


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_sentencepiece_loses_nothing(text: str) -> None:
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [CLIP, SENTENCEPIECE])
@pytest.mark.parametrize("texts", [[], ["a", "", "jumps over the dog"], ["quick brown " * 100, "", "\u00e9"]])
def test_ids_joined_as_apart(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> None:
    """SentencePiece gives short texts' ids as lists, long ones' as arrays."""
    apart = tokenizer.encode_batch(texts)
    joined, lengths = tokenizer.joined_encoder()(texts)
    assert lengths == [len(ids) for ids in apart]
    assert np.frombuffer(joined, np.int32).tolist() == [i for ids in apart for i in ids]


@pytest.mark.parametrize("tokenizer", [CLIP, SENTENCEPIECE, JSON])
def test_texts_are_several_and_ids_are_the_tokenizers(tokenizer: tokenizers.Tokenizer) -> None:
    assert tokenizer.encode_batch(text for text in ("a", "b")) == tokenizer.encode_batch(["a", "b"])
    with pytest.raises(ValueError, match=r"'a windmill' is one text.*\['a windmill'\]"):
        tokenizer.encode_batch("a windmill")
    for bad in (-1, tokenizer.vocab_size):
        for ids in ([*tokenizer.encode("a"), bad], [tokenizer.sot, bad], np.array([bad], np.int32)):
            with pytest.raises(ValueError, match=f"{bad}.*; the tokenizer's are 0 to {tokenizer.vocab_size - 1}"):
                tokenizer.decode(ids)
    with pytest.raises(TypeError):
        tokenizer.decode([0.5])  # type: ignore[list-item]


@pytest.mark.parametrize("tokenizer", [CLIP, SENTENCEPIECE])
@pytest.mark.parametrize("length", [1, 1000])
def test_lone_surrogates_are_not_encoded(tokenizer: tokenizers.Tokenizer, length: int) -> None:
    encode = tokenizer.joined_encoder()
    with pytest.raises(UnicodeEncodeError):
        encode(["a", "\ud800" + "b" * length])
    assert encode(["a"])[1] == [1]  # goes on


@pytest.mark.parametrize("tokenizer", [CLIP, SENTENCEPIECE])
def test_saved_and_loaded(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / tokenizer.file_name)
    for again in (tokenizers.load(tmp_path / tokenizer.file_name), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode("Hello, world") == tokenizer.encode("Hello, world")


def test_no_clip_package_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps open-clip-torch"):
        tokenizers.load("clip")


# --- tokenizer.json ----------------------------------------------------------------------------------------------


def test_any_tokenizer_json(tmp_path: Path) -> None:
    made = byte_level()
    made.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizers.load(tmp_path / "tokenizer.json")
    made.no_truncation()
    made.no_padding()
    texts = ["the quick dog", "", "  jumps\n\n", "\u6c34 \U0001f600", "x" * 5000]
    assert ours.encode_batch(texts) == [made.encode(text, add_special_tokens=False).ids for text in texts]
    joined, lengths = ours.joined_encoder()(texts)
    assert np.frombuffer(joined, np.int32).tolist() == [i for ids in ours.encode_batch(texts) for i in ids]
    assert lengths == [len(ids) for ids in ours.encode_batch(texts)]
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts
    assert ours.base_size == made.get_vocab_size() == 1 + max(made.get_vocab().values())
    assert ours.decode([ours.sot, *ours.encode("a"), ours.eoi]) == "<start_of_text>a<end_of_img>"
    ids = ours.encode("a<|endoftext|>b")  # is text
    assert made.token_to_id("<|endoftext|>") not in ids
    assert ours.decode(ids) == "a<|endoftext|>b"
    with pytest.raises(UnicodeEncodeError):
        ours.encode("\ud800")
    again = pickle.loads(pickle.dumps(ours))
    again.save(tmp_path / "copy.json")
    assert tokenizers.load(tmp_path / "copy.json").fingerprint == ours.fingerprint == again.fingerprint
    assert again.encode_batch(texts) == ours.encode_batch(texts)


def test_special_ids_lie_behind_all_of_a_tokenizer_json() -> None:
    """Also where its own have gaps, as those of some released models have before their added tokens."""
    content = json.loads(byte_level().to_str())
    (first,) = content["added_tokens"]
    for number, name in ((1000, "<a>"), (1500, "<b>")):
        content["model"]["vocab"][name] = number
        content["added_tokens"].append({**first, "id": number, "content": name})
    ours = tokenizers.JsonTokenizer(json.dumps(content).encode())
    assert len(ours._tokenizer.get_vocab()) < 400
    assert ours.base_size == 1501
    assert ours.decode([1500]) == "<b>"
    assert [ours.sot, ours.eot, ours.placeholder, ours.soi, ours.eoi] == list(range(1501, 1506))


def test_which_tokenizers_keep_texts(tmp_path: Path) -> None:
    from tokenizers import AddedToken, normalizers

    made = byte_level()
    assert tokenizers.JsonTokenizer(made.to_str().encode()).is_lossless
    made.normalizer = normalizers.Lowercase()
    assert not tokenizers.JsonTokenizer(made.to_str().encode()).is_lossless
    made = byte_level()
    made.add_tokens([AddedToken("[A]", special=False)])
    made.add_special_tokens([AddedToken("[S]", lstrip=True, rstrip=True)])  # to which no text is encoded
    assert tokenizers.JsonTokenizer(made.to_str().encode()).is_lossless
    made.add_tokens([AddedToken("[IMG]", lstrip=True, special=False)])
    greedy = tokenizers.JsonTokenizer(made.to_str().encode())
    assert greedy.decode(greedy.encode("see [IMG] here")) == "see[IMG] here"
    assert not greedy.is_lossless
    assert SENTENCEPIECE.is_lossless
    assert not CLIP.is_lossless


def test_added_tokens_of_several_spaces_keep_texts() -> None:
    """As Gemma's has: a space is U+2581 within, so that one which stands in a text becomes a space, and that is all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    space = "\u2581"
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), space, *"ab", 2 * space]
    made = Tokenizer(models.BPE({p: k for k, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", space)
    made.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens([AddedToken(2 * space, special=False, normalized=False)])
    ours = tokenizers.JsonTokenizer(made.to_str().encode())
    assert ours.decode(ours.encode("a  b \u00e9")) == "a  b \u00e9"
    assert ours.is_lossless


def test_files_that_are_no_tokenizer_json(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    no_decoder = byte_level()
    no_decoder.decoder = None
    for content, message in (
        (b"{}", "neither a tokenizer.json of Hugging Face's tokenizers nor one that megatron_lcl saved"),
        (b'{"model": 3}', "is no tokenizer.json that this release of tokenizers reads"),
        (Tokenizer(models.WordLevel({"a": 0})).to_str().encode(), "cannot encode every text"),
        (Tokenizer(models.BPE()).to_str().encode(), "has no vocabulary"),
        (no_decoder.to_str().encode(), "has no decoder"),
    ):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            tokenizers.load(tmp_path / "t.json")
        assert "\n" not in str(raised.value)
    (tmp_path / "corpus.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged, and does not name a tokenizer"):
        tokenizers.load(tmp_path)
