"""What can be set of each evaluation: one section a task, one typed field an option of `evaluate`, with its default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl import fields
from megatron_lcl.config.types import STRICT, Count, Fraction, Positive
from megatron_lcl.errors import UserError

Above0 = Annotated[float, Field(gt=0)]
PLACE = "{c}"
"""where a template has the class name"""


@dataclass(frozen=True, config=STRICT)
class ZeroShotSettings:
    """Zero-shot classification."""

    prompts: tuple[str, ...] = Field(
        default=(),
        description=f"texts of a class, {PLACE} for its name: one, or a list whose features are averaged; empty: the "
        f"data's own, else `a photo of a {PLACE}.`",
    )

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            if PLACE not in prompt:
                raise UserError(f"the prompt {prompt!r} has no {PLACE} for the class name")


@dataclass(frozen=True, config=STRICT)
class KnnSettings:
    """k-nearest-neighbor classification."""

    k: Positive = Field(default=20, description="neighbors that vote (DINO: 20)")
    temperature: Above0 = Field(
        default=0.07, description="a neighbor of cosine similarity s votes with exp(s / temperature) (DINO: 0.07)"
    )


@dataclass(frozen=True, config=STRICT)
class LinearSettings:
    """Linear probe: logistic regression on pooled features."""

    strengths: tuple[Above0, ...] = Field(
        default=tuple(10.0**e for e in range(-4, 5)),
        min_length=1,
        description="values of C that are tried: C times the summed loss is weighed against half the squared weights "
        "(a larger C is a smaller weight decay)",
    )
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="share of the training images on which the strength is chosen, if there are several"
    )
    max_iterations: Positive = Field(default=1000, description="steps of L-BFGS at most")


@dataclass(frozen=True, config=STRICT)
class AttentiveSettings:
    """Attentive probe (the settings are ours: the paper's code for it was never published)."""

    epochs: Positive = Field(default=20, description="passes over the training images")
    batch_size: Positive = Field(default=128, description="images of a step")
    lr: Above0 = Field(default=1e-3, description="peak learning rate of AdamW; cosine decay to 0")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="of AdamW, on all parameters")
    warmup: Fraction = Field(default=0.1, description="share of the steps in which the learning rate rises")
    heads: Positive = Field(
        default=8, description="of the attention pool; the largest number that is not above it and divides the width"
    )
    seeds: tuple[Count, ...] = Field(
        default=(0, 1, 2),
        min_length=1,
        description="one probe each, the accuracy is their mean; others than these with another --seed",
    )
    features: Literal["cached", "streamed"] = Field(
        default="cached",
        description="cached: patch features of all images on disk (float16); streamed: computed again in every epoch "
        "of every seed, by one process, with nothing on disk",
    )


@dataclass(frozen=True, config=STRICT)
class CaptioningSettings:
    """Captions by the model's own language model."""

    prompt: str = Field(default="", description="text that every caption begins with; it is not counted as written")
    max_tokens: Positive = Field(default=30, description="length of a caption at most")
    top_p: Fraction = Field(
        default=0.0, description="0: greedy; above: nucleus sampling among the likeliest tokens that make up so much"
    )
    temperature: Above0 = Field(default=1.0, description="of nucleus sampling; logits are divided by it")

    def __post_init__(self) -> None:
        if self.temperature != 1 and self.top_p == 0:
            raise UserError(
                f"captioning.temperature = {self.temperature:g} has no effect on greedy decoding; give "
                "captioning.top-p too (1: all tokens)"
            )


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Of all tasks that have any; a section is named as its task."""

    zero_shot: ZeroShotSettings = ZeroShotSettings()
    knn: KnnSettings = KnnSettings()
    linear_probe: LinearSettings = LinearSettings()
    attentive_probe: AttentiveSettings = AttentiveSettings()
    captioning: CaptioningSettings = CaptioningSettings()


def read_settings(options: Mapping[str, str], tasks: Sequence[str]) -> Settings:
    """The settings from dotted names, `{"attentive-probe.epochs": "10"}`, over the defaults; the type decides what a
    text means. UserError for an option that is not there, does not fit, or is of a task not among `tasks`."""
    tree: dict[str, Any] = {}
    for name, text in options.items():
        key = name.replace("-", "_")
        if fields.annotation_of(Settings, key) is None or "." not in key:
            raise UserError(f"there is no option --{name}; {_spelled(fields.nearest(Settings, key))}")
        task = _spelled(key.partition(".")[0])
        if task not in tasks:
            chosen = f"the tasks are {', '.join(tasks)}" if tasks else "no task is given"
            raise UserError(f"--{name} goes with --task {task}; {chosen}")
        fields.put(Settings, tree, key, text)
    return fields.build(Settings, tree, lambda key: f"--{_spelled(key)}")


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Every option as (name, type, default, help), in order."""
    for name, *rest in fields.describe(Settings):
        yield _spelled(name), *rest  # type: ignore[misc]


def _spelled(name: str) -> str:
    """As on the command line."""
    return name.replace("_", "-")
