"""Protects what counts as a word in scripts that are written without spaces; other texts stay as they are."""

from __future__ import annotations

import re

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
            ["\u0e01", "\u0e02", "\u0e51\u0e52"],
        ),  # a vowel and a tone on a letter
        ("\u0e81\u0e82\u1780\u1781\u1000\u1001", ["\u0e81", "\u0e82", "\u1780", "\u1781", "\u1000", "\u1001"]),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"]),  # Hangul is written with spaces
        ("Don't, caf\u00e9 3D_x \u2013 \u0928\u092e", ["Don", "t", "caf\u00e9", "3D_x", "\u0928\u092e"]),
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
        assert split_words(text) == re.findall(r"\w+", text)


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
