"""What has changed since the checkpoint that a run goes on from was written, and what of it needs a warning."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lcl import objectives
from megatron_lcl.config import Config, load, resolved, to_dict
from megatron_lcl.config.phases import phase_at
from megatron_lcl.config.results import NO_RESULT, START
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.fields import flat
from megatron_lcl.model.layers import parameter_shapes
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.checkpoint.earlier_weight import earlier_weight
from megatron_lcl.train.checkpoint.folder import Progress, read_progress
from megatron_lcl.train.optimizer import SCHEDULE, learning_rate, muon_parts
from megatron_lcl.train.parts import called, frozen_parameters

JUMP = 1.1
"""a factor by which the learning rate may differ from that of the old schedule without a warning"""
NO_EFFECT = (
    *(*NO_RESULT, "evaluate.", "average.", "train.evaluate_every"),
    *("train.seed", "train.init_from", "contrast.initial_log_scale"),  # with what a run begins
)
"""settings, or sections, that change nothing of what is trained from a checkpoint on"""
LOSS = ("objective.", "data.", "model.", "train.global_batch")
"""those that make the loss of the same model another one; but for NO_RESULT"""
CORPORA = "data.corpora."
UNSET = "(not set)"
PHASES = "schedule.phases."


@dataclass(frozen=True)
class BlendChange:
    """Other corpora in a run's blend, whatever their paths: path and fingerprint of each."""

    from_pack: int
    """the first window of documents that begins there or later has them"""
    gone: tuple[tuple[str, str], ...]
    new: tuple[tuple[str, str], ...]

    @classmethod
    def between(cls, before: Ledger, now: Ledger) -> BlendChange | None:
        """None where the corpora are the same, also at other paths or with other weights."""
        old, new = before.blends()[-1], now.blends()[-1]
        a, b = ({c["fingerprint"]: c["path"] for c in entry["blend"]} for entry in (old, new))
        gone, came = (tuple((x[f], f) for f in x if f not in y) for x, y in ((a, b), (b, a)))
        return cls(new["from_pack"], gone, came) if gone or came else None

    def __str__(self) -> str:
        without, also = (
            ", ".join(f"{path} (fingerprint {fingerprint})" for path, fingerprint in corpora) or "nothing"
            for corpora in (self.gone, self.new)
        )
        return f"without {without}, with {also}, from the window of documents that begins behind pack {self.from_pack}"


@dataclass(frozen=True)
class Changes:
    """Between a checkpoint and the run that goes on from it."""

    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """value before and now, by the dotted name"""
    warnings: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = NO_EFFECT
    new_loss: bool = False
    """whether the losses to come are not to be compared with those before"""
    blend: BlendChange | None = None

    def before(self, name: str, now: Any) -> Any:
        """What a setting was that is `now`."""
        return self.settings.get(name, (now, now))[0]

    def lines(self) -> Iterator[str]:
        """For the log: each setting that has an effect on a line of its own, the others on one."""
        names = [name for name in self.settings if name not in START]
        without = [name for name in names if name.startswith(self.without_effect)]
        yield from (f"setting changed: {self.said(name)}" for name in names if name not in without)
        if self.blend:
            yield f"blend changed: {self.blend}"
        if without:
            yield f"changed without effect on what is trained: {', '.join(map(self.said, without))}"
        yield from (f"warning: {warning}" for warning in self.warnings)

    def said(self, name: str) -> str:
        """A setting with both values."""
        before, now = self.settings[name]
        return f"{name} {text_of(before)} → {text_of(now)}"


def changes_since(folder: Path, config: Config) -> Changes:
    """What a run with `config` that goes on from a checkpoint does otherwise than the one that wrote it."""
    before, progress = load(folder / CONFIG), read_progress(folder)
    parts = changed_parts(before, config, progress)
    changes = Changes(changed_settings(before, config) | parts)
    drops = any(encoder.drop_path for encoder in (config.model.vision, config.model.language))
    return replace(
        changes,
        warnings=(
            *_jumps(changes, before, config, folder),
            *_unfrozen(before, config, progress.step),
            *_weight(folder, before, config),
        ),
        without_effect=(
            *(name for name in NO_EFFECT if not (drops and name == "train.seed")),  # it draws these paths
            *_finished(changes, before, config, progress.step),
        ),
        new_loss=bool(parts) or _has_new_loss(before, config, folder),
    )


def changed_settings(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted name in alphabetical order: value before and now."""
    old, new = map(_settings, (before, now))
    pairs = {name: (old.get(name, UNSET), new.get(name, UNSET)) for name in sorted(old.keys() | new.keys())}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b and not _says_nothing(name, a, b)}


def _says_nothing(name: str, *values: Any) -> bool:
    """Of a phase that only one of two configs has: what it leaves as it is, and that the other has none at all."""
    return name.startswith(PHASES.rstrip(".")) and all(value in (None, UNSET, []) for value in values)


def changed_parts(before: Config, now: Config, progress: Progress) -> dict[str, tuple[Any, Any]]:
    """Weights of the objective's terms that its package had otherwise when it wrote a checkpoint with the config
    `before`, as `changed_settings` has settings. None where it is one of ours, or an earlier version recorded none."""
    if not progress.parts or before.objective.name != now.objective.name:
        return {}
    old, new = progress.parts, objectives.parts_of(before)  # what is due to settings is told as such
    pairs = {name: (old.get(name, UNSET), new.get(name, UNSET)) for name in sorted(old.keys() | new.keys())}
    return {f"objective.parts.{name}": (a, b) for name, (a, b) in pairs.items() if new and a != b}


def _settings(config: Config) -> dict[str, Any]:
    """By dotted name; of the objective's weights those that it reads, as they count."""
    settings = flat(to_dict(resolved(config)), lists=True)
    if config.objective.name not in objectives.names():  # of a package that is not installed here
        return settings
    all_weights = {f"objective.{name}" for name in objectives.WEIGHTS}
    kept = {name: value for name, value in settings.items() if name not in all_weights}
    return kept | {f"objective.{name}": value for name, value in objectives.create(config).weights.items()}


def text_of(value: Any) -> str:
    """A setting's value, for a message."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _finished(changes: Changes, before: Config, now: Config, step: int) -> Iterator[str]:
    """The changed settings of the schedule that say nothing of the steps from `step` on: of phases that are over in
    both configs, or that one does not have; their lengths where those to come end as they would have."""
    ends = [[*itertools.accumulate(phase.steps for phase in config.schedule.phases)] for config in (before, now)]
    as_before = len({tuple(end for end in of_one if end > step) for of_one in ends}) == 1
    for name in changes.settings:
        if name.startswith(PHASES):
            number, _, field_name = name.removeprefix(PHASES).partition(".")
            is_over = all(end <= step for of_one in ends for end in of_one[int(number) : int(number) + 1])
            if is_over and (as_before or field_name != "steps"):
                yield name
    doublings = (tuple(d for d in config.schedule.batch_doublings if d > step) for config in (before, now))
    if len(set(doublings)) == 1:
        yield "schedule.batch_doublings"


def _has_new_loss(before: Config, now: Config, folder: Path) -> bool:
    """Whether the next step has another loss than it would have had, in whichever phases it is and would have been.
    Other corpora, or other shares of theirs, are for the ledger to know (`begins_other_blend`)."""
    step = read_progress(folder).step
    of_step = (phase_at(config, step).config_at(step) for config in (before, now))
    changed = [name for name in changed_settings(*of_step) if name.startswith(LOSS) and not name.startswith(CORPORA)]
    return earlier_weight(folder, now) is not None or any(not name.startswith(NO_RESULT) for name in changed)


def _jumps(changes: Changes, before: Config, now: Config, folder: Path) -> Iterator[str]:
    """Where the next step's learning rate is far from what the old schedule has there.

    Behind the end of the old schedule its last step counts.
    """
    step = read_progress(folder).step
    if not 0 < step < now.train.steps:
        return
    goes_on = step < before.train.steps
    last, value = learning_rate(step - 1, before), learning_rate(step, now)
    expected = learning_rate(step, before) if goes_on else last
    if expected / JUMP <= value <= expected * JUMP:
        return
    cause = [name for name in changes.settings if name in SCHEDULE]
    because = ", ".join(map(changes.said, cause))
    said = (
        f"the learning rate jumps from {last:.2g} in step {step}, the last one, to {value:.2g} in step {step + 1}, "
        f"the next one ({because})"
    )
    remedy = f"a longer run begins smoothly as a new one with --train.init_from {folder}, with a warmup of its own"
    if goes_on:
        back = " ".join(f"--{name} {text_of(changes.settings[name][0])}" for name in cause)
        remedy = f"{back} goes on as before; {remedy}"
        said = (
            f"the learning rate of step {step + 1}, the next one, is {value:.2g}, where the schedule so far has "
            f"{expected:.2g} ({because}); step {step}, the last one, had {last:.2g}"
        )
    yield f"{said}. If that is not meant: {remedy}"


def _unfrozen(before: Config, now: Config, step: int) -> Iterator[str]:
    """Where moments begin at zero and AdamW's count of steps, one for all parameters, does not.

    Nothing of StableAdamW, whose clipping bounds such steps, nor of Muon's matrices, whose updates are of one size.
    """
    optimizer, model = now.optimizer, now.model
    shapes, names = parameter_shapes(model), frozen_parameters(before) - frozen_parameters(now)
    if optimizer.name == "muon":
        names = frozenset(name for name in names if not muon_parts(name, shapes[name], model, per_head=False))
    factor, number = largest_step(optimizer.betas, step)
    if not names or optimizer.name == "stable_adamw" or factor <= JUMP:
        return
    parts = sorted({called(name, model).partition(".")[0] for name in names})
    rates = " and ".join(f"optimizer.parts.{part}.lr" for part in parts)
    yield (
        f"more of {' and '.join(parts)} is trained than before: its moments begin at zero, without Adam's correction "
        f"of their bias, and its steps are up to {factor:.2f} learning rates (optimizer.betas = {[*optimizer.betas]}, "
        f"step {number} from here). To have none above one: {rates} {1 / factor:.2f} for the first steps, or a new run "
        "with --train.init_from, which begins with new moments of all"
    )


def largest_step(betas: tuple[float, float], step: int) -> tuple[float, int]:
    """The largest of AdamW's steps of a parameter whose gradient stays the same and whose moments are zero after `step`
    steps of others, in learning rates, and which one it is, counted from 1.

    The k-th is (1 - b1^k) / sqrt(1 - b2^k), divided by the same of step + k, which the bias correction counts.
    """
    first, second = betas
    k = np.arange(1.0, math.ceil(10 / (1 - first)) + 1)  # later ones are smaller: of b1^k nothing is left

    def ratio(k: np.ndarray) -> np.ndarray:
        return (1 - first**k) / np.sqrt(1 - second**k)

    factors = ratio(k) / ratio(step + k)
    return float(factors.max()), int(factors.argmax()) + 1


def _weight(folder: Path, before: Config, now: Config) -> Iterator[str]:
    """Where the loss counted otherwise, as `earlier_weight` says."""
    weight = earlier_weight(folder, now)
    if weight is None:
        return
    wanted, now_flat = weight.settings(before.optimizer), flat(to_dict(now), lists=True)
    if weight.known and all(abs(now_flat[name] / value - 1) < 0.01 for name, value in wanted.items()):
        return
    verb, moments = ("weighted", "are converted") if weight.known else ("may have weighted", "stay as they are")
    tells = "" if weight.known else ", which metrics beside it would tell"
    yield (
        f"the version that wrote {folder} {verb} the loss of `{now.objective.name}` with {weight.field} = "
        f"{weight.value:g}{tells}; now it counts once, which makes gradients {1 / weight.value:g} times as large. "
        f"Adam's moments {moments}. To clip and step as before: "
        + " ".join(f"--{name} {value:g}" for name, value in wanted.items())
    )
