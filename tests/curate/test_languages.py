"""Protects languages and lists of words: by lingua, by a fastText model of the user's, from files."""

from __future__ import annotations

import base64
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lcl.curate.languages import language_score, libraries, read_words, stop_words
from megatron_lcl.curate.settings import Language, Lists, as_recipe, read_settings
from megatron_lcl.errors import UserError

ENGLISH = "The birds sing in the green tree\nwhile the water runs past an old mill"
GERMAN = "Die Vögel singen im grünen Baum,\nwährend das Wasser an der alten Mühle vorbeifließt"
MODEL = (
    "{Wp48S^xk9=GL@E0stWa8~^|S5YJf5-~>_vrCk7B1%;E?-"
    "|IyruG>;WuddTrYxgH^2};~2R<SQONL>*whNf}{X8;9bzseL085c3t5*?8pwSrr}m{Cb#4mPYv9rn;~0>9pto``e-Vg~@av<2L^SFUG%TF-Pj`"
    "!oZRCZ8bn^>v#f%&@zRj@bW+xglCxP-"
    "o=3i&_QSpdGv+`D?A0yvbEqvKSr~QvFnvOv&v5P6HkvdHhk|H+bV~2vb&pa=t!mx>^gS&s9#A8a4<x5Dz$On?Q27?)$b){ZFRME6@Oe1(%qx-A"
    "RJU>Cd}fQ%`M*JlIJnO`vO|*t~P*eK%Hu=(QH^Mk(~dm)5hv>w^u#C&@;>jp52ZDnM^w`{Ylbn!{B%M)R@YY~W&3N?*t(iHlY<VK6(xtj$#e|2"
    "STOz%_btJ_`PEIr5ca9|;M#^RK3Oiw}w<)<Gbu5&%~g0?EEKkNe)wZpl`U|MgXn7%0Wpga-EqKOXHDPZ*UWQQ~F9nCH+N6e`i9Ydy*ow>^vOYk"
    "#nia+W(Wn2K}c5E<DX;s8n;%2H6E5k**V?w^0`EabA_$_gm4i+~cWTzp51@@VWYVyXS*3ldL-"
    "(_PgRiOMRcUpX<iP5nvuGhZQWJB4c?fFQBM2_=<jXHPlt%}phg)POLYYqiE0GsivdMW6{ow1f^LfuBShCSBQ4eD8E#-"
    "rM0PlEl#HB{pHMKw=iQLrVg~Za#!d1~k{H;H{P$=yL!y-"
    "1@_pq=M^GeU`{c<pLR4_lkI|%x?nh53UWe9s=pF5IoS0hziHB=OQgZWO4uLV|@QE^uMI%z>Q|@&YD}-"
    "g1ZI__a=YFM)nJjqg`c_4N>(oppCCw@kb`nFW|Lt!!Vs#LVVII*i1Sv#87w-"
    "BCE7~t3W$}VG|xMbR^jx00000()=)s<4lg~00F@T(+B_nbJ6qbvBYQl0ssI200dcD"
)
"""a fastText model of the words of two sentences, one English and one German (supervised, dim 2, no n-grams)"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    if sys.version_info >= (3, 14):  # for which the extra does not install it
        pytest.importorskip("fasttext", reason="fasttext-predict has no wheel for this Python")
    (tmp_path / "two.bin").write_bytes(lzma.decompress(base64.b85decode(MODEL)))
    return tmp_path / "two.bin"


def test_a_fasttext_model(model: Path) -> None:
    of_english = language_score(Language(model=str(model)))
    of_german = language_score(Language(wanted=("de",), model=str(model)))
    of_both = language_score(Language(wanted=("de", "en"), model=str(model)))
    assert (of_english(ENGLISH) > 0.9, of_english(GERMAN)) == (True, 0)
    assert (of_german(GERMAN) > 0.9, of_german(ENGLISH)) == (True, 0)
    assert min(of_both(ENGLISH), of_both(GERMAN)) > 0.9


def test_the_beginning_of_a_text_is_judged(model: Path) -> None:
    first = language_score(Language(model=str(model), characters=len(ENGLISH)))
    assert first(ENGLISH + GERMAN * 9) > 0.9
    assert language_score(Language(model=str(model)))(ENGLISH + GERMAN * 9) == 0


def test_a_model_is_known_by_its_content(model: Path, tmp_path: Path) -> None:
    def recipe_of(path: Path) -> dict[str, Any]:
        return as_recipe(read_settings(overrides={"text.min_language": "0.5", "language.model": str(path)}))

    recipe = recipe_of(model)
    (tmp_path / "other.bin").write_bytes(model.read_bytes())
    assert recipe == recipe_of(tmp_path / "other.bin")
    (tmp_path / "other.bin").write_bytes(b"no model")
    with pytest.raises(UserError, match="is no fastText model"):
        language_score(Language(model=str(tmp_path / "other.bin")))
    assert recipe != recipe_of(tmp_path / "other.bin")


@pytest.mark.parametrize(
    ("rule", "file"),
    [
        ("text.min_stop_words", "lists.stop_words"),
        ("text.max_flagged_words", "lists.flagged_words"),
        ("document.excluded_names", "document.excluded_names"),
    ],
)
def test_a_list_is_known_by_its_content(rule: str, file: str, tmp_path: Path) -> None:
    recipes = []
    for content in ("one\n", "other\n"):
        (tmp_path / "a.txt").write_text(content)
        recipes.append(as_recipe(read_settings(overrides={rule: "0.5", file: str(tmp_path / "a.txt")})))
    assert recipes[0] != recipes[1]


def test_packages_on_which_a_result_depends() -> None:
    """Of another release a package may find another language, or have other words."""
    rules = {"min_stop_words", "min_language", "max_perplexity"}
    used = libraries(rules, Language(), Lists())
    assert used.keys() == {"stop-words", "lingua-language-detector", "transformers"}
    assert libraries(rules, Language(model="a.bin"), Lists("a.txt")).keys() == {"transformers"}
    assert libraries({"min_words"}, Language(), Lists()) == {}


def test_lingua() -> None:
    score = language_score(Language(among=("de", "fr")))
    assert score(ENGLISH) > 0.8
    assert len({score(ENGLISH) for _ in range(20)}) == 1, "lingua's last digits vary from call to call"
    assert score(GERMAN) == score("12 34") == score("") == 0


def test_lists(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("Mill\n\n  Zwölf \n", "utf-8")
    assert read_words(tmp_path / "words.txt") == stop_words(Lists(str(tmp_path / "words.txt"))) == {"mill", "zwölf"}
    assert {"the", "and"} < stop_words(Lists())
    (tmp_path / "words.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        read_words(tmp_path / "words.txt")
