"""From a row to runs that see the same number of images, in batches of the same number of images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.claim.parts import WARMUP, Row
from megatron_lcl.config import Config
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.packing import max_sequences
from megatron_lcl.data.loading.source import open_source
from megatron_lcl.data.loading.summary import Summary, summarize_config
from megatron_lcl.errors import UserError
from megatron_lcl.train.sweep import Member

SLACK = 1.1
"""token slots and places for sequences of a pack, over what its images need: so image slots run out first"""


@dataclass(frozen=True)
class Plan:
    """How a row is trained, but for learning rate, seed and number of steps."""

    row: Row
    file: Path
    overrides: Mapping[str, str]
    config: Config
    summary: Summary
    """of its packs"""

    @property
    def images_per_step(self) -> float:
        """The mean."""
        return self.summary.images / self.summary.packs * self.config.train.global_batch

    @property
    def pairs_per_step(self) -> float:
        """Images of a step that take part in the contrast, the mean; 0 where nothing is contrasted."""
        return self.summary.pairs / self.summary.packs * self.config.train.global_batch

    def steps(self, images: float) -> int:
        """In which the row sees so many images."""
        return max(1, round(images / self.images_per_step))

    def member(self, folder: Path, name: str, images: float, lr: float, seed: int) -> Member:
        """The run `folder`/`name`."""
        steps = self.steps(images)
        overrides = {
            **self.overrides,
            "optimizer.lr": repr(lr),
            "optimizer.warmup": str(round(steps * WARMUP)),
            "train.steps": str(steps),
            "train.log_every": "1",  # the table counts images
            "train.seed": str(seed),
            "data.seed": str(seed),
            "train.output": str(folder / name),
        }
        return Member(name, overrides, configs.load(self.file, overrides))


def plan(row: Row, file: Path, given: Mapping[str, str], corpora: Path, cache: Path) -> Plan:
    """The plan of a row.

    file: config that all rows have in common; given: dotted fields over it. A pack has the same number of image slots,
    `data.images_per_pack`, in all rows, and as many token slots as fill these: an image comes with more tokens in one
    row than in another. A corpus's weight, which counts tokens, is such that `row.shares` are of images.

    UserError where the config leaves the number of image slots open, or a corpus has no images.
    """
    overrides = {**given, **row.overrides, "data.cache": str(cache)}
    overrides["data.corpora"] = json.dumps([{"path": str(corpora / name)} for name in row.shares])
    overrides["model.language.vocab_size"] = str(open_corpus(corpora / next(iter(row.shares))).tokenizer.vocab_size)
    config = configs.load(file, overrides)
    slots, context = config.data.images_per_pack, config.model.language.context_length
    if slots is None:
        raise UserError(f"{file}: data.images_per_pack is open; `claim` needs a number, the same in all runs")
    patches, sequences = config.model.vision.num_patches, objectives.create(config).sequences
    wide = configs.replace(config, data__tokens_per_pack=2 * context + patches + 2).data  # nothing is cut for its sake
    total, tokens, pieces = sum(row.shares.values()), 0.0, 0.0
    """of an image: token slots, sequences"""
    weights = {}
    for name, share in row.shares.items():
        source = open_source(corpora / name, wide, patches, context, slots, sequences)
        images = int(source.images.sum(dtype=np.int64))
        if not images:
            raise UserError(f"{corpora / name} has no image that `{row.name}` reads")
        weights[name] = share * int(source.tokens.sum(dtype=np.int64)) / images
        tokens += weights[name] / total
        pieces += share / total * (np.count_nonzero(source.tokens) / images if sequences.interleaved else 1)
    overrides["data.corpora"] = json.dumps(
        [{"path": str(corpora / name), "weight": round(weight, 4)} for name, weight in weights.items()]
    )
    width = max(wide.tokens_per_pack, SLACK * slots * tokens)
    while max_sequences(round(width), sequences.captions) < SLACK * slots * pieces:
        width *= SLACK
    overrides["data.tokens_per_pack"] = str(64 * math.ceil(width / 64))
    config = configs.load(file, overrides)
    return Plan(row, file, overrides, config, summarize_config(config, sequences, None, 0))
