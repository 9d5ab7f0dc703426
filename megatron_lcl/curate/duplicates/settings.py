"""What can be set of each rule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT, Count, Positive

Action = Literal["keep-one", "drop-all"]
Similarity = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class DocumentDuplicates:
    """Documents with the same text, or nearly so."""

    threshold: Similarity | None = Field(
        default=0.75,
        description="documents whose shingles have at least this Jaccard similarity, as estimated, are near-duplicates "
        "(FineWeb: 0.75), pairs only where their image has the same bytes; null: only documents with the same texts "
        "and images",
    )
    words: Positive = Field(
        default=5, description="words of a shingle (FineWeb: 5); of scripts without spaces, letters"
    )
    permutations: Annotated[int, Field(ge=2)] = Field(
        default=112, description="hash functions of a MinHash signature (FineWeb: 112)"
    )
    action: Action | None = Field(
        default=None, description="keep-one: the first document of a cluster stays; drop-all: none does"
    )


@dataclass(frozen=True, config=STRICT)
class ImageDuplicates:
    """Images that are the same, or nearly so."""

    max_bits: Count | None = Field(
        default=40,
        le=128,
        description="images whose perceptual hashes differ in at most this many of 256 bits are near-duplicates; null: "
        "only images with the same bytes",
    )
    min_detail: Annotated[float, Field(ge=0)] = Field(
        default=4.0,
        description="images whose gray levels have a smaller standard deviation than this (of 256 levels) are compared "
        "by their bytes only: the hash of a blank picture is noise",
    )
    action: Action | None = Field(
        default=None, description="keep-one: the first place of an image stays; drop-all: none does"
    )


@dataclass(frozen=True, config=STRICT)
class DuplicateRules:
    """What the corpus, or another one, has before."""

    documents: DocumentDuplicates = DocumentDuplicates()
    images: ImageDuplicates = ImageDuplicates()
    against: tuple[str, ...] = Field(
        default=(),
        description="corpora with which documents, images and their features (models.duplicates) are compared, too: "
        "what is in them is removed from this one",
    )


EVALUATION_RULES = 7
"""version of what decides that an image is an evaluation image, the defaults below included"""


@dataclass(frozen=True, config=STRICT)
class Decontamination:
    """Images that are evaluation images, also changed a little."""

    sets: tuple[str, ...] = Field(
        default=(), description="the evaluation images: folders, WebDatasets, corpora; empty: no such rule"
    )
    whole_bits: Count = Field(
        default=12,
        le=64,
        description="of 64 bits, in which the hashes of two candidates' whole pictures differ at most",
    )
    third_bits: Count = Field(
        default=6, le=64, description="of 64 bits, in which those of an outer third of the pictures differ at most"
    )
    min_agreement: Similarity = Field(
        default=0.62, description="share of an evaluation image's blocks that an image has to show to be taken for it"
    )
    min_detail: Annotated[float, Field(ge=0)] = Field(
        default=4.0,
        description="parts of pictures whose gray levels have a smaller standard deviation than this (of 256 levels) "
        "are not compared: the hash of a blank one is noise",
    )
