"""What is measured of an encoder, frozen: one file of numbers in the folder of its run, written once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_lcl import objectives
from megatron_lcl.claim.data import CORPORA, DIGITS, EVALUATE, HELD_OUT, KINDS, NAMES
from megatron_lcl.config import Config
from megatron_lcl.convert.load import load_model
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.scratch import clear_dead, scratch_folder
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.spec import parse_spec
from megatron_lcl.evaluate.encoders.untrained import untrained_model
from megatron_lcl.evaluate.heldout import evaluate_heldout
from megatron_lcl.evaluate.heldout_results import as_result, num_queries
from megatron_lcl.evaluate.results import Result
from megatron_lcl.evaluate.rules import VERSION
from megatron_lcl.evaluate.run import evaluate
from megatron_lcl.evaluate.settings import AttentiveSettings, LinearSettings, Settings
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.filesystem import is_file

RESULT, VALIDATION = "claim.json", "claim-validation.json"
SETTINGS = Settings(
    linear_probe=LinearSettings(strengths=tuple(10.0**e for e in range(-4, 2))),
    attentive_probe=AttentiveSettings(epochs=10, seeds=(0,)),
)
"""the number of encoders is what seeds are spent on; C above 10 took most of the time of a linear probe of two thousand
images, and gained nothing"""
_PROBES = ("linear-probe", "attentive-probe", "knn")
_TEXT = ("zero-shot", "retrieval")


@dataclass(frozen=True)
class Measure:
    """One number of one encoder."""

    data: str
    task: str
    metric: str
    value: float
    chance: float | None = None
    """what guessing gives; where classes are not alike in number: always the most frequent one"""
    items: int = 0
    rules: int | None = None
    """version of the rules of held-out evaluation; None: it was measured otherwise, or by an earlier release"""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is, whoever it was measured of."""
        return self.data, self.task, self.metric


def measured(folder: Path, model: str, config: Config, data: Path) -> list[Measure]:
    """All that a row is compared by, of the run's folder, or measured now and written there.

    Measured again where the rules of held-out evaluation were others: a table is of one version of them.

    model: as `evaluate` takes it; config: of its run; data: the folder that `data.prepare` made. What needs a text
    side is left out where the objective trains none.
    """
    file = folder / RESULT
    if not is_file(file) or any(m.data == HELD_OUT and m.rules != VERSION for m in read(file)):
        folder.mkdir(parents=True, exist_ok=True)
        found = list(_measure(folder, model, config, data))
        replace_text(file, json.dumps([asdict(measure) for measure in found], indent=1, ensure_ascii=False) + "\n")
    return read(file)


def read(file: Path) -> list[Measure]:
    """The numbers of a file that `measured` wrote. UserError where it is damaged."""
    try:
        return [Measure(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it, and it is measured again") from None


def validated(folder: Path, model: str, data: Path) -> float:
    """The number that learning rates are chosen by: accuracy of the attentive probe on kinds of emoji.

    Of the validation split. Every objective trains the patches that it reads, and none has an advantage by its text
    side or pool.
    """
    file = folder / VALIDATION
    if not is_file(file):
        found = list(_labeled(folder, model, ["attentive-probe"], data, KINDS[0], "validation"))
        replace_text(file, json.dumps([asdict(measure) for measure in found], indent=1, ensure_ascii=False) + "\n")
    return next(measure.value for measure in read(file) if measure.metric == "accuracy")


def _measure(folder: Path, model: str, config: Config, data: Path) -> Iterator[Measure]:
    for name in (*KINDS, DIGITS):
        yield from _labeled(folder, model, _PROBES, data, name)
    trains = objectives.create(config).trains
    if "retrieval" in trains:
        for name in NAMES:
            yield from _labeled(folder, model, _TEXT, data, name)
    yield from (replace(measure, rules=VERSION) for measure in _held_out(model, config, data))


def _labeled(
    folder: Path, model: str, tasks: Sequence[str], data: Path, name: str, split: str = "test"
) -> Iterator[Measure]:
    clear_dead(folder)
    with scratch_folder(folder) as cache:  # of one use, and large
        results = evaluate(
            [model],
            tasks,
            data / EVALUATE / name,
            split=split,
            settings=SETTINGS,
            cache=cache,
            devices=("cuda:0",) if torch.cuda.is_available() else ("cpu",),
            progress=False,
        )
    labels = open_images(data / EVALUATE / name, split).need_labels()
    frequent = float(np.bincount(labels).max() / len(labels))
    for result in results:
        for measure in _measures(name, result):
            is_probe = tasks is not _TEXT and measure.metric == "accuracy"
            yield replace(measure, chance=max(frequent, measure.chance or 0.0)) if is_probe else measure


def _measures(name: str, result: Result) -> Iterator[Measure]:
    for metric, m in result.metrics.items():
        yield Measure(name, result.task, metric, m.value, m.chance, result.num_items)


def _held_out(model: str, config: Config, data: Path) -> Iterator[Measure]:
    """The contrast on contexts of interleaved documents, and bits a token, of what the objective trains."""
    spec = parse_spec(model)
    lcl = load_model(model) if spec.seed is None else untrained_model(spec.name, spec.seed)[0]
    lcl = lcl.to("cuda" if torch.cuda.is_available() else "cpu")
    found, _ = evaluate_heldout(lcl, config, data / CORPORA / HELD_OUT, num_examples=0, progress=False)
    if found.pairs:
        items = num_queries(found)
        yield from (replace(m, items=items[m.metric]) for m in _measures(HELD_OUT, as_result(found, "")))
    if found.bits_per_token is not None:
        yield Measure(HELD_OUT, "generation", "bits a token", found.bits_per_token, None, found.targets)
