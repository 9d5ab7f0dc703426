"""What a word of a text is in scripts that are written without spaces between words: each letter is one.

Chinese, Japanese, Thai, Lao, Khmer and Burmese have white space between sentences or clauses at most, so that what it
separates, or a run of letters, is no word there, and two texts that differ in a letter of a clause differ in all of it.
To find their words takes a dictionary for each language; letters need none, and counts and shingles of them follow the
length and the content of a text as those of words do. Korean has spaces between its words, and is as other texts.

A mark (a vowel sign, a virama, an accent) belongs to the letter before it, which Python's `\\w` does not know.
"""

from __future__ import annotations

import re
import unicodedata

import regex

_LETTERS = (
    "\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"  # Han
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # kana
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46"  # Thai
    "\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"  # Lao
    "\u1780-\u17b3\u17d7\u17dc"  # Khmer
    "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065\u1066\u106e-\u1070\u1075-\u1081\u108e"  # Myanmar
    "\ua9e0-\ua9e4\ua9e6-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa76\uaa7a\uaa7e\uaa7f"
)
"""of these scripts, without the marks on them and their digits; numbers, as Unicode's tables grow with Python"""
_LETTER = re.compile(f"[{_LETTERS}]")
_BORDER = re.compile(rf"(?=[{_LETTERS}])|(?<=[{_LETTERS}])(?=\w)")
_RUN = re.compile(r"\w+")
_MARK = regex.compile(r"\p{M}")
_RUN_WITH_MARKS = r"[\p{L}\p{N}_][\p{L}\p{N}\p{M}_]*"
"""without marks the same as `_RUN`, which is twice as fast; not regex's own `\\w`, which lacks numbers such as ½"""
_MARKED = regex.compile(_RUN_WITH_MARKS)
_MARKED_SPACED = regex.compile(rf"[{_LETTERS}]\p{{M}}*|{_RUN_WITH_MARKS}")  # in half the speed


def spaced(text: str) -> str:
    """The text with a space before each letter of a script that is written without spaces, and after it where another
    letter or a digit follows: marks and punctuation stay with the letter. Any other text is returned as it is."""
    if text.isascii() or not _LETTER.search(text):  # which takes a twentieth of the time
        return text
    return _BORDER.sub(" ", text)


def split_words(text: str) -> list[str]:
    """Runs of letters with their marks, digits and `_` in NFC, in order: equal for texts that are canonically
    equivalent. Each letter of a script that is written without spaces is one by itself."""
    if text.isascii():
        return _RUN.findall(text)
    text = unicodedata.normalize("NFC", text)
    cut = spaced(text)
    if not _MARK.search(text):
        return _RUN.findall(cut)
    return (_MARKED if cut is text else _MARKED_SPACED).findall(cut)
