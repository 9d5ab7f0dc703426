"""Protects the ratios of the rules: by hand, and against the papers' definitions written out another way."""

from __future__ import annotations

import itertools
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl.curate.measures import (
    MEASURES,
    Measured,
    character_repetition_ratio,
    listed_ratio,
    punctuation_ratio,
    special_ratio,
    word_repetition_ratio,
    words_of,
)
from megatron_lcl.curate.names import has_any
from megatron_lcl.curate.settings import Settings, fields, rules_of

CHARACTERS = st.characters(max_codepoint=0x2FFF, exclude_categories=["Cn", "Cs"])  # Unicode's versions differ above
TEXTS = st.text(st.sampled_from("aAbB éÉßñ漢字1٣.,-’'\n\t\u2003🙂\u0301"), max_size=60) | st.text(
    CHARACTERS, max_size=40
)


def is_special(character: str) -> bool:
    return unicodedata.category(character)[0] not in "LM"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The quick, brown fox!", ["the", "quick", "brown", "fox"]),
        ("don't (stop) a-b 3D 42 -- ...", ["don't", "stop", "a-b", "d"]),
        ("Ein «Wort» über 100 %", ["ein", "wort", "über"]),
        ("漢字。漢字 🙂", ["漢字。漢字"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@given(TEXTS)
def test_words_are_what_white_space_separates_without_special_characters_at_the_ends(text: str) -> None:
    expected = []
    for piece in text.lower().split():
        letters = [k for k, character in enumerate(piece) if not is_special(character)]
        if letters:
            expected.append(piece[letters[0] : letters[-1] + 1])
    assert words_of(text) == expected


def test_special_characters_by_hand() -> None:
    assert special_ratio("ab 1") == pytest.approx(2 / 4)
    assert special_ratio("é, ü") == pytest.approx(2 / 4)
    assert special_ratio("") == 0


@given(TEXTS)
def test_special_characters(text: str) -> None:
    assert special_ratio(text) == pytest.approx(sum(map(is_special, text)) / len(text) if text else 0)


def test_repeated_characters_by_hand() -> None:
    # "abababab" has the runs of 2: ab 4 times, ba 3 times; √2 rounded down is 1, so the commonest one counts
    assert character_repetition_ratio("abababab", 2) == pytest.approx(4 / 7)
    assert character_repetition_ratio("abcdefghijk") == 0  # two runs of 10, each once
    assert character_repetition_ratio("too short") == 0
    assert character_repetition_ratio("-" * 20) == 1


@given(TEXTS, st.integers(1, 4))
def test_repeated_characters(text: str, n: int) -> None:
    """As OBELICS has it: of the sorted frequencies the first min(√different, different - those that are 1)."""
    runs = [text[i : i + n] for i in range(len(text) - n + 1)]
    frequencies = sorted((runs.count(run) for run in set(runs)), reverse=True)
    top = min(int(len(frequencies) ** 0.5), len(frequencies) - frequencies.count(1))
    expected = sum(frequencies[:top]) / len(runs) if runs else 0
    assert character_repetition_ratio(text, n) == pytest.approx(expected)


def test_repeated_words_by_hand() -> None:
    # runs of 2 of a b a b c: ab, ba, ab, bc; two of four stand twice
    assert word_repetition_ratio(["a", "b", "a", "b", "c"], 2) == pytest.approx(2 / 4)
    assert word_repetition_ratio(["a"] * 4) == 0
    assert word_repetition_ratio(["a"] * 6) == 1


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_repeated_words(words: list[str], n: int) -> None:
    runs = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    expected = sum(runs.count(run) > 1 for run in runs) / len(runs) if runs else 0
    assert word_repetition_ratio(words, n) == pytest.approx(expected)


@given(TEXTS | st.text(st.sampled_from("a_' .,!-"), max_size=40), st.sampled_from([0, 3, 12]))
def test_punctuation(text: str, least: int) -> None:
    """OBELICS' regular expression, character by character: a run of letters, digits, _ and ' is one, and each mark."""
    kinds = ["mark" if c in ",;:?!." else "word" if c.isalnum() or c in "_'" else "" for c in text]
    marks = kinds.count("mark")
    both = marks + sum(kind == "word" for kind, _ in itertools.groupby(kinds))
    expected = 0 if not both else 1 if both < least else marks / both
    assert punctuation_ratio(text, least) == pytest.approx(expected)


def test_letters_of_scripts_without_spaces_count_as_words() -> None:
    """Shares of words are still of what white space separates."""
    measured = Measured(lambda: "\u6f22\u5b57\u3002 \u4e00\u4e8c two 3", SimpleNamespace())
    assert [MEASURES[name](measured) for name in ("words", "plain_words")] == [5, 6]
    assert measured.words == ["\u6f22\u5b57", "\u4e00\u4e8c", "two"]


def test_shares_of_lists_and_names() -> None:
    assert listed_ratio(["the", "cat", "the"], {"the"}) == pytest.approx(2 / 3)
    assert listed_ratio([], {"the"}) == 0
    assert has_any("http://a.org/XXX-page", ["porn", "xxx"])
    assert not has_any("", ["xxx"])


def test_every_rule_has_its_measure() -> None:
    models = {"language": lambda text: 0.5, "perplexities": lambda texts: list(map(len, texts))}
    context = SimpleNamespace(stop_words={"thé"}, flagged_words={"b"}, **models)
    measured = Measured(lambda: "Thé b c", context, images=3, texts=2)
    found = {name: measure(measured) for name, measure in MEASURES.items()}
    assert found == {
        "words": 3, "plain_words": 3, "characters": 7, "character_repetition": 0, "word_repetition": 0,
        "special": pytest.approx(2 / 7),
        "stop_words": pytest.approx(1 / 3), "flagged_words": pytest.approx(1 / 3), "punctuation": 1,
        "language": 0.5, "perplexity": 7, "images": 3, "texts": 2,
    }  # fmt: skip
    for section in ("text", "document"):
        for name in fields.fields_of(type(getattr(Settings(), section))):
            assert name in ("unsafe_names", "excluded_names") or name[4:] in MEASURES, name


def test_a_threshold_itself_stays() -> None:
    settings = fields.build(Settings, {"text": {"min_words": 3, "max_words": 5}})
    least, most = rules_of(settings, "text")
    assert [least.breaks(n) for n in (2, 3, 5, 6)] == [True, False, False, False]
    assert [most.breaks(n) for n in (2, 3, 5, 6)] == [False, False, False, True]
    assert not least.breaks(float("nan"))
