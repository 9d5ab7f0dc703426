"""A tiny corpus and config, and what an undisturbed run on them gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_packs import without_packs
from fleet import losses, train
from small_corpus import make_corpus

CONFIG = """
model:
  vision: {{image_size: 16, patch_size: 8, width: 16, layers: 1, heads: 2, mlp_width: 32}}
  language: {{context_length: 64, vocab_size: {vocab_size}, width: 16, layers: 1, heads: 2, mlp_width: 32}}
  pool_heads: 2
data: {{corpora: {corpus}, cache: {cache}, tokens_per_pack: 64, images_per_pack: 3, workers: 1}}
optimizer: {{lr: 1.0e-2, warmup: 1}}
train: {{steps: 12, global_batch: 4, log_every: 1, progress: false, dtype: float32}}
checkpoint: {{every: 4}}
guard: {{timeout: 120}}
"""


@pytest.fixture(scope="session")
def config_file(once: Callable[..., Any]) -> str:
    """A run of 12 steps that saves every 4."""
    from megatron_lcl.data.corpus.store import open_corpus

    def make(folder: Path) -> str:
        corpus = make_corpus(folder / "documents", seed=0)
        file = folder / "config.yaml"
        vocab_size = open_corpus(corpus).tokenizer.vocab_size
        file.write_text(CONFIG.format(vocab_size=vocab_size, corpus=corpus, cache=folder / "cache"))
        file.with_suffix(".json").write_text(json.dumps({"corpus": str(corpus)}))
        return str(file)

    return once("resilience", make)


@pytest.fixture(scope="session")
def undisturbed(config_file: str, once: Callable[..., Any]) -> list[tuple]:
    """What each step of an undisturbed run on two processes gives."""

    def make(folder: Path) -> list[tuple]:
        train(folder / "undisturbed", "--config", config_file)
        return losses(folder / "undisturbed")

    return once("undisturbed", make)


@pytest.fixture(scope="session")
def without(config_file: str, once: Callable[..., Any]) -> list[tuple]:
    """What the steps give if packs 24 to 31, those of the seventh and eighth step, were not there."""

    def make(folder: Path) -> list[tuple]:
        train(folder / "without", "--config", config_file, plant=without_packs, planted=(24, 8))
        return losses(folder / "without")

    return once("without", make)
