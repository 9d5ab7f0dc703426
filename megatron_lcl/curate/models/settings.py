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

    head: str = Field(
        description="file of the head, .npz or .safetensors: `weight` with a number for each feature, and `bias` if "
        "it has one; the features have unit norm"
    )
    min_score: float | None = Field(default=None, description="images with a lower score are removed")
    max_score: float | None = Field(default=None, description="images with a higher score are removed")

    def __post_init__(self) -> None:
        if self.min_score is None and self.max_score is None:
            raise UserError(f"the head {self.head} removes nothing; give min_score or max_score")


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
