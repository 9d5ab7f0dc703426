"""A config, a batch and a result for what looks at steps without making any."""

from __future__ import annotations

from typing import Any

import torch

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.train.result import StepResult

RESULT = StepResult(1.0, 2.0, 1.5, 9, 4, 2, 20, 0, {"generation": 1.0, "contrastive": 1.0, "image_accuracy": 0.5})


def config_of(**train: Any) -> Config:
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
    language = {"context_length": 32, "vocab_size": 99, "width": 24, "layers": 1, "heads": 2, "mlp_width": 32}
    return configs.from_dict(
        {
            "model": {"vision": vision, "language": language, "pool_heads": 2},
            "optimizer": {"warmup": 3},
            "train": {"steps": 9, "log_every": 1, "progress": False, "global_batch": 1, **train},
        }
    )


def batch(config: Config) -> PackedBatch:
    """Two sequences with an image each."""
    special, patches = SpecialTokens.of(config.model.language.vocab_size), config.model.vision.num_patches
    image = [special.soi, *[special.placeholder] * patches, special.eoi]
    tokens = torch.tensor([[1, 2, *image, 3, 4], [5, *image, 6, 7, 8]])
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    return pack_padded(tokens, torch.tensor([tokens.shape[1]] * 2), images, config.model)
