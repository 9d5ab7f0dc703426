"""Settings that a config gives and its run does not use. A sweep may keep them, so they are said and not refused."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lcl import objectives
from megatron_lcl.config import Config, Evaluate, Schedule
from megatron_lcl.config import Objective as ObjectiveSection
from megatron_lcl.objectives.contrast import Contrast, SigmoidContrast


def unused_settings(config: Config) -> Iterator[str]:
    """A line for each setting that is not its default and without effect beside the others."""
    objective, own = config.objective, objectives.objective_class(config.objective.name)
    weights = [name for name in vars(ObjectiveSection()) if name.endswith("_weight")]
    without = [
        f"objective.{name}" for name in weights if getattr(objective, name) is not None and name not in own.published
    ]
    of_terms = (
        ("model.logit_bias", config.model.logit_bias, SigmoidContrast),
        ("contrast.initial_log_scale", config.contrast.initial_log_scale, Contrast),
    )
    if not objectives.package_of(config):  # terms of another package may read them
        for name, value, reader in of_terms:
            if value is not None and not any(issubclass(term, reader) for term, _ in own.parts):
                without.append(name)
    yield from (f"{name} has no effect on objective.name = {objective.name}" for name in without)
    if config.schedule.decay_steps is not None and config.schedule.learning_rate == "constant":
        yield "schedule.decay_steps has no effect on schedule.learning_rate = constant"
    if config.schedule.cooldown_shape != Schedule().cooldown_shape and not config.schedule.cooldown:
        yield "schedule.cooldown_shape has no effect on schedule.cooldown = 0"
    if not config.train.evaluate_every:
        for name in ("corpus", "labeled", "tasks", "average"):
            if getattr(config.evaluate, name) != getattr(Evaluate(), name):
                yield f"evaluate.{name} is not measured during the run: train.evaluate_every is 0"
