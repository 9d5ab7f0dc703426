"""A model of a few thousand parameters and random packs for it."""

from __future__ import annotations

import torch

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.special import SpecialTokens

MICRO_BATCHES = 2


def build_config(zero: int, dtype: str) -> Config:
    """Two processes with two micro-batches each."""
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
    language = {"context_length": 32, "vocab_size": 99, "width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
    return configs.from_dict(
        {
            "model": {"vision": vision, "language": language, "pool_heads": 2},
            "optimizer": {"clip_norm": 0.5},
            "zero": {"stage": zero},
            "contrast": {"strategy": "recompute" if zero == 3 else "retain"},
            "train": {"global_batch": 2 * MICRO_BATCHES, "dtype": dtype},
        }
    )


def batches_of(step: int, rank: int, config: Config) -> list[PackedBatch]:
    """A process's micro-batches: two sequences each, the first with an image behind its first words."""
    return [_batch(100 * step + 10 * rank + micro, config) for micro in range(MICRO_BATCHES)]


def _batch(seed: int, config: Config) -> PackedBatch:
    special, patches = SpecialTokens.of(config.model.language.vocab_size), config.model.vision.num_patches
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(1, config.model.language.vocab_size - 10, (20,), generator=draw)
    image = [special.soi, *[special.placeholder] * patches, special.eoi]
    with_image = torch.tensor([*words[:5].tolist(), *image, *words[5:9].tolist()])
    lengths = torch.tensor([len(with_image), 11])
    tokens = torch.nn.utils.rnn.pad_sequence([with_image, words[9:]], batch_first=True)
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return pack_padded(tokens, lengths, images, config.model)
