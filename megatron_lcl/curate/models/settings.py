"""What can be set of the rules that ask an encoder."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT
from megatron_lcl.curate.duplicates.settings import Action
from megatron_lcl.errors import UserError


@dataclass(frozen=True, config=STRICT)
class HeadScore:
    """Images that a linear head on an encoder's features scores too low or too high."""

    head: str | None = Field(
        default=None,
        description="file of the head, .npz or .safetensors: `weight` with a number for each feature, and `bias` if "
        "it has one; the features have unit norm",
    )
    min_score: float | None = Field(default=None, description="images with a lower score are removed")
    max_score: float | None = Field(default=None, description="images with a higher score are removed")

    def __post_init__(self) -> None:
        bounds = self.min_score is not None or self.max_score is not None
        if self.head is not None and not bounds:
            raise UserError(f"the head {self.head} removes nothing; give min_score or max_score")
        if self.head is None and bounds:
            raise UserError("min_score and max_score are of a head; give its file")


@dataclass(frozen=True, config=STRICT)
class FeatureDuplicates:
    """Images whose features are alike."""

    min_cosine: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.96,
        description="images whose features have at least this cosine similarity are near-duplicates (SemDeDup drops "
        "above 1 - epsilon, chosen for each encoder by looking)",
    )
    action: Action = Field(
        default="keep-one", description="keep-one: the first place of an image stays; drop-all: none does"
    )


@dataclass(frozen=True, config=STRICT)
class ModelRules:
    """Rules that ask an encoder; each is on where its field is set."""

    encoder: str | None = Field(default=None, description="any model that `evaluate` takes, see there")
    tokenizer: str | None = Field(default=None, description="of an LCL checkpoint, whose texts are encoded")
    match: bool = Field(
        default=False, description="match each image to one text of its document; images of documents without texts go"
    )
    min_similarity: float | None = Field(
        default=None, description="of match: images whose cosine similarity to their text is lower go, too"
    )
    head: str | None = Field(default=None, description="file of a linear head that scores images, see HeadScore")
    min_score: float | None = Field(default=None, description="images that it scores lower are removed")
    max_score: float | None = Field(default=None, description="images that it scores higher are removed")
    nsfw: HeadScore = HeadScore()
    aesthetics: HeadScore = HeadScore()
    duplicates: Action | None = Field(
        default=None, description="of images with nearly the same features: keep-one or drop-all"
    )
    min_cosine: Annotated[float, Field(gt=0, le=1)] = Field(
        default=FeatureDuplicates().min_cosine, description="of duplicates: cosine similarity from which they are that"
    )

    def __post_init__(self) -> None:
        if self.asks and self.encoder is None:
            raise UserError("models.match, heads and duplicates need models.encoder, such as hf:DIR or a run")

    @property
    def heads(self) -> dict[str, HeadScore]:
        """Those that are given, by the name that they have in `removed.parquet` after `image.`."""
        heads = {"score": HeadScore(self.head, self.min_score, self.max_score)}
        heads |= {"nsfw": self.nsfw, "aesthetics": self.aesthetics}
        return {name: head for name, head in heads.items() if head.head is not None}

    @property
    def asks(self) -> bool:
        """Whether a rule is on."""
        return self.match or bool(self.heads) or self.duplicates is not None
