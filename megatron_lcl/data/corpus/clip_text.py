"""CLIP's words of a text: how it is cleaned and split before the byte-pair encoding (Radford et al. 2021)."""

from __future__ import annotations

import html
import re
import unicodedata

import regex

_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_ASCII_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+")  # the same for lower-case ASCII, faster
_QUOTES = str.maketrans(dict.fromkeys("ʼ‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))
# Characters that ftfy or HTML-unescaping may change by themselves: entities, controls, odd line ends, ligatures, full
# and half widths, surrogates, byte-order and interlinear marks.
_UNCLEAN = re.compile(
    "[&\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u2028-\u202e\u2066-\u206f\u3000"
    "\ud800-\udfff\ufb00-\ufb06\ufe00-\ufe0f\ufeff\uff00-\uffff]"
)
_LEVELS = 16
_NESTED = re.compile(r"&(?:(?:amp|AMP|#0{0,20}38|#[xX]0{0,20}26);){%d,}" % (_LEVELS + 1))  # noqa: UP031
"""ampersands escaped again and again: each level is `amp;` or the character's number, as ftfy reads them"""
_LONG_NUMBER = re.compile("(?<=&#)[0-9]{9,}")


def clip_words(text: str) -> list[str]:
    """The words of a text, cleaned, each of which is encoded alone."""
    text = clip_clean(text)
    return (_ASCII_WORDS if text.isascii() else _WORDS).findall(text)


def clip_clean(text: str) -> str:
    """What the reference does before splitting: `ftfy.fix_text`, HTML-unescaping twice, white space, lower case."""
    if not text.isascii() or _UNCLEAN.search(text):
        import ftfy

        # ftfy looks at lines, and splits longer ones
        bad = len(text) > 1_000_000 or any(map(ftfy.is_bad, text.splitlines(keepends=True)))
        if bad or _UNCLEAN.search(text) or not unicodedata.is_normalized("NFC", text):
            text = _unescape(_unescape(ftfy.fix_text(_less_nested(text))))
        else:
            text = text.translate(_QUOTES)
    return " ".join(text.split()).lower()


def _unescape(text: str) -> str:
    """As `html.unescape`, also of character references with more digits than Python makes a number of.

    Eight digits without leading zeros are no character, as are more.
    """
    return html.unescape(_LONG_NUMBER.sub(lambda digits: digits[0].lstrip("0")[:8] or "0", text))


def _less_nested(text: str) -> str:
    """A text of which ftfy makes the same: it undoes one level of escaped ampersands at a time, each in all of a line.

    Some levels stay, so that what stands beside them is mended in as many steps; only beside a text that was decoded
    wrongly more than once can that differ. ftfy undoes none from the first line on that has a "<".
    """
    tag = text.find("<")
    end = len(text) if tag < 0 else text.rfind("\n", 0, tag) + 1
    return _NESTED.sub("&" + "amp;" * _LEVELS, text[:end]) + text[end:]
