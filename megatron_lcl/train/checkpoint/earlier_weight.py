"""Going on from a version in which `clip` and `generation` weighted their one loss, as `lcl` does its two.

They minimized `objective.contrastive_weight` or `generation_weight` times the loss, where now it counts once. Of the
same loss Adam's moments are then in other units, and `optimizer.clip_norm` and `eps` mean something else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lcl.config import Config, load
from megatron_lcl.filesystem import exists
from megatron_lcl.run_folder import CONFIG, METRICS, PROGRESS

TERMS = {"clip": ("contrastive", "contrastive_weight"), "generation": ("generation", "generation_weight")}
"""the one loss of an objective, and the setting that was its weight"""


@dataclass(frozen=True)
class EarlierWeight:
    """What the steps before a checkpoint weighted their one loss with."""

    value: float
    field: str
    """the setting that it was"""
    known: bool
    """whether the run's metrics tell so; there may be none beside the checkpoint"""

    def settings(self, optimizer: Any) -> dict[str, float]:
        """What clips and steps now as these settings of the config's `optimizer` did then."""
        wanted = {"optimizer.clip_norm": optimizer.clip_norm, "optimizer.eps": optimizer.eps}
        return {name: value / self.value for name, value in wanted.items() if value}


def earlier_weight(folder: Path, config: Config) -> EarlierWeight | None:
    """Of a run with `config` that goes on from a checkpoint; None where the loss counted once, as it does now."""
    objective, progress = load(folder / CONFIG).objective, json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    # "partition" was called "cuts" in those versions and for a while after them
    if objective.name != config.objective.name or objective.name not in TERMS or "partition" in progress["layout"]:
        return None
    term, field = TERMS[objective.name]
    if (weight := getattr(objective, field)) is None:  # those versions wrote a number
        return None
    found = _in_metrics(folder.absolute().parents[1] / METRICS, progress["step"], term)
    if weight in (0, 1) or (found is not None and abs(found / weight - 1) > 0.01):
        return None
    return EarlierWeight(weight, f"objective.{field}", found is not None)


def rescale_moments(optimizer: Any, weight: float) -> None:
    """Adam's moments as they would be if the loss had not been weighted. optimizer: torch's own."""
    for state in optimizer.state.values():
        state["exp_avg"].div_(weight)
        state["exp_avg_sq"].div_(weight**2)


def _in_metrics(path: Path, step: int, term: str) -> float | None:
    """By what a run has logged up to a step: its loss over the loss without weight; None where nothing tells."""
    found = None
    for text in path.read_text(encoding="utf-8").splitlines() if exists(path) else ():
        try:
            line = json.loads(text)
            if line["step"] <= step and line[term] > 0:
                found = line["loss"] / line[term]
        except (ValueError, KeyError, TypeError):  # a line of something else, or one that was cut off
            continue
    return found
