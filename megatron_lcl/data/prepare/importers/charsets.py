"""Which characters the bytes of a page are, as browsers read them (WHATWG Encoding Standard and HTML standard).

Pages are mostly in more than the charset that they declare: gb2312 is GBK, iso-8859-1 is windows-1252. So a label means
the largest of its kin, by the codecs of Python.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # which begins as the next one does
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
)
_READ_AS = {
    **dict.fromkeys(("ascii", "iso8859-1", "cp1252"), "cp1252"),
    **dict.fromkeys(("iso8859-9", "cp1254"), "cp1254"),
    **dict.fromkeys(("iso8859-11", "tis-620", "cp874"), "cp874"),
    **dict.fromkeys(("gb2312", "gbk", "gb18030"), "gb18030"),
    **dict.fromkeys(("shift_jis", "cp932"), "cp932"),
    **dict.fromkeys(("euc_kr", "cp949"), "cp949"),
    **dict.fromkeys(("big5", "cp950", "big5hkscs"), "big5hkscs"),
    **dict.fromkeys(("utf-8", "utf-16", "utf-16-le", "utf-16-be"), "utf-8"),  # who reads the label reads no UTF-16
    "iso2022_jp": "iso2022_jp_ext",
    **{name: name for name in ("euc_jp", "koi8-r", "koi8-u", "cp866", "mac-roman", "mac-cyrillic")},
    **{f"cp{number}": f"cp{number}" for number in (1250, 1251, 1253, 1255, 1256, 1257, 1258)},
    **{f"iso8859-{part}": f"iso8859-{part}" for part in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)},
    # which browsers do not read, and mail and old editors wrote
    **{
        f"cp{number}": f"cp{number}"
        for number in (437, 737, 775, 850, 852, 855, 857, 858, 860, 861, 862, 863, 864, 865)
    },
    **{name: name for name in ("johab", "ptcp154", "hp-roman8", "kz1048", "koi8-t", "mac-greek", "mac-latin2")},
}
"""a codec as Python calls it → the one to decode with; what is not here, as UTF-7, is no charset of pages"""
_LABELS = {
    "windows-874": "cp874", "dos-874": "cp874", "windows-31j": "cp932", "windows-949": "cp949", "cn-big5": "big5",
    "gb_2312": "gbk", "gb_2312-80": "gbk", "csgb2312": "gbk", "ksc_5601": "cp949", "ks_c_5601-1989": "cp949",
    "cseuckr": "cp949", "csksc56011987": "cp949", "iso-ir-149": "cp949", "iso-8859-8-i": "iso8859-8",
    "iso-8859-8-e": "iso8859-8", "logical": "iso8859-8", "visual": "iso8859-8", "iso-8859-6-i": "iso8859-6",
    "iso-8859-6-e": "iso8859-6", "koi": "koi8-r", "koi8": "koi8-r", "mac": "mac-roman", "mac-ukrainian": "mac-cyrillic",
    "unicode-1-1-utf-8": "utf-8", "user-defined": "cp1252",
}  # fmt: skip
"""those of the standard that Python does not know, without `x-`"""
_META = rb"<meta[\s/]((?:[^>\"']|\"[^\"]{0,1024}\"|'[^']{0,1024}'){0,1024})"
_TAGS = re.compile(rb"<!--(?:-?>|.*?-->|.*)|" + _META, re.DOTALL | re.IGNORECASE)
_TAGS_ANYWHERE = re.compile(_META, re.IGNORECASE)
_ATTRIBUTE = re.compile(rb"(?<![a-z-])([a-z-]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+))", re.IGNORECASE)
_IN_CONTENT = re.compile(rb"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)
_IN_XML = re.compile(rb"\s*<\?xml[^>]{0,256}?\sencoding\s*=\s*[\"']([^\"']{1,64})", re.IGNORECASE)
_PAIRS = frozenset(("gb18030", "cp932", "cp949", "big5hkscs", "euc_jp"))
"""codecs in which a character is a lead byte with another byte, mostly"""
_BIG5_SIGNS = str.maketrans("•､‾∼♁☉¥¢£", "‧﹑¯～⊕⊙￥￠￡")
"""of Hong Kong's table → of the standard's and Windows'"""
_AS_BROWSERS = "megatron_lcl.as_browsers"


def text_of(raw: bytes) -> tuple[str, list[str]]:
    """(characters, what to note of them) of bytes in UTF-8, or in UTF-16 if they begin with its mark, which goes."""
    mark, codec = mark_of(raw)
    return _decoded(raw[len(mark) :], codec)


def text_of_page(raw: bytes) -> tuple[str, list[str]]:
    """The same of an HTML or XHTML page, in whatever charset it is.

    That is what its mark says, else UTF-8 if it is that, else what it declares. If it declares nothing it is
    windows-1252, unless most of what is not ASCII is UTF-8 still.
    """
    text, noted = text_of(raw)
    if mark_of(raw)[0] or not (noted or b"\x1b" in raw):
        return text, noted
    codec = _declared(raw)
    if not noted:  # all of it is ASCII, of which ISO-2022-JP makes its characters
        return _decoded(raw, codec) if codec == "iso2022_jp_ext" else (text, noted)
    if codec is not None:
        return _decoded(raw, codec)
    num_replaced = text.count("\ufffd")
    if 2 * num_replaced < len(text) - len(text.encode("ascii", "ignore")):
        return text, noted
    text, noted = _decoded(raw, "cp1252")
    return text, ["no known charset is declared, read as cp1252", *noted]


def mark_of(raw: bytes) -> tuple[bytes, str]:
    """(byte order mark, the codec that it says); without one (b"", "utf-8")."""
    return next((known for known in _MARKS if raw.startswith(known[0])), (b"", "utf-8"))


def _decoded(raw: bytes, codec: str) -> tuple[str, list[str]]:
    noted = []
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError:
        text = raw.decode(codec, _AS_BROWSERS if codec in _PAIRS else "replace")
        if "\ufffd" in text:
            noted = [invalid(codec)]
    return text.translate(_BIG5_SIGNS) if codec == "big5hkscs" else text, noted


def invalid(codec: str) -> str:
    """What is noted where bytes are no characters of a codec, by its name in Python."""
    return f"invalid {codec.upper() if codec.startswith('utf') else codec} replaced"


def _declared(raw: bytes) -> str | None:
    """The codec of the charset that a page declares; None where it declares none that browsers know."""
    return next(filter(None, map(_codec, _labels(raw))), None)


def _labels(raw: bytes) -> Iterator[bytes]:
    yield from _labels_of_tags(_TAGS.finditer(raw))
    if declaration := _IN_XML.match(raw):
        yield declaration[1]
    yield from _labels_of_tags(_TAGS_ANYWHERE.finditer(raw))  # behind a comment that only a script has begun, say


def _labels_of_tags(tags: Iterator[re.Match[bytes]]) -> Iterator[bytes]:
    for tag in tags:
        found = {name.lower(): b"".join(values) for name, *values in _ATTRIBUTE.findall(tag[1] or b"")}
        if b"charset" in found:
            yield found[b"charset"]
        elif found.get(b"http-equiv", b"").lower() == b"content-type":
            yield from _IN_CONTENT.findall(found.get(b"content", b""))


def _codec(label: bytes) -> str | None:
    name = label.decode("latin-1").strip().lower().removeprefix("x-").removeprefix("x-")
    name = re.sub(r"^iso8859(?=\d)", "iso-8859-", name)
    try:
        return _READ_AS.get(codecs.lookup(_LABELS.get(name, name)).name)
    except (LookupError, ValueError):
        return None


def _as_browsers(error: UnicodeError) -> tuple[str, int]:
    """For codecs of pairs: a pair that is no character is one fault. Python takes its lead byte alone for it, and then
    tears all pairs behind it apart. An ASCII byte behind a lead byte stays."""
    assert isinstance(error, UnicodeDecodeError)
    pair = error.object[error.start : error.start + 2]
    if not (len(pair) == 2 and 0x81 <= pair[0] <= 0xFE and pair[1] > 0x7F):
        return "\ufffd", error.start + 1
    windows = "cp950"  # which has the euro, where Big5 of Hong Kong has nothing
    if error.encoding == "euc_jp" and min(pair) > 0xA0:  # signs of NEC and IBM, which Windows' charset has, too
        row, cell = pair[0] - 0xA0, pair[1] - 0xA0
        lead, trail = (row - 1) // 2 + (0x81 if row < 63 else 0xC1), cell + (0x3F + (cell > 63) if row % 2 else 0x9E)
        pair, windows = bytes((lead, trail)), "cp932"
    elif error.encoding != "big5hkscs":
        return "\ufffd", error.start + 2
    try:
        return pair.decode(windows), error.start + 2
    except UnicodeDecodeError:
        return "\ufffd", error.start + 2


codecs.register_error(_AS_BROWSERS, _as_browsers)
