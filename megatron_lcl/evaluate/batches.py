"""Images and texts by themselves as batches of the model, so that its layers encode them in whatever layout they lie.

A batch of images is one token and a slot for each image; the head gives their latents, those of `LCL.encode_image`. A
batch of texts is a pack of sequences, each ending in `<soi>`, where the context feature of its slot is read, that of
`LCL.encode_text`; the slot's image is blank and one patch large, and nothing reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from megatron_lcl.config import Model
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.special import SpecialTokens


def image_batch(images: torch.Tensor, model: Model) -> PackedBatch:
    """Images [n, 3, H, W] uint8; one blank slot where there are none, because a pipeline stage sends rows."""
    if not len(images):
        images = torch.zeros(1, *images.shape[1:], dtype=torch.uint8)
    special = SpecialTokens.of(model.language.vocab_size)
    return _batch([[special.sot]], images, [-1] * len(images), model.vision.num_patches)


def text_batch(texts: Sequence[Sequence[int]], model: Model) -> PackedBatch:
    """Token ids of each text, without special tokens, and at most the context length less two; may be none."""
    special, side = SpecialTokens.of(model.language.vocab_size), model.vision.patch_size
    rows = [[special.sot, *text, special.soi] for text in texts] or [[special.sot, special.soi]]
    blank = torch.zeros(len(rows), 3, side, side, dtype=torch.uint8)
    ends = itertools.accumulate(map(len, rows))
    return _batch(rows, blank, [end - 1 for end in ends] if texts else [-1], 1)


def _batch(rows: list[list[int]], images: torch.Tensor, image_soi: list[int], num_patches: int) -> PackedBatch:
    def integers(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    tokens = [token for row in rows for token in row]
    return PackedBatch(
        tokens=integers(tokens),
        positions=integers([i for row in rows for i in range(len(row))]),
        cu_seqlens=integers([0, *itertools.accumulate(map(len, rows))]),
        targets=integers([-1] * len(tokens)),
        target_positions=integers([-1] * len(tokens)),
        images=images,
        image_start=integers([-1] * len(images)),
        image_soi=integers(image_soi),
        image_valid=integers([1] * len(images)),
        kept_patches=integers([]),
        num_targets=0,
        num_pairs=0,
        num_images=len(images),
        num_tokens=len(tokens),
        max_seqlen=max(map(len, rows)),
        num_patches=num_patches,
    )
