"""A run with phases, for tests of what each reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.data.loading.loader import loader_of
from megatron_lcl.data.loading.rules import INTERLEAVED

STEPS = 24
EARLY = [
    {"steps": 4, "image_size": 8, "context_length": 64, "tokens_per_pack": 128, "contrastive_weight": 0.5},
    {"steps": 2, "image_size": 8, "context_length": 64, "tokens_per_pack": 128, "global_batch": 2},  # the same packs
    {"steps": 5, "patch_dropout": 0.5},
]
SHORT = {"mean_text": 10}
"""documents that need no cut, whatever the phase"""


def blend_of(*corpora: tuple[Path, float]) -> str:
    """For `data.corpora`: folders and weights."""
    return json.dumps([{"path": str(path), "weight": weight} for path, weight in corpora])


def config_of(path: Path | str, steps: int = STEPS, phases: Any = EARLY, **fields: Any) -> Config:
    tree: dict[str, Any] = {
        "model.vision.image_size": 16,
        "model.vision.patch_size": 4,
        "model.language.context_length": 128,
        "data.corpora": str(path),
        "data.tokens_per_pack": 256,
        "data.workers": 0,
        "train.steps": steps,
        "train.global_batch": 4,
        "schedule.phases": json.dumps(phases),
    }
    return configs.load(None, {key: str(value) for key, value in (tree | fields).items()})


def batches_of(config: Config, ledger: Ledger, steps: range, **options: Any) -> list[PackedBatch]:
    """One batch a step, of all its packs."""
    found = []
    for step in steps:
        reading, consumed = ledger.reading_at(step, config)
        loader = loader_of(
            reading, config.data, INTERLEAVED, ledger=ledger, first_pack=consumed, steps=1,
            global_batch=reading.global_batch, micro_batch=reading.global_batch, **options,
        )  # fmt: skip
        found += list(loader)
    return found
