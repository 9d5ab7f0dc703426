"""The whole run in one typed, frozen tree: YAML in, dotted overrides on top, every field documented.

`load(file, overrides)` merges a YAML file and overrides such as `{"train.steps": "100"}` over the defaults; a key
that does not exist or has the wrong type is a `UserError` that names the nearest real one. `describe()` yields what
`--help` prints. A section, or a few that belong together, is a file here.

Imports no other package. Begin with `Config` below; `phases.py` is what it means for each step.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl import fields
from megatron_lcl.config.data import Corpus, Data
from megatron_lcl.config.model import Language, Model, Vision
from megatron_lcl.config.objective import Contrast, Objective
from megatron_lcl.config.optimizer import Optimizer, Zero
from megatron_lcl.config.run import (
    AttentionName,
    Average,
    Checkpoint,
    Evaluate,
    EvaluationTask,
    Guard,
    LabeledTask,
    Parallel,
    Train,
)
from megatron_lcl.config.schedule import EarlyPhase, Schedule
from megatron_lcl.config.types import STRICT

__all__ = [
    "AttentionName",
    "Average",
    "Checkpoint",
    "Config",
    "Contrast",
    "Corpus",
    "Data",
    "EarlyPhase",
    "Evaluate",
    "EvaluationTask",
    "Guard",
    "LabeledTask",
    "Language",
    "Model",
    "Objective",
    "Optimizer",
    "Parallel",
    "Schedule",
    "Train",
    "Vision",
    "Zero",
    "describe",
    "from_dict",
    "load",
    "replace",
    "resolved",
    "to_dict",
    "to_yaml",
]


@dataclass(frozen=True, config=STRICT)
class Config:
    """A pre-training run."""

    model: Model = Model()
    data: Data = Data()
    objective: Objective = Objective()
    contrast: Contrast = Contrast()
    optimizer: Optimizer = Optimizer()
    zero: Zero = Zero()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    train: Train = Train()
    average: Average = Average()
    evaluate: Evaluate = Evaluate()
    schedule: Schedule = Schedule()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="mapping merged into DeepSpeed's config as it is; keys that other fields here decide are refused",
    )

    def __post_init__(self) -> None:
        """`siglip` gives the model its parameter, with the published initial value."""
        if self.objective.name == "siglip" and self.model.logit_bias is None:
            object.__setattr__(self, "model", dataclasses.replace(self.model, logit_bias=-10.0))

    @property
    def initial_log_scale(self) -> float:
        """That of the contrast; where it is null, as published for the objective."""
        if self.contrast.initial_log_scale is not None:
            return self.contrast.initial_log_scale
        return math.log(10 if self.objective.name == "siglip" else 1 / 0.07)


# --- reading -----------------------------------------------------------------------------------------------------


def load(file: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> Config:
    """The config from a YAML file (or the defaults) with dotted overrides, e.g. {"train.steps": "100"}, on top.

    The type of its field decides what an override's text means (`fields.parse`): a name is taken as it is written, a
    list or a mapping is YAML. Raises UserError naming the key, its value, and the nearest real key.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        tree = fields.read_sections(file, "a config is a mapping of sections such as `train:` and `data:`")
    for key, value in (overrides or {}).items():
        fields.put(Config, tree, key.replace("-", "_"), value)
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The config from nested dicts; the inverse of `to_dict`. What is null: `fields.without_null`."""
    tree = fields.without_null(Config, tree)
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("corpora"), str):
        tree["data"] = {**data, "corpora": [{"path": data["corpora"]}]}
    return fields.build(Config, tree)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts of plain YAML values; `from_dict` gives the config back."""
    return fields.dump(config)


def resolved(config: Config) -> Config:
    """The same run with the number where null stands for one, for comparisons: configs that earlier versions wrote have
    the number."""
    return replace(config, contrast__initial_log_scale=config.initial_log_scale)


def to_yaml(config: Config) -> str:
    """The whole tree as YAML, what `--print-config` prints."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def run_yaml(config: Config) -> str:
    """As `to_yaml`, for the folder of a run that has started: without `data.allow_change`, which a start is given for
    itself alone. Who goes on by that config later is asked again."""
    return to_yaml(replace(config, data__allow_change=False))


def replace(config: Config, **dotted: Any) -> Config:
    """A copy with dotted fields replaced, dots written as two underscores: `replace(c, train__steps=10)`."""
    tree = to_dict(config)
    for key, value in dotted.items():
        *sections, name = key.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return from_dict(tree)


# --- describing --------------------------------------------------------------------------------------------------


def describe(items: bool = False) -> Iterator[tuple[str, str, str, str]]:
    """Every field as (dotted name, type, default, help), in order; items: as `fields.describe` has them."""
    return fields.describe(Config, items=items)


def describe_sections() -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    """Every section, "" for what is in none, with its fields as `describe(items=True)` has them."""
    for section, found in itertools.groupby(describe(items=True), lambda f: f[0].partition("[")[0].rpartition(".")[0]):
        yield section, list(found)
