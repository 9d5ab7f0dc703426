"""From a row to runs that see the same number of images, in batches of the same number of images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lcl import config as configs
from megatron_lcl import fields, objectives
from megatron_lcl.claim.parts import WARMUP, Part, Row
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.ledger import open_run_ledger
from megatron_lcl.data.loading.loader import loader_of
from megatron_lcl.data.loading.packing import max_sequences
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.data.loading.source import open_source
from megatron_lcl.errors import UserError
from megatron_lcl.model.flops import Sizes, of_step
from megatron_lcl.train.parts import frozen_parameters
from megatron_lcl.train.sweep import Member, own_mirror

_CLOSE = 0.04
"""part by which the mean images a step may differ from what `data.images_per_pack` stands for"""
_ATTEMPTS = 4
OWN = {
    "train.steps": "give --images",
    "train.seed": "give --seeds",
    "data.seed": "give --seeds",
    "optimizer.lr": "give --rates",
    "optimizer.warmup": f"leave it out, it is {WARMUP:g} of the steps",
    "schedule.phases": "choose rows that have phases with --part",
    "train.output": "give --output",
    "data.cache": "leave it out, it lies in --output",
    "data.corpora": "choose rows with --part, or other sets with --sets",
    "data.tokens_per_pack": "give --data.images_per_pack, from which it follows",
    "model.language.vocab_size": "leave it out, it is that of the corpora",
    "train.log_every": "leave it out, the table needs every step",
}
"""fields that `claim` sets in all runs, and what to do instead of giving them"""


@dataclass(frozen=True)
class Stretch:
    """Steps of a run that are alike: all, or those of a phase."""

    share: float
    """of the images that a run sees"""
    counts: np.ndarray
    """int64 [steps, 2]: images of each step, and those of them in the contrast; as many steps as there may be"""
    flops: float
    """floating-point operations that the first step needs; the slots of all are the same, only targets differ"""
    changed: Mapping[str, Any] = field(default_factory=dict)
    """what is otherwise in this phase, as in `schedule.phases`"""

    def steps(self, images: float) -> int:
        """After which a run of so many images has seen this stretch's share of them, or nearly."""
        seen = np.concatenate([[0], np.cumsum(self.counts[:, 0])])
        return max(1, int(np.abs(seen - self.share * images).argmin()))


@dataclass(frozen=True)
class Plan:
    """How a row is trained, but for learning rate, seed and number of steps."""

    row: Row
    file: Path
    overrides: Mapping[str, str]
    config: Config
    """as the run ends"""
    stretches: tuple[Stretch, ...]

    def steps(self, images: float) -> int:
        """Of a run that sees so many images, or nearly."""
        return sum(stretch.steps(images) for stretch in self.stretches)

    def counts(self, images: float) -> np.ndarray:
        """Of the steps of such a run, see `Stretch.counts`; each phase as if the run began with it."""
        return np.concatenate([stretch.counts[: stretch.steps(images)] for stretch in self.stretches])

    def flops(self, images: float) -> float:
        """Floating-point operations of such a run, or nearly."""
        return sum(stretch.steps(images) * stretch.flops for stretch in self.stretches)

    def member(self, folder: Path, name: str, images: float, lr: float, seed: int) -> Member:
        """The run `folder`/`name`."""
        steps, early = self.steps(images), self.stretches[:-1]
        own = {
            "optimizer.lr": repr(lr),
            "optimizer.warmup": str(round(steps * WARMUP)),
            "train.steps": str(steps),
            "train.log_every": "1",  # the table counts images
            "train.seed": str(seed),
            "data.seed": str(seed),
            "train.output": str(folder / name),
        }
        if early:
            phases = [{"steps": stretch.steps(images), **stretch.changed} for stretch in early]
            own["schedule.phases"] = json.dumps(phases)
        overrides = _with(self.overrides, own) | own_mirror(configs.load(self.file, self.overrides), name)
        if self.row.cooldown:
            overrides["schedule.cooldown"] = str(round(steps * self.row.cooldown))
        return Member(name, overrides, configs.load(self.file, overrides))


def check_given(part: Part, given: Mapping[str, str]) -> None:
    """UserError where a dotted field is given that `claim` or a row of the part sets itself."""
    tree: dict[str, Any] = {}
    for key, text in given.items():
        fields.put(Config, tree, key.replace("-", "_"), text)
    for key in fields.flat(tree):
        if key in OWN:
            raise UserError(f"--{key}: `claim` sets it itself; {OWN[key]}")
        for row in part.rows:
            if key in row.sets:
                raise UserError(f"--{key}: row {row.name} of part {part.name} has its own; leave it out")


def _with(overrides: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The overrides with fields that `claim` sets, all of which `check_given` refuses."""
    assert own.keys() <= OWN.keys(), own
    return {**overrides, **own}


def plan(row: Row, file: Path, given: Mapping[str, str], corpora: Path, cache: Path, images: int) -> Plan:
    """The plan of a row for runs of up to so many images.

    file: config that all rows have in common; given: dotted fields over it. Steps of all rows have nearly the same mean
    number of images, `data.images_per_pack` of each pack: a pack has as many token slots as these need, an image coming
    with more tokens in one row than in another, and more image slots where long texts leave some empty. A corpus's
    weight, which counts tokens, is such that `row.shares` are of images, in the phase that a run ends with.

    UserError where the config leaves the number of image slots open or has phases of its own, or a corpus has no
    images.
    """
    own = {
        "data.cache": str(cache),
        "data.corpora": json.dumps([{"path": str(corpora / name)} for name in row.shares]),
        "model.language.vocab_size": str(open_corpus(corpora / next(iter(row.shares))).tokenizer.vocab_size),
    }
    overrides = _with({**given, **row.overrides}, own)
    config = configs.load(file, overrides)
    if config.data.images_per_pack is None:
        raise UserError(f"{file}: data.images_per_pack is open; `claim` needs a number, the same in all runs")
    if len(phases_of(config)) > 1:
        raise UserError(
            f"{row.name}: `claim` says itself which steps differ; leave out schedule.phases, schedule.batch_doublings "
            "and model.vision.unmasked_steps"
        )
    needs, weights = _needs(row, config, corpora)
    blend = [{"path": str(corpora / name), "weight": round(weight, 4)} for name, weight in weights.items()]
    overrides = _with(overrides, {"data.corpora": json.dumps(blend)})
    last = 1 - sum(share for share, _ in row.early)
    ends = configs.load(file, overrides)
    config, counts, flops = _packs(ends, needs, last * images)
    overrides |= _slots(config, "data.")  # of which `images_per_pack` says what is wanted
    early = []
    for share, changed in row.early:
        phases = [{"steps": 1, **changed}]
        first = phases_of(configs.replace(ends, train__steps=2, schedule__phases=phases))[0].config
        here, of_phase, cost = _packs(first, _needs(row, first, corpora)[0], share * images)
        early.append(Stretch(share, of_phase, cost, {**changed, **{k: int(v) for k, v in _slots(here).items()}}))
    return Plan(row, file, overrides, config, (*early, Stretch(last, counts, flops)))


@dataclass(frozen=True)
class _Needs:
    """Of an image, in the mean."""

    tokens: float
    """token slots"""
    sequences: float


def _slots(config: Config, prefix: str = "") -> dict[str, str]:
    return {
        f"{prefix}tokens_per_pack": str(config.data.tokens_per_pack),
        f"{prefix}images_per_pack": str(config.data.images_per_pack),
    }


def _needs(row: Row, config: Config, corpora: Path) -> tuple[_Needs, dict[str, float]]:
    """What an image needs of a pack, and the corpora's weights."""
    context, patches = config.model.language.context_length, config.model.vision.num_placeholders
    slots, sequences = config.data.images_per_pack, objectives.create(config).sequences
    assert slots is not None
    wide = configs.replace(config, data__tokens_per_pack=2 * context + patches + 2).data  # nothing is cut for its sake
    total, tokens, pieces, weights = math.fsum(row.shares.values()), 0.0, 0.0, {}
    for name, share in row.shares.items():
        source = open_source(open_corpus(corpora / name), wide, patches, context, slots, sequences)
        stored = int(source.images.sum(dtype=np.int64))
        if not stored:
            raise UserError(f"{corpora / name} has no image that `{row.name}` reads")
        weights[name] = share * int(source.tokens.sum(dtype=np.int64)) / stored
        tokens += weights[name] / total
        pieces += share / total * (np.count_nonzero(source.tokens) / stored if sequences.interleaved else 1)
    return _Needs(tokens, pieces), weights


def _packs(config: Config, needs: _Needs, images: float) -> tuple[Config, np.ndarray, float]:
    """The config with packs that hold `data.images_per_pack` in the mean, and what `_count` says of so many images."""
    slots, context = config.data.images_per_pack, config.model.language.context_length
    assert slots is not None
    sequences = objectives.create(config).sequences
    least = 2 * context + config.model.vision.num_placeholders + 2
    wanted = slots * config.train.global_batch
    tried: dict[int, tuple[float, Config, np.ndarray, float]] = {}
    while slots not in tried and len(tried) < _ATTEMPTS:
        # no more tokens than the images' texts have: the rest would be padding
        width = max(least, math.ceil(slots * needs.tokens))
        while max_sequences(width, sequences.doubled) < slots * needs.sequences:
            width += 1
        config = configs.replace(config, data__tokens_per_pack=width, data__images_per_pack=slots)
        counts, flops = _count(config, sequences, images)
        mean = float(counts[:, 0].mean())
        tried[slots] = abs(mean / wanted - 1), config, counts, flops
        if tried[slots][0] <= _CLOSE:
            break
        slots = round(slots * wanted / mean)
    return min(tried.values(), key=lambda attempt: attempt[0])[1:]


def _count(config: Config, sequences: Sequences, images: float) -> tuple[np.ndarray, float]:
    """Of the first steps of a run, up to so many images and one more: see `Stretch.counts`, `.flops`."""
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
    sizes = Sizes.of(loader.reader[(number,)] for number in range(config.train.global_batch))
    contrast, frozen = objectives.create(config).all_features_first, frozen_parameters(config)
    cost = of_step(config.model, sizes, sizes.pairs, contrast=contrast, frozen=frozen)
    loader.reader.index.close()
    return np.array(counts, np.int64), cost.total
