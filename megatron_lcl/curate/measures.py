"""What the rules compare with their thresholds: pure functions of a text, an image or a document.

The ratios are those of OBELICS (arXiv 2306.16527, appendix A.2; huggingface/OBELICS, web_document_filtering.py), which
has them from ROOTS (arXiv 2303.03915). Special characters are all but letters and the marks on them, by their Unicode
category; OBELICS lists them one by one, and both agree on what is printed of ASCII.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import regex

from megatron_lcl.data.corpus.words import spaced

if TYPE_CHECKING:
    from megatron_lcl.curate.languages import Context

CHARACTERS_IN_RUN, WORDS_IN_RUN = 10, 5
"""character_repetition_length and word_repetition_length of OBELICS"""
LEAST_FOR_PUNCTUATION = 12
"""min_number_words_to_check_punctuation_ratio_node_level of OBELICS"""
_MARKS = ",;:?!."
_WORDS_AND_MARKS = re.compile(rf"[\w']+|[{_MARKS}]")
_BASE = np.uint64(0x9E3779B97F4A7C15)
"""of hashes: odd, and as good as random"""
_SPECIAL_ASCII = bytes(set(range(128)) - set(string.ascii_letters.encode()))
_LETTERS = regex.compile(r"[\p{L}\p{M}]+")
_WORD = regex.compile(r"[\p{L}\p{M}](?:.*[\p{L}\p{M}])?", regex.DOTALL)
_ASCII_STRIP = _SPECIAL_ASCII.decode()


def words_of(text: str) -> list[str]:
    """Its words in lower case: what stands between white space, without special characters at both ends, if letters
    are left."""
    pieces = text.lower().split()
    if text.isascii():
        return [word for piece in pieces if (word := piece.strip(_ASCII_STRIP))]
    found = map(_WORD.search, pieces)
    return [match.group() for match in found if match]


def special_ratio(text: str) -> float:
    """Share of characters that are no letters: digits, punctuation, symbols, white space."""
    if not text:
        return 0.0
    if text.isascii():
        return 1 - len(text.encode().translate(None, _SPECIAL_ASCII)) / len(text)
    return 1 - sum(map(len, _LETTERS.findall(text))) / len(text)


def character_repetition_ratio(text: str, n: int = CHARACTERS_IN_RUN) -> float:
    """Of all runs of n characters, the share of the commonest: the √(different runs) most frequent that stand twice or
    more often. 0 for a text that is shorter."""
    total = len(text) - n + 1
    if total <= 0:
        return 0.0
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes = np.zeros(total, np.uint64)
    for k in range(n):  # of each run a polynomial modulo 2^64
        hashes *= _BASE
        hashes += codes[k : k + total]
    counts = np.unique(hashes, return_counts=True)[1]
    repeated = np.sort(counts[counts > 1])[::-1]
    return int(repeated[: math.isqrt(len(counts))].sum()) / total


def word_repetition_ratio(words: Sequence[str], n: int = WORDS_IN_RUN) -> float:
    """Of all runs of n words, the share of those that stand twice or more often; 0 for fewer words."""
    total = len(words) - n + 1
    if total <= 0:
        return 0.0
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
    return (total - list(counts).count(1)) / total


def listed_ratio(words: Sequence[str], listed: Collection[str]) -> float:
    """Share of the words that are in a list; 0 where there are none."""
    return sum(map(listed.__contains__, words)) / len(words) if words else 0.0


def punctuation_ratio(text: str, least: int = 0) -> float:
    """Of the words (letters, digits, _ and ') and the marks , ; : ? ! . of a text the share of the marks; 1 where there
    are fewer than `least` of both, so that it says nothing, and 0 where there are none."""
    found = _WORDS_AND_MARKS.findall(text)
    if 0 < len(found) < least:
        return 1.0
    return sum(map(_MARKS.__contains__, found)) / len(found) if found else 0.0


class Measured:
    """A text that is measured, or a document: all its texts as one, how many texts and images, and its name."""

    def __init__(
        self,
        read: Callable[[], str],
        context: Context,
        images: int = 0,
        texts: int = 1,
        name: str = "",
        is_document: bool = False,
    ) -> None:
        """read: gives the text; it is called at most once, when a rule first asks for it."""
        self._read, self.context = read, context
        self.images, self.texts, self.name, self.is_document = images, texts, name, is_document

    @cached_property
    def text(self) -> str:
        return self._read()

    @cached_property
    def words(self) -> list[str]:
        return words_of(self.text)

    @property
    def num_words(self) -> int:
        """Where a script has no spaces each letter is one: shares of words, which lists and runs of five are about,
        are of what white space separates in any script."""
        text = spaced(self.text)
        return len(self.words if text is self.text else words_of(text))

    @cached_property
    def perplexity(self) -> float:
        """Set from outside where many are judged at once."""
        return self.context.perplexities([self.text])[0]


MEASURES: dict[str, Callable[[Measured], float]] = {
    "words": lambda m: m.num_words,
    "plain_words": lambda m: len(spaced(m.text).split()),
    "characters": lambda m: len(m.text),
    "character_repetition": lambda m: character_repetition_ratio(m.text),
    "word_repetition": lambda m: word_repetition_ratio(m.words),
    "special": lambda m: special_ratio(m.text),
    "stop_words": lambda m: listed_ratio(m.words, m.context.stop_words),
    "flagged_words": lambda m: listed_ratio(m.words, m.context.flagged_words),
    "punctuation": lambda m: punctuation_ratio(m.text, 0 if m.is_document else LEAST_FOR_PUNCTUATION),
    "language": lambda m: m.context.language(m.text),
    "perplexity": lambda m: m.perplexity,
    "images": lambda m: m.images,
    "texts": lambda m: m.texts,
}
"""of texts and documents, by the name of their fields without `min_` or `max_`"""
