"""What an evaluation needs of a model, and whether the model's run has trained it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_lcl import objectives
from megatron_lcl.config import Config, EvaluationTask
from megatron_lcl.config.phases import phases_of
from megatron_lcl.convert.find import known_config
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.spec import library_specs, parse_spec
from megatron_lcl.filesystem import exists

Part = EvaluationTask | Literal["captions"]
"""what of a model an evaluation needs; captions: trained by the generation of any text, or of images' captions alone"""

_NEEDS: dict[str, Part] = {
    "zero-shot": "retrieval",
    "retrieval": "retrieval",
    "captioning": "captions",
}
"""of the tasks; the others read the image encoder, which every objective trains"""
POOLED = ("knn", "linear-probe")
"""tasks that read the pooled feature of the images alone"""
_PARTS: dict[Part, str] = {
    "retrieval": "image latents and texts' features in one space",
    "generation": "the generation of text",
    "captions": "the generation of text",
}


def why_untrained(config: Config, part: Part) -> str:
    """`objective.name = … does not train`, with the weight that is why."""
    weights = ("contrastive_weight", "regression_weight") if part == "retrieval" else ("generation_weight",)
    zero = [weight for weight in weights if getattr(config.objective, weight) == 0]
    objective = objectives.objective_class(config.objective.name)
    trainable = part in objective.tasks or (part == "captions" and "generation_weight" in objective.published)
    why = f" with objective.{zero[0]} = 0" if zero and trainable else ""
    return f"objective.name = {config.objective.name}{why} does not train"


def check_trained(model: str, tasks: Sequence[str]) -> None:
    """UserError for the first task that needs a part which the model lacks or its run has not trained.

    Untrained encoders that are asked for as such (`random:CONFIG`, …) are measured in everything that they have.
    """
    spec = parse_spec(model)
    if spec.kind not in ("", "random") and "captioning" in tasks:
        raise UserError(
            f"captioning: {model} has no language model to write captions with; only LCL checkpoints do (and "
            "random:CONFIG, as an untrained baseline)"
        )
    config = None if spec.kind else known_config(Path(spec.name))
    if config is None:  # nothing says how it was trained
        return
    trained = _trained(config)
    for task in tasks:
        if (part := _NEEDS.get(task)) and part not in trained:
            raise UserError(
                f"{task}: {model} has not learned it: {why_untrained(config, part)} {_PARTS[part]}; leave out --task "
                f"{task}, or measure a run that trains it (untrained weights as a baseline: random:{model})"
            )


def untrained_pool(model: str, tasks: Sequence[str]) -> str | None:
    """What is to be said of tasks that read the pooled feature of a run which contrasted nothing; None: nothing.

    The generation reads the patches through the pool's value and output projections; query and keys have no gradient.
    """
    spec, read = parse_spec(model), [task for task in tasks if task in POOLED]
    config = None if spec.kind or not read else known_config(Path(spec.name))
    if config is None or "retrieval" in _trained(config):
        return None
    return (
        f"{', '.join(read)}: the attention pool of {model} is untrained ({why_untrained(config, 'retrieval')} it); "
        "attentive-probe has a pool of its own"
    )


def _trained(config: Config) -> set[Part]:
    """What a run has trained, and the run whose weights it began with; everything, where that is not known."""
    everything = set(_PARTS)
    if config.objective.name not in objectives.names():  # of a package that is not installed here
        return everything
    trained: set[Part] = {*objectives.trained_by(config)}
    # also of an objective that generates captions alone, and so is not measured on the text of documents
    if any("generation" in objectives.create(phase.config).trains for phase in phases_of(config)):
        trained.add("captions")
    if config.train.init_from is None or trained == everything:
        return trained
    if library_specs(config.train.init_from):  # which give neither an attention pool nor a head
        return trained
    before = known_config(Path(config.train.init_from)) if exists(Path(config.train.init_from)) else None
    return everything if before is None else trained | _trained(before)
