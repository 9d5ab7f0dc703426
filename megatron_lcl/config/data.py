"""Section `data`: documents to packed batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT, Count, Fraction, Positive
from megatron_lcl.errors import UserError


@dataclass(frozen=True, config=STRICT)
class Corpus:
    """One corpus of a blend."""

    path: str = Field(
        description="folder that `preprocess` wrote, also s3://bucket/folder or http(s)://host/folder "
        "(docs/object-storage.md)"
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="share of the blend's tokens, relative to the weights of the other corpora",
    )


@dataclass(frozen=True, config=STRICT)
class Data:
    """Documents to packed batches."""

    corpora: tuple[Corpus, ...] = Field(
        default=(), description="corpora to blend: a list of {path, weight}, or one path"
    )
    tokens_per_pack: Positive = Field(default=2048, description="token slots of a pack (T)")
    images_per_pack: Positive | None = Field(
        default=None,
        description="image slots of a pack (I); null: chosen from the corpora so that token and image slots fill up "
        "alike; a document with more images becomes several sequences (reference: one document a row, no packs)",
    )
    min_similarity: float = Field(
        default=0.24,
        description="matched sources: skip an image whose similarity to its text segment is lower (reference: 0.24)",
    )
    max_images_per_segment: Positive = Field(
        default=1, description="matched sources: images kept per text segment, drawn at random (reference: 1)"
    )
    max_images: Positive = Field(
        default=6, description="matched sources: images kept per document, those of the first segments (reference: 6)"
    )
    min_images: Count = Field(
        default=1, description="matched sources: skip documents with fewer images after selection (reference: 1)"
    )
    image_first: Fraction = Field(
        default=0.5,
        description="probability that a matched image, or a pair's image, stands before its text (reference: 0.5)",
    )
    pair_layout: Literal["document", "reference"] = Field(
        default="document",
        description="image-text pairs: `<sot> … <eot>` around everything, or the reference's one-ended forms",
    )
    contrast_leading_images: bool = Field(
        default=False,
        description="contrast images without a text before them in their sequence, too (reference: true, except where "
        "<soi> comes first)",
    )
    crop_scale: tuple[Fraction, Fraction] = Field(
        default=(0.9, 1.0),
        description="random resized crop: smallest and largest fraction of the image's area (reference: 0.9, 1.0)",
    )
    crop_ratio: tuple[float, float] = Field(
        default=(0.75, 4 / 3),
        description="random resized crop: smallest and largest width over height (reference: 3/4, 4/3)",
    )
    seed: int = Field(default=0, description="seed of shuffling, image selection, image placement and augmentation")
    workers: Count = Field(
        default=2,
        description="data loader processes of a replica (tensor-parallel ranks and pipeline stages share them); 0: "
        "load in the training process",
    )
    cache: str | None = Field(
        default=None, description="folder for pack indices; null: megatron_lcl in the user's cache folder"
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(
        default=100,
        description="size limit of the folder for pack indices, GB (10^9 bytes); over it, the least recently used are "
        "deleted",
    )
    storage_cache_gb: Annotated[float, Field(ge=0)] = Field(
        default=100,
        description="size limit of what is kept, in the folder for pack indices, of corpora in object storage, GB; "
        "what is over it is read again in each epoch",
    )
    look_ahead: Positive = Field(
        default=8,
        description="of corpora in object storage: micro-batches whose images each loader process reads ahead",
    )
    max_bad_images: Positive = Field(
        default=100, description="stop the run after more consecutive images than this that do not decode"
    )
    max_bad_fraction: Fraction = Field(
        default=0.05,
        description="stop the run when a larger fraction of a process's last 1,000 images does not decode (at least 20 "
        "images)",
    )
    allow_change: bool = Field(
        default=False,
        description="let this start of a resumed run continue with other corpora than it began with; the run's "
        "config.yaml has false",
    )

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"data.{name} is [{low}, {high}]; give two positive numbers, the smaller first")
