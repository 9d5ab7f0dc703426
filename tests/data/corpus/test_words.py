"""Protects what counts as a word in scripts that are written without spaces; other texts stay as they are."""

from __future__ import annotations

import re
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl.data.corpus.words import spaced, split_words

SHARED = "\u3006\u30fc\uff70\uff9e\uff9f"
"""of several scripts, as Unicode has them: signs of closing, of a long vowel, of voice"""
CHARACTERS = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cn"], exclude_characters=SHARED)
WITHOUT_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\u6f22\u5b57\u3002\u6f22\u5b57ab 12\u5e74", ["\u6f22", "\u5b57", "\u6f22", "\u5b57", "ab", "12", "\u5e74"]),
        ("\U00020000\u3005\u3042\u30c7\u30fc\uff71", ["\U00020000", "\u3005", "\u3042", "\u30c7", "\u30fc", "\uff71"]),
        (
            "\u0e01\u0e35\u0e48\u0e02 \u0e51\u0e52",
            ["\u0e01\u0e35\u0e48", "\u0e02", "\u0e51\u0e52"],
        ),  # a vowel and a tone on a letter
        ("\u0e17\u0e35\u0e481x", ["\u0e17\u0e35\u0e48", "1x"]),
        ("\u304b\u3099\u3042", ["\u304c", "\u3042"]),  # a voiced syllable as its two characters
        ("\u0e81\u0e82\u1780\u1781\u1000\u1001", ["\u0e81", "\u0e82", "\u1780", "\u1781", "\u1000", "\u1001"]),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"]),  # Hangul is written with spaces
        ("Don't, caf\u00e9 3D_x \u2013 \u0928\u092e", ["Don", "t", "caf\u00e9", "3D_x", "\u0928\u092e"]),
        (  # Hindi, Tamil, Bengali with conjuncts, vocalised Arabic and Hebrew
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092e\u0947\u0902"],
        ),
        ("\u0ba4\u0bae\u0bbf\u0bb4\u0bcd, \u0bae", ["\u0ba4\u0bae\u0bbf\u0bb4\u0bcd", "\u0bae"]),
        ("\u09ac\u09be\u0982\u09b2\u09be", ["\u09ac\u09be\u0982\u09b2\u09be"]),
        ("\u0633\u064e\u0644\u0627\u0645\u064c", ["\u0633\u064e\u0644\u0627\u0645\u064c"]),
        ("\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd", ["\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd"]),
        ("x\u0331_\u00bd q\u0303.\u2764\ufe0f", ["x\u0331_\u00bd", "q\u0303"]),  # a mark on no letter is none
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_punctuation_and_marks_are_no_words_between_spaces() -> None:
    assert spaced("\u6f22\u5b57\u3002\u6f22\uff01").split() == ["\u6f22", "\u5b57\u3002", "\u6f22\uff01"]
    assert spaced("\u0e01\u0e35\u0e48\u0e02").split() == ["\u0e01\u0e35\u0e48", "\u0e02"]


@given(st.text(CHARACTERS))
def test_all_other_texts_stay(text: str) -> None:
    if WITHOUT_SPACES.search(text):
        assert [c for c in spaced(text) if c != " "] == [c for c in text if c != " "]
    else:
        assert spaced(text) is text
        without_marks = regex.sub(r"\p{M}", "", unicodedata.normalize("NFC", text))
        assert split_words(without_marks) == re.findall(r"\w+", without_marks)


@given(st.text(CHARACTERS))
def test_words_are_those_of_canonically_equivalent_texts(text: str) -> None:
    words = split_words(text)
    assert words == split_words(unicodedata.normalize("NFC", text)) == split_words(unicodedata.normalize("NFD", text))
    one_by_one = [character for word in words for character in word]
    letters = regex.findall(r"[\p{L}\p{N}_]", unicodedata.normalize("NFC", text))
    assert [c for c in one_by_one if not regex.match(r"\p{M}", c)] == letters


def test_letters_are_those_of_the_scripts() -> None:
    """As Unicode has them."""
    letters = regex.compile(
        r"(?V1)[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}--[\p{M}\p{S}\p{P}\p{Nd}]]"
    )
    for code in (*range(0x0E00, 0x1100), *range(0x1780, 0x1800), *range(0x3000, 0xD800), *range(0xF900, 0xFFFF)):
        character = chr(code)
        if character.isalpha():
            expected = character in SHARED or bool(letters.match(character))
            assert (spaced(character) != character) == expected, hex(code)
