"""What a phase of a run reads, and how, as the ledger holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_lcl.config import Config, Data


@dataclass(frozen=True)
class Reading:
    """What a phase reads, and how: what is stored of it in the ledger."""

    tokens_per_pack: int
    images_per_pack: int | None
    """None: not chosen yet"""
    num_patches: int
    """placeholders per image; the key that runs have stored"""
    context_length: int
    image_size: int
    kept_patches: tuple[int, int] | None
    """(K, P) where K of an image's P patches are kept; None: all are"""
    global_batch: int

    @classmethod
    def of(cls, config: Config) -> Reading:
        """Of a phase's config."""
        vision, data = config.model.vision, config.data
        return cls(
            data.tokens_per_pack,
            data.images_per_pack,
            vision.num_placeholders,
            config.model.language.context_length,
            vision.image_size,
            (vision.num_kept, vision.num_patches) if vision.patch_dropout else None,
            config.train.global_batch,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reading:
        """From what the ledger holds."""
        kept = value["kept_patches"]
        return cls(**{**value, "kept_patches": None if kept is None else tuple(kept)})

    def has_slots_of(self, other: Reading) -> bool:
        """Whether what is chosen as I for one is so for the other: I does not depend on the images' size or number."""
        free: dict[str, Any] = {"images_per_pack": None, "image_size": 0, "kept_patches": None, "global_batch": 0}
        return replace(self, **free) == replace(other, **free)

    def data(self, data: Data) -> Data:
        """A run's section `data` as it is in the phase."""
        return dataclasses.replace(data, tokens_per_pack=self.tokens_per_pack, images_per_pack=self.images_per_pack)
