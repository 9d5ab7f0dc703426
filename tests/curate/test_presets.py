"""Protects the presets' bounds: a document just inside of each stays; of one just outside goes what the bound is about,
for this reason and no other. The bounds stand here again, and are measured independently of `measures`."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from curate.corpora_of_rules import removed
from data.corpora import finish_corpus
from data.helpers import TOKENIZER

from megatron_lcl.curate import languages
from megatron_lcl.curate.run import curate
from megatron_lcl.curate.settings import preset_names, read_settings, rules_of
from megatron_lcl.data.corpus.store import ShardWriter, open_corpus
from megatron_lcl.errors import UserError

WORDS = list(
    dict.fromkeys(bytes(word).decode() for word in np.random.default_rng(0).integers(97, 123, (40_000, 6), "u1"))
)
STOPS, FILLERS = WORDS[:15_000], WORDS[-400:]
LETTERS = "".join(FILLERS)
_stops, _others = iter(STOPS), iter(WORDS[15_000:-400])
ALSO_STOPS = ["abcdefghijk", "babcdefghijc", "abcdefghij", *"abcde"]
FLAGGED = "qqqqqq"


class Picture(NamedTuple):
    """An image as a corpus describes it."""

    width: int = 300
    height: int = 200
    format: str = "JPEG"
    similarity: float = 0.5
    copy: str = ""
    """has the same bytes as all of this name"""


class Page(NamedTuple):
    """A document."""

    texts: tuple[str, ...]
    pictures: tuple[Picture, ...] = (Picture(),)
    name: str = "http://host/page"


def prose(num: int, stops: int | None = None, marks: int | None = None) -> str:
    """So many words that no other text has, some of them (half) stop words, some (one in 20) with a full stop."""
    stops, marks = num // 2 if stops is None else stops, num // 20 + 1 if marks is None else marks
    words = [*itertools.islice(_stops, stops), *itertools.islice(_others, num - stops)]
    return " ".join(word + "." * (k < marks) for k, word in enumerate(words))


def show(*pictures: Picture) -> Page:
    """A document with these images, beside one within all bounds."""
    return Page((prose(60),), (Picture(), *pictures))


def say(text: str) -> Page:
    """A document with this text, beside one within all bounds."""
    return Page((prose(60), text))


# --- what is measured, as the papers define it -------------------------------------------------------------------


def repeated_characters(text: str) -> float:
    """OBELICS: of runs of 10, the share of the √(different runs) most frequent, without those that stand once."""
    runs = Counter(text[k : k + 10] for k in range(len(text) - 9))
    return sum(n for _, n in runs.most_common(math.isqrt(len(runs))) if n > 1) / runs.total()


def repeated_words(text: str) -> float:
    """OBELICS: of runs of 5, the share of those that stand more than once."""
    words = text.replace(".", "").split()
    runs = Counter(tuple(words[k : k + 5]) for k in range(len(words) - 4))
    return sum(n for n in runs.values() if n > 1) / runs.total()


def special(text: str) -> float:
    """Of the characters, those that are no letters."""
    return sum(not character.isalpha() for character in text) / len(text)


def crossing(
    grown: Callable[[int], tuple[str, ...]], measure: Callable[[str], float], bound: float
) -> list[tuple[str, ...]]:
    """Of texts that grow, the first of which all together measure no more than the bound, and those before."""
    outside, inside = next(
        both
        for both in itertools.pairwise(map(grown, range(1, 400)))
        if measure("\n\n".join(both[1])) <= bound < measure("\n\n".join(both[0]))
    )
    return [inside, outside]


def run_thrice(k: int) -> tuple[str, ...]:
    """A run of 10 characters three times, each time between others."""
    return (f"abcdefghijk babcdefghijc {LETTERS[:k]} abcdefghij",)


def words_twice(k: int) -> tuple[str, ...]:
    return (" ".join(["a b c d e", *FILLERS[:k], "a b c d e."]),)


def digits(k: int) -> tuple[str, ...]:
    return (f"{' '.join(STOPS[-12:])} 314159265358979323846264338327 {LETTERS[:k]}.",)


def same_texts(k: int) -> tuple[str, ...]:
    """Two alike of four words, in which no run stands twice, and one that grows."""
    return (
        *[" ".join([*FILLERS[-2:], *STOPS[-2:]]) + "."] * 2,
        " ".join(map(" ".join, zip(STOPS[-40 : k - 40], FILLERS, strict=False))) + ".",
    )


def same_beginnings(k: int) -> tuple[str, ...]:
    return f"a b c d e {LETTERS[:12]} {LETTERS[12:24]}.", " ".join(
        ["a b c d e", LETTERS[24:36], LETTERS[36:48]][: 1 + k]
    )


# --- a document inside and one outside of each bound -------------------------------------------------------------

Cases = dict[str, tuple[Page | list[Page], Page | list[Page]]]
"""pages, or several that go together"""


def images(min_side: int, max_aspect: int) -> Cases:
    low = min_side + 50
    return {
        "image.min_side": (show(Picture(min_side, low)), show(Picture(min_side - 1, low))),
        "image.max_aspect": (show(Picture(max_aspect * low, low)), show(Picture(low, max_aspect * low + 1))),
        "document.min_images": (Page((prose(60),)), Page((prose(60),), ())),
    }


def many_images() -> Cases:
    return {
        "image.max_side": (show(Picture(20000, 10000)), show(Picture(20001, 10001))),
        "image.max_places": ([show(Picture(copy="in ten"))] * 10, [show(Picture(copy="in eleven"))] * 11),
        "image.max_in_document": (show(Picture(copy="once")), show(*[Picture(copy="twice")] * 2)),
        "document.max_images": (show(*[Picture()] * 29), show(*[Picture()] * 30)),
    }


def obelics() -> Cases:
    cases = images(150, 2) | many_images()
    cases["image.formats"] = (show(Picture(format="WEBP")), show(Picture(format="GIF")))
    cases["text.min_words"] = (say(prose(4, 2)), say(prose(3, 2)))
    cases["text.max_words"] = (say(prose(1000)), say(prose(1001)))
    cases["text.min_stop_words"] = (say(prose(100, 30)), say(prose(100, 29)))
    cases["text.max_flagged_words"] = (say(f"{prose(99)} {FLAGGED}"), say(f"{prose(98)} {FLAGGED}"))
    cases["text.min_punctuation"] = (
        [say(prose(11, marks=0)), Page((prose(120, marks=120), prose(999, marks=1)))],
        [say(prose(12, marks=0)), Page((prose(120, marks=120), prose(1000, marks=1)))],
    )
    cases["document.min_punctuation"] = (
        Page((prose(97, marks=3),)),
        [Page((prose(98, marks=3),)), Page((prose(10, marks=0),))],
    )
    for name, texts in {
        "text.max_character_repetition": crossing(run_thrice, repeated_characters, 0.1),
        "text.max_word_repetition": crossing(words_twice, repeated_words, 0.1),
        "text.max_special": crossing(digits, special, 0.3),
    }.items():
        cases[name] = (say(*texts[0]), say(*texts[1]))
    for name, texts in {
        "document.max_character_repetition": crossing(same_texts, repeated_characters, 0.1),
        "document.max_word_repetition": crossing(same_beginnings, repeated_words, 0.2),
        "document.max_special": crossing(digits, special, 0.275),
        "document.min_words": [(prose(10),), (prose(9),)],
        "document.max_words": [(prose(1000), prose(1000)), (prose(1000), prose(997), prose(4))],
        "document.min_stop_words": [(prose(100, 35),), (prose(100, 34),)],
        "document.min_language": [(f"{prose(60)} p=0.8",), (f"{prose(60)} p=0.799",)],
    }.items():
        cases[name] = (Page(texts[0]), Page(texts[1]))
    return cases


def mint1t() -> Cases:
    return images(150, 2) | many_images() | {
        "document.min_language": (Page((f"{prose(60)} p=0.65",)), Page((f"{prose(60)} p=0.649",))),
        "document.unsafe_names": (Page((prose(9),), name="http://host/pron"), Page((prose(9),), name="http://host/A-PORN")),
    }  # fmt: skip


def datacomp() -> Cases:
    return images(200, 3) | {
        "text.min_plain_words": (say("one 2 -"), say("one twothree")),
        "text.min_characters": (say("a b cd"), say("a b c")),
        "text.min_language": (say("a text p=0.001"), say("a text p=0.0009")),
        "document.min_texts": (Page((prose(9),)), Page(())),
    }


def mmc4() -> Cases:
    return images(150, 2) | {
        "image.formats": (show(Picture(format="PNG")), show(Picture(format="WEBP"))),
        "image.min_similarity": (show(Picture(similarity=0.15)), show(Picture(similarity=0.149))),
    }


CASES = {case.__name__: case for case in (obelics, mint1t, datacomp, mmc4)}


def write_pages(folder: Path, pages: list[Page]) -> Path:
    """A corpus of them, whose images have the sizes that are said and no pixels."""
    folder.mkdir()
    writer, numbers = ShardWriter(folder, 0), itertools.count()
    for page in pages:
        for text in page.texts:
            ids = TOKENIZER.encode(text)
            assert TOKENIZER.decode(ids) == text
            writer.add_texts([np.array(ids, np.int32).tobytes()])
        for width, height, format, similarity, copy in page.pictures:
            data = copy or f"the only {next(numbers)}"
            writer.add_image(data.encode(), width, height, format, similarity)
        writer.end_document(page.name)
    files, counts = writer.finish()
    return finish_corpus(folder, TOKENIZER, [counts], files).path


def said_probability(text: str) -> float:
    """In place of a model of languages."""
    found = re.search(r"p=(\S+)", text)
    return float(found[1]) if found else 1.0


def test_pairs_are_filtered_as_datacomps_code_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """baselines/apply_filter.py of mlfoundations/datacomp again, of short captions, and images near both bounds."""
    monkeypatch.setattr(languages, "language_score", lambda settings: said_probability)
    random = np.random.default_rng(3)
    captions = [" ".join(random.choice(["a", "12", "-", "ab"], size)) for size in random.integers(1, 6, 60)]
    sides = random.choice([199, 200, 201, 599, 600, 601, 603], (60, 2)).tolist()
    pages = [Page((c,), (Picture(*both),), str(k)) for k, (c, both) in enumerate(zip(captions, sides, strict=True))]
    curate(write_pages(tmp_path / "in", pages), tmp_path / "out", read_settings("datacomp"))
    expected = {
        str(k)
        for k, (caption, both) in enumerate(zip(captions, sides, strict=True))
        if len(caption.split()) > 2 and len(caption) > 5 and min(both) >= 200 and max(both) / min(both) <= 3.0
    }
    corpus = open_corpus(tmp_path / "out")
    assert {corpus.name(k) for k in range(len(corpus))} == expected
    assert 5 < len(expected) < 55


@pytest.mark.parametrize("preset", preset_names())
def test_just_inside_and_just_outside(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "language_score", lambda settings: said_probability)
    (tmp_path / "stop.txt").write_text("\n".join([*STOPS, *ALSO_STOPS]))
    (tmp_path / "flagged.txt").write_text(FLAGGED)
    given = {}
    if preset == "obelics":  # the words as its file says
        given = {"lists.stop_words": str(tmp_path / "stop.txt"), "lists.flagged_words": str(tmp_path / "flagged.txt")}
        given["text.max_flagged_words"] = "0.01"
    settings, cases = read_settings(preset, overrides=given), CASES[preset]()
    on = {rule.name for section in ("image", "text", "document") for rule in rules_of(settings, section)}
    assert on == cases.keys(), "a bound without its case"
    pages: list[Page] = []
    expected: dict[int, set[str]] = {}
    for name, both in cases.items():
        inside, outside = (each if isinstance(each, list) else [each] for each in both)
        expected |= {len(pages) + len(inside) + k: {name} for k in range(len(outside))}
        pages += [*inside, *outside]
    corpus = write_pages(tmp_path / "in", pages)
    curate(corpus, tmp_path / "out", settings)
    reasons: dict[int, set[str]] = {}
    for document, _, rule in removed(tmp_path / "out"):
        reasons.setdefault(document, set()).add(rule)
    assert reasons == expected


def test_a_preset_beside_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the preset obelics and the file .*rules\.yaml: give one of the two"):
        read_settings("obelics", tmp_path / "rules.yaml")
