"""Protects which characters the bytes of pages are: legacy charsets as browsers read them, nothing cut, what is
replaced noted."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import pytest
from data.helpers import documents_of, plain
from data.prepare.test_epub import IMAGES, write_book
from data.writers import picture

from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.importers.charsets import text_of, text_of_page

GUESSED = "no known charset is declared, read as cp1252"


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("iso-8859-1", "cp1252", "He said “it’s fine” – 5 € …"),
        ("ISO88591", "cp1252", "“Größe”"),
        ("us-ascii", "cp1252", "“Größe”"),
        ("x-user-defined", "cp1252", "“Größe”"),
        ("iso-8859-9", "cp1254", "İstanbul’da ğüş"),
        ("tis-620", "cp874", "ภาษาไทย “…”"),
        ("windows-874", "cp874", "ภาษาไทย “…”"),
        ("gb2312", "gbk", "朱镕基喆訪問"),
        ("GB_2312-80", "gb18030", "㐀𠀀朱镕基"),
        ("shift_jis", "cp932", "①髙橋～㈱日本語"),
        ("x-sjis", "cp932", "①髙橋"),
        ("euc-jp", "euc_jp", "日本語"),
        ("euc-kr", "cp949", "똠방각하 한국어"),
        ("ks_c_5601-1987", "cp949", "똠방각하"),
        ("big5", "cp950", "香港碁銹裏恒～‧€￡"),
        ("big5", "big5hkscs", "啲嘢係咁㗎"),
        ("x-x-big5", "cp950", "香港"),
        ("windows-1251", "cp1251", "Привет"),
        ("koi8-r", "koi8-r", "Привет"),
        ("x-mac-cyrillic", "mac-cyrillic", "Привет"),
        ("iso-8859-8-i", "iso8859-8", "שלום"),
        ("iso-2022-jp", "iso2022_jp", "日本語"),
    ],
)
def test_a_label_means_the_largest_of_its_kin(label: str, codec: str, text: str) -> None:
    for head in (f"<meta charset='{label}'>", f'<META http-equiv="Content-Type" content="text/html; charset={label}">'):
        page = f"<html><head>{head}</head><body><p>{text}</p> and the end"
        assert text_of_page(page.encode(codec)) == (page, [])


@pytest.mark.parametrize(
    ("codec", "raw", "text"),
    [
        ("iso-8859-1", b"a\x81\x93b", "a\ufffd“b"),  # a control character for browsers
        ("gb2312", b"\xd6\xd0\xff\xff\xd6\xd0\xff<p>\xce\xc4", "中\ufffd\ufffd中\ufffd<p>文"),
        ("gb2312", b"\xd6\xd0\xfe\xff\xd6\xd0\x84<p>\xce\xc4", "中\ufffd中\ufffd<p>文"),
        ("shift_jis", b"\x83\x41\xfc\xfb\x83\x41\x83\x42", "ア\ufffdアィ"),
        ("euc-jp", b"\xa4\xa2\xa9\xa1\xa4\xa4\xa4\xa6", "あ\ufffdいう"),
        ("utf-8", "Größe".encode() + b"\xe9" + "Größe".encode(), "Größe\ufffdGröße"),
    ],
)
def test_a_fault_costs_no_more_than_itself(codec: str, raw: bytes, text: str) -> None:
    head = f"<meta charset={codec}>"
    found, noted = text_of_page(head.encode() + raw + b"<p>the end")
    assert found == f"{head}{text}<p>the end"
    assert len(noted) == 1
    assert noted[0].startswith("invalid ")


def test_signs_of_windows_in_euc_jp() -> None:
    """Which the charset does not have, and pages do: ①, 髙."""
    assert text_of_page(b"<meta charset=euc-jp>\xa4\xa2\xad\xa1\xa4\xa4\xfc\xe2") == (
        "<meta charset=euc-jp>あ①い髙", []
    )  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "text", "noted"),
    [
        ("<p>Größe".encode("utf-16"), "<p>Größe", []),
        (b"\xfe\xff" + "<p>Größe".encode("utf-16-be"), "<p>Größe", []),
        ("<p>Größe".encode("utf-16") + b"x", "<p>Größe\ufffd", ["invalid UTF-16-LE replaced"]),
        ("<p>Größe".encode("utf-8-sig"), "<p>Größe", []),
        ("<meta charset=gb2312>Größe".encode(), "<meta charset=gb2312>Größe", []),  # it is UTF-8
        (b"<meta charset=utf-16>a\xe9", "<meta charset=utf-16>a\ufffd", ["invalid UTF-8 replaced"]),
        (b"<p>it\x92s \xe9t\xe9", "<p>it’s été", [GUESSED]),
        (b"<p>it\x92s \x81", "<p>it’s \ufffd", [GUESSED, "invalid cp1252 replaced"]),
        ("中文网页".encode()[:-1], "中文网\ufffd", ["invalid UTF-8 replaced"]),  # a page that was cut
        (b"<meta charset=none><meta charset=koi8-r>\xf0", "<meta charset=none><meta charset=koi8-r>П", []),
        (b"<meta charset=utf-7>\xe9", "<meta charset=utf-7>é", [GUESSED]),
        (
            b"<!--<meta charset=koi8-r>--><meta charset=cp1252>\xe9",
            "<!--<meta charset=koi8-r>--><meta charset=cp1252>é",
            [],
        ),
        (b"<body><meta charset=koi8-r>\xf0", "<body><meta charset=koi8-r>П", []),
        (b"<script>s='<!--'</script><meta charset=koi8-r>\xf0", "<script>s='<!--'</script><meta charset=koi8-r>П", []),
        (b"<!--><meta charset=koi8-r>\xf0<!-- -->", "<!--><meta charset=koi8-r>П<!-- -->", []),
        (b"<meta content='x > y' charset=koi8-r>\xf0", "<meta content='x > y' charset=koi8-r>П", []),
        (b"<meta charset=ibm850>\x84", "<meta charset=ibm850>ä", []),
        (b"<meta charset=johab>\xd0\x65", "<meta charset=johab>한", []),
        ("<p>Größe".encode("utf-32"), "<p>Größe", []),
        (b"<meta name=x content='charset=koi8-r'>\xe9", "<meta name=x content='charset=koi8-r'>é", [GUESSED]),
        (b'<?xml version="1.0" encoding="koi8-r"?>\xf0', '<?xml version="1.0" encoding="koi8-r"?>П', []),
        (b"", "", []),
    ],
)
def test_what_says_the_charset(raw: bytes, text: str, noted: list[str]) -> None:
    assert text_of_page(raw) == (text, noted)


def test_without_a_declaration_it_is_utf8() -> None:
    assert text_of("\ufeff# Größe".encode()) == ("# Größe", [])
    assert text_of("# Größe".encode("cp1252")) == ("# Gr\ufffd\ufffde", ["invalid UTF-8 replaced"])


@pytest.mark.timeout(30)
@pytest.mark.parametrize("part", [b"<!--", b"<meta ", b"<meta charset", b"<meta " + b"a" * 2000, b"<?xml "])
def test_markup_that_never_ends_takes_no_longer(part: bytes) -> None:
    start = time.process_time()
    text_of_page(b"\xff" + part * (400_000 // len(part)))
    assert time.process_time() - start < 2


def test_whole_pages_are_read(tmp_path: Path) -> None:
    for k, (label, codec, text) in enumerate([("gb2312", "gbk", "朱镕基"), ("euc-kr", "cp949", "똠방각하")]):
        page = f"<meta charset={label}><p>{text}</p><img src={k}.png><p>the end {k}"
        (tmp_path / f"{k}.html").write_bytes(page.encode(codec))
        (tmp_path / f"{k}.png").write_bytes(picture(k, 90, 80))
    (tmp_path / "2.html").write_bytes(b"<meta charset=utf-8>a\xe9<img src=0.png>the end")
    found, drops = documents_of(create("html", tmp_path, None, {}))
    assert [[text for text in row if isinstance(text, str)] for row in plain(found)] == [
        ["朱镕基", "the end 0"], ["똠방각하", "the end 1"], ["a\ufffd", "the end"],
    ]  # fmt: skip
    assert drops.noted_counts == {"document: invalid UTF-8 replaced": 1}
    assert drops.names["document: invalid UTF-8 replaced"] == ["2.html"]
    assert not drops.bad_counts
    assert not drops.left_out_counts


def test_a_page_of_a_book(tmp_path: Path) -> None:
    write_book(tmp_path / "whole.epub")
    with zipfile.ZipFile(tmp_path / "whole.epub") as whole, zipfile.ZipFile(tmp_path / "a.epub", "w") as book:
        for name in whole.namelist():
            data = whole.read(name).replace(b"utf-8", b"iso-8859-1").replace(b"Before", b"\x93Before\x94")
            book.writestr(name, data if name.endswith("one .xhtml") else whole.read(name))
    found, drops = documents_of(create("epub", tmp_path / "a.epub", None, {}))
    assert plain(found)[0] == ["One 0\n“Before” it.", (IMAGES[0], None, None), "After."]
    assert not drops.noted_counts
