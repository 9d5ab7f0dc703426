"""What a corpus is curated by: one section for images, texts and documents each, one field a rule; None: no such rule.

A field `min_X` or `max_X` is the least or the largest value of X (`measures.py`) that stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import xxhash
from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl import fields
from megatron_lcl.config.types import STRICT, Count, Fraction, Positive
from megatron_lcl.curate.duplicates.settings import Decontamination, DuplicateRules
from megatron_lcl.curate.models.settings import ModelRules
from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.data.corpus.image_columns import FORMATS
from megatron_lcl.data.corpus.store import is_corpus, open_corpus
from megatron_lcl.data.prepare.importers import files_signature
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import below, is_dir, is_file, matching

PRESETS = Path(__file__).parent / "presets"
PERPLEXITY = ("min_perplexity", "max_perplexity")
"""fields of texts and documents for which a language model is needed"""
WORD_COUNTS = ("min_words", "max_words", "min_plain_words")
"""fields of texts and documents that count words, where each letter of a script without spaces is one"""
READ_BY = {
    "duplicates.images": ("duplicates.images.action",),
    "duplicates.documents": ("duplicates.documents.action",),
    "duplicates.against": ("duplicates.images.action", "duplicates.documents.action", "models.duplicates"),
    "evaluation": ("evaluation.sets",),
    "models.tokenizer": ("models.match",),
    "models.min_similarity": ("models.match",),
    "models.min_cosine": ("models.duplicates",),
    "models.encoder": (
        "models.match",
        "models.duplicates",
        "models.head",
        "models.nsfw.head",
        "models.aesthetics.head",
    ),
    "lists.stop_words": ("text.min_stop_words", "document.min_stop_words"),
    "lists.flagged_words": ("text.max_flagged_words", "document.max_flagged_words"),
    "language": ("text.min_language", "document.min_language"),
    "perplexity": tuple(f"{section}.{name}" for section in ("text", "document") for name in PERPLEXITY),
}
"""section or field → the rules that read it, each of which is off by default"""
_AtLeast1 = Annotated[float, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class ImageRules:
    """Of single images."""

    formats: tuple[str, ...] = Field(default=(), description="formats that stay, such as JPEG, PNG; empty: all")
    min_side: Positive | None = Field(default=None, description="shorter side, pixels")
    max_side: Positive | None = Field(default=None, description="longer side, pixels")
    max_aspect: _AtLeast1 | None = Field(default=None, description="longer side / shorter side")
    min_similarity: float | None = Field(default=None, description="to its text, of images that have one")
    max_places: Positive | None = Field(
        default=None, description="places of the corpus at which the same bytes stand; in more, all are removed"
    )
    max_in_document: Positive | None = Field(
        default=None, description="places of a document at which the same bytes stand; the first ones stay"
    )

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise UserError(f"image.formats has {name!r}; a corpus knows {', '.join(FORMATS[1:])}")


@dataclass(frozen=True, config=STRICT)
class TextRules:
    """Of single texts, as the importer made them: paragraphs, captions, sentences."""

    min_words: Count | None = Field(
        default=None,
        description="words, split at white space, with a letter in them; of Chinese, Japanese, Thai, Lao, Khmer and "
        "Burmese each letter",
    )
    max_words: Count | None = Field(default=None, description="words")
    min_plain_words: Count | None = Field(
        default=None, description="as min_words, but of all that white space separates, numbers too"
    )
    min_characters: Count | None = Field(default=None, description="characters")
    max_character_repetition: Fraction | None = Field(
        default=None, description="share of the commonest runs of 10 characters among all"
    )
    max_word_repetition: Fraction | None = Field(
        default=None, description="share of runs of 5 words that stand more than once"
    )
    max_special: Fraction | None = Field(default=None, description="share of characters that are no letters")
    min_stop_words: Fraction | None = Field(default=None, description="share of words that are stop words")
    max_flagged_words: Fraction | None = Field(default=None, description="share of words of lists.flagged_words")
    min_punctuation: Fraction | None = Field(
        default=None, description="share of , ; : ? ! . among them and words; texts with 1 to 11 of both stay"
    )
    min_language: Fraction | None = Field(
        default=None, description="probability of the likeliest language, 0 where it is none of language.wanted"
    )
    min_perplexity: _AtLeast1 | None = Field(default=None, description="perplexity to perplexity.model")
    max_perplexity: _AtLeast1 | None = Field(default=None, description="perplexity to perplexity.model")


@dataclass(frozen=True, config=STRICT)
class Holdings:
    """What a document holds, and where it is from."""

    min_images: Count | None = Field(default=None, description="images")
    max_images: Count | None = Field(default=None, description="images")
    min_texts: Count | None = Field(default=None, description="texts")
    unsafe_names: tuple[str, ...] = Field(
        default=(), description="words that a document's name (file, URL) must not have in it, in upper or lower case"
    )
    excluded_names: str | None = Field(
        default=None,
        description="file with a line for each name that goes: a document's whole name, what stands in it behind a "
        "space (such as its URL), or a domain, of which all URLs go, also those of subdomains",
    )


@dataclass(frozen=True, config=STRICT)
class DocumentRules(TextRules, Holdings):
    """Of documents, of what single images and texts are left; all texts as one, with a blank line between them."""

    min_punctuation: Fraction | None = Field(
        default=None, description="share of , ; : ? ! . among them and words, however few there are"
    )


@dataclass(frozen=True, config=STRICT)
class Lists:
    """Lists of words."""

    stop_words: str = Field(
        default="en", description="a language of the package stop-words, or a file with a word a line"
    )
    flagged_words: str | None = Field(default=None, description="file with a word a line; no list comes with us")


@dataclass(frozen=True, config=STRICT)
class Language:
    """What language a text is in."""

    wanted: tuple[str, ...] = Field(
        default=("en",), min_length=1, description="codes of languages that stay (ISO 639-1)"
    )
    model: str | None = Field(
        default=None, description="fastText model that labels languages (lid.176.bin); null: the package lingua"
    )
    among: tuple[str, ...] = Field(
        default=(), description="languages that lingua chooses from; empty: all that it knows, which takes longer"
    )
    characters: Positive = Field(default=1000, description="at the beginning of a text, by which it is judged")


@dataclass(frozen=True, config=STRICT)
class Perplexity:
    """How surprising a text is."""

    model: str | None = Field(
        default=None, description="folder of a causal language model and its tokenizer as transformers writes them"
    )
    tokens: Positive = Field(default=512, description="at the beginning of a text, by which it is judged")


@dataclass(frozen=True, config=STRICT)
class Settings:
    """All rules."""

    image: ImageRules = ImageRules()
    text: TextRules = TextRules()
    document: DocumentRules = DocumentRules()
    duplicates: DuplicateRules = DuplicateRules()
    evaluation: Decontamination = Decontamination()
    models: ModelRules = ModelRules()
    lists: Lists = Lists()
    language: Language = Language()
    perplexity: Perplexity = Perplexity()

    def __post_init__(self) -> None:
        for section in (self.text, self.document):
            if self.perplexity.model is None and (section.min_perplexity, section.max_perplexity) != (None, None):
                raise UserError(
                    "min_perplexity and max_perplexity need perplexity.model, the folder of a language model"
                )
            if section.max_flagged_words is not None and self.lists.flagged_words is None:
                raise UserError("max_flagged_words needs lists.flagged_words, a file with a word a line")
        self._check_read()

    def _check_read(self) -> None:
        """UserError for what is set and no rule reads: the rule has been forgotten."""
        given = _not_default(self)
        for part, rules in READ_BY.items():
            unread = [name for name in given if name == part or name.startswith(f"{part}.")]
            if unread and given.keys().isdisjoint(rules):
                *others, last = rules
                wanted = f"{', '.join(others)} or {last}" if others else last
                raise UserError(f"{unread[0]} is set, and no rule reads it; give {wanted}, or leave it out")


def _not_default(settings: Settings) -> dict[str, Any]:
    """The settings that are not the defaults, by dotted name."""
    default = fields.flat({name: dataclasses.asdict(info.default) for name, info in fields.fields_of(Settings).items()})
    own = fields.flat(dataclasses.asdict(settings))
    return {name: value for name, value in own.items() if value != default[name]}


class Rule(NamedTuple):
    """A rule that is on."""

    section: str
    """image, text or document"""
    field: str
    threshold: Any

    @property
    def name(self) -> str:
        return f"{self.section}.{self.field}"

    def breaks(self, value: float | np.float32) -> bool:
        """Whether what has this value is removed. A value that is not a number breaks no rule."""
        return bool(value < self.threshold if self.field.startswith("min_") else value > self.threshold)


def rules_of(settings: Settings, section: str) -> list[Rule]:
    """The rules of a section that are on, in order."""
    values = getattr(settings, section)
    given = ((name, getattr(values, name)) for name in fields.fields_of(type(values)))
    return [Rule(section, name, value) for name, value in given if value is not None and value != ()]


def read_settings(
    preset: str | None = None, file: str | Path | None = None, overrides: Mapping[str, str] | None = None
) -> Settings:
    """The settings of a preset or a YAML file, with dotted overrides, `{"text.min_words": "4"}`, on top.

    UserError for a preset beside a file, a preset that there is not, a field that there is not or a value that does not
    fit, a file of words or a model that is missing.
    """
    if preset is not None and file is not None:
        raise UserError(f"the preset {preset} and the file {file}: give one of the two")
    tree: dict[str, Any] = {}
    if preset is not None:
        file = PRESETS / f"{preset}.yaml"
        if preset not in preset_names():
            raise UserError(f"there is no preset {preset!r}; there are {', '.join(preset_names())}")
    if file is not None:
        tree = fields.read_sections(file, "rules are sections such as `image:` and `text:`")
    for key, text in (overrides or {}).items():
        fields.put(Settings, tree, key.replace("-", "_"), text)
    settings = fields.build(Settings, fields.without_null(Settings, tree), "--{}".format)
    for name, path in files_of(settings):
        if not is_file(Path(path)):
            raise UserError(f"--{name} {path}: there is no such file")
    if settings.perplexity.model is not None and not is_dir(Path(settings.perplexity.model)):
        raise UserError(f"--perplexity.model {settings.perplexity.model}: there is no such folder")
    return settings


def preset_names() -> list[str]:
    """The presets, sorted."""
    return sorted(path.stem for path in matching(PRESETS, "*.yaml"))


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Every setting as (dotted name, type, default, help), in order."""
    return fields.describe(Settings)


def as_recipe(settings: Settings) -> dict[str, Any]:
    """What of the settings decides the result, by dotted name: those that are not the defaults; of files and of a
    model's folder their hash; of other corpora and evaluation sets, which are named in the result, also what they hold.
    Of an encoder its name (`models.resolve.check` knows its weights).
    """
    recipe = _not_default(settings)
    for name, path in files_of(settings):
        recipe[name] = hash_file(Path(path))
    if settings.perplexity.model is not None:
        recipe["perplexity.model"] = _hash_folder(settings.perplexity.model)
    for name in ("duplicates.against", "evaluation.sets"):
        if name in recipe:
            recipe[name] = {path: _version(path) for path in recipe[name]}
    return recipe


def _version(path: str) -> str:
    """Of a corpus its fingerprint, of other files, and of the images that a JSON file names, a hash of their names,
    sizes and times."""
    if is_corpus(path):
        return open_corpus(path).fingerprint
    root = Path(path)
    if is_dir(root):
        return files_signature(sorted(file for file in below(root) if is_file(file)), root)
    from megatron_lcl.evaluate.image_set import FileBlob
    from megatron_lcl.evaluate.sources import all_pictures  # imports torch

    images = (Path(blob.path) for blob in all_pictures(root) if isinstance(blob, FileBlob))
    return files_signature([root, *images], root.parent)


def _hash_folder(folder: str) -> str:
    """Of the names and hashes of its files, without those of folders in it."""
    digest = xxhash.xxh3_128()
    for file in sorted(path for path in Path(folder).iterdir() if is_file(path)):
        digest.update(f"{file.name}\0{hash_file(file)}\0".encode())
    return digest.hexdigest()


def names_file(text: str) -> bool:
    """Whether what lists.stop_words says is a file, not a language."""
    return not text.isalpha()


def files_of(settings: Settings) -> Iterator[tuple[str, str]]:
    """The settings that are files."""
    if names_file(settings.lists.stop_words):
        yield "lists.stop_words", settings.lists.stop_words
    if settings.lists.flagged_words is not None:
        yield "lists.flagged_words", settings.lists.flagged_words
    if settings.document.excluded_names is not None:
        yield "document.excluded_names", settings.document.excluded_names
    if settings.language.model is not None:
        yield "language.model", settings.language.model
    for name, head in settings.models.heads.items():
        if head.head is not None:
            yield "models.head" if name == "score" else f"models.{name}.head", head.head
