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
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.ledger import open_run_ledger
from megatron_lcl.data.loading.loader import loader_of
from megatron_lcl.data.loading.packing import max_sequences
from megatron_lcl.data.loading.sequence import Sequences
from megatron_lcl.data.loading.source import open_source
from megatron_lcl.errors import UserError
from megatron_lcl.train.sweep import Member

FULL = 0.96
"""share of the images a step that `data.images_per_pack` stands for, which the mean step is to have"""
_ATTEMPTS = 3


@dataclass(frozen=True)
class Plan:
    """How a row is trained, but for learning rate, seed and number of steps."""

    row: Row
    file: Path
    overrides: Mapping[str, str]
    config: Config
    counts: np.ndarray
    """int64 [steps, 2]: images of each step, and those of them in the contrast; as many steps as a run may have"""

    def steps(self, images: float) -> int:
        """After which the row has seen so many images, or nearly."""
        seen = np.concatenate([[0], np.cumsum(self.counts[:, 0])])
        return max(1, int(np.abs(seen - images).argmin()))

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


def plan(row: Row, file: Path, given: Mapping[str, str], corpora: Path, cache: Path, images: int) -> Plan:
    """The plan of a row for runs of up to so many images.

    file: config that all rows have in common; given: dotted fields over it. Steps of all rows have nearly the same mean
    number of images, `data.images_per_pack` of each pack: a pack has as many token slots as these need, an image coming
    with more tokens in one row than in another, and more image slots where long texts leave some empty. A corpus's
    weight, which counts tokens, is such that `row.shares` are of images.

    UserError where the config leaves the number of image slots open, or a corpus has no images.
    """
    overrides = {**given, **row.overrides, "data.cache": str(cache)}
    overrides["data.corpora"] = json.dumps([{"path": str(corpora / name)} for name in row.shares])
    overrides["model.language.vocab_size"] = str(open_corpus(corpora / next(iter(row.shares))).tokenizer.vocab_size)
    config = configs.load(file, overrides)
    slots, context = config.data.images_per_pack, config.model.language.context_length
    if slots is None:
        raise UserError(f"{file}: data.images_per_pack is open; `claim` needs a number, the same in all runs")
    if len(phases_of(config)) > 1:
        raise UserError(
            f"{row.name}: `claim` counts images in steps that are all alike; leave out schedule.phases, "
            "schedule.batch_doublings and model.vision.unmasked_steps"
        )
    patches, sequences = config.model.vision.num_placeholders, objectives.create(config).sequences
    wide = configs.replace(config, data__tokens_per_pack=2 * context + patches + 2).data  # nothing is cut for its sake
    total, tokens, pieces = sum(row.shares.values()), 0.0, 0.0
    """of an image: token slots, sequences"""
    weights = {}
    for name, share in row.shares.items():
        source = open_source(corpora / name, wide, patches, context, slots, sequences)
        stored = int(source.images.sum(dtype=np.int64))
        if not stored:
            raise UserError(f"{corpora / name} has no image that `{row.name}` reads")
        weights[name] = share * int(source.tokens.sum(dtype=np.int64)) / stored
        tokens += weights[name] / total
        pieces += share / total * (np.count_nonzero(source.tokens) / stored if sequences.interleaved else 1)
    overrides["data.corpora"] = json.dumps(
        [{"path": str(corpora / name), "weight": round(weight, 4)} for name, weight in weights.items()]
    )
    wanted, attempts = slots * config.train.global_batch, 0
    while True:
        # no more tokens, or packing would take long texts first to fill them
        width = max(wide.tokens_per_pack, math.ceil(slots * tokens))
        while max_sequences(width, sequences.doubled) < slots * pieces:
            width += 1
        overrides |= {"data.tokens_per_pack": str(width), "data.images_per_pack": str(slots)}
        config = configs.load(file, overrides)
        counts = _count(config, sequences, images)
        mean = float(counts[:, 0].mean())
        attempts += 1
        if mean >= FULL * wanted or attempts == _ATTEMPTS:
            return Plan(row, file, overrides, config, counts)
        slots = math.ceil(slots * wanted / mean)


def _count(config: Config, sequences: Sequences, images: int) -> np.ndarray:
    """Of the first steps of a run, up to so many images and one more: see `Plan.counts`."""
    ledger = open_run_ledger(config, sequences)
    loader = loader_of(ledger.reading_at(0, config)[0], config.data, sequences, ledger=ledger)
    counts: list[tuple[int, int]] = []
    seen = pack = 0
    while seen <= images:
        origins = [
            image
            for number in range(pack, pack + config.train.global_batch)
            for origin in loader.reader.provenance(number)
            for image in origin.images
        ]
        pack += config.train.global_batch
        seen += len(origins)
        counts.append((len(origins), sum(image.pair for image in origins)))
    loader.reader.index.close()
    return np.array(counts, np.int64)
