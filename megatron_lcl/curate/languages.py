"""What rules of texts need besides the text: lists of words; its language, by lingua or by a fastText model that the
user has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Set
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from megatron_lcl.curate.names import Listed
from megatron_lcl.curate.perplexity import perplexity_scores
from megatron_lcl.curate.settings import PERPLEXITY, Language, Lists, Settings, names_file
from megatron_lcl.errors import UserError

_LINGUA = "lingua-language-detector"
_DIGITS = 6
"""of a probability: the last digits of lingua's vary from call to call, also within one process"""
_EXTRA = "`pip install 'megatron-lcl[curate]'`"


class Context:
    """Lists and models that measures need; each is read when it is first used."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def stop_words(self) -> frozenset[str]:
        return stop_words(self._settings.lists)

    @cached_property
    def flagged_words(self) -> frozenset[str]:
        assert self._settings.lists.flagged_words is not None  # Settings checks it
        return read_words(self._settings.lists.flagged_words)

    @cached_property
    def excluded_names(self) -> Listed:
        assert self._settings.document.excluded_names is not None  # the rule is on
        return read_names(self._settings.document.excluded_names)

    @cached_property
    def language(self) -> Callable[[str], float]:
        return language_score(self._settings.language)

    @cached_property
    def perplexities(self) -> Callable[[Sequence[str]], list[float]]:
        return perplexity_scores(self._settings.perplexity)


@functools.lru_cache(maxsize=1)
def context_of(settings: Settings) -> Context:
    """Once a process."""
    return Context(settings)


def language_score(settings: Language) -> Callable[[str], float]:
    """A function of a text: its likeliest language's probability, rounded; 0 where that is none of the wanted ones.

    UserError where the package is not installed, a code is of no language that it knows, or the model is none.
    """
    scores = _lingua(settings) if settings.model is None else _fasttext(settings)

    def score(text: str) -> float:
        language, probability = scores(text[: settings.characters])
        return round(probability, _DIGITS) if language in settings.wanted else 0.0

    return score


def _lingua(settings: Language) -> Callable[[str], tuple[str, float]]:
    try:
        import lingua
    except ImportError:
        raise UserError(f"languages need the package lingua: {_EXTRA}, or give language.model") from None
    known = {language.iso_code_639_1.name.lower(): language for language in lingua.Language.all()}
    chosen = dict.fromkeys([*settings.wanted, *settings.among])
    if unknown := [code for code in chosen if code not in known]:
        raise UserError(f"lingua knows no language {unknown[0]!r}; it has {', '.join(sorted(known))}")
    builder = lingua.LanguageDetectorBuilder
    if not settings.among:
        detector = builder.from_all_languages().build()
    elif len(chosen) == 1:
        raise UserError(f"language.among = {list(settings.among)}: give one besides {settings.wanted[0]} at least")
    else:
        detector = builder.from_languages(*(known[code] for code in chosen)).build()

    def scores(text: str) -> tuple[str, float]:
        first = detector.compute_language_confidence_values(text)[0]
        return first.language.iso_code_639_1.name.lower(), first.value

    return scores


def _fasttext(settings: Language) -> Callable[[str], tuple[str, float]]:
    try:
        import fasttext
    except ImportError:
        raise UserError(
            "a fastText model needs the package fasttext-predict (`pip install fasttext-predict`)"
        ) from None
    try:
        model = fasttext.load_model(str(settings.model))
    except (ValueError, RuntimeError):
        raise UserError(f"{settings.model} is no fastText model") from None

    def scores(text: str) -> tuple[str, float]:
        labels, probabilities = model.predict(text.lower().replace("\n", " "))  # lower case as OBELICS does
        return (labels[0].removeprefix("__label__"), float(probabilities[0])) if labels else ("", 0.0)

    return scores


def stop_words(lists: Lists) -> frozenset[str]:
    """In lower case. UserError where the package is not installed, or has no such language."""
    if names_file(lists.stop_words):
        return read_words(lists.stop_words)
    try:
        from stop_words import StopWordError, get_stop_words
    except ImportError:
        raise UserError(f"stop words need the package stop-words: {_EXTRA}, or give a file") from None
    try:
        return frozenset(word.lower() for word in get_stop_words(lists.stop_words))
    except StopWordError as error:
        raise UserError(f"--lists.stop_words {lists.stop_words}: {error}") from None


def read_words(path: str | Path) -> frozenset[str]:
    """A file with a word a line, in lower case; empty lines are none."""
    return frozenset(line.lower() for line in _lines(path))


def read_names(path: str | Path) -> Listed:
    """A file with a name or a domain a line. UserError where there is none in it."""
    names = _lines(path)
    if not names:
        raise UserError(f"{path} has no line; give the names of documents to remove, one a line")
    return Listed(names)


def _lines(path: str | Path) -> list[str]:
    """Of a file, without those that are empty, white space around them, and a byte order mark before the first."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None
    return [word for line in lines if (word := line.strip())]


def libraries(rules: Set[str], language: Language, lists: Lists) -> dict[str, str]:
    """Versions of the packages on which the result depends. rules: fields of texts and documents that are on."""
    used = {}
    if "min_stop_words" in rules and not names_file(lists.stop_words):
        used["stop-words"] = version("stop-words")
    if "min_language" in rules and language.model is None:
        used[_LINGUA] = version(_LINGUA)
    if rules & {*PERPLEXITY}:
        used["transformers"] = version("transformers")
    return used
