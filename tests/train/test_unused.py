"""What is said of settings that a config gives and its run does not use."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lcl import config as configs
from megatron_lcl.train.unused import unused_settings

WEIGHTS = {
    "lcl": "contrastive generation",
    "clip": "",
    "siglip": "",
    "coca": "contrastive generation",
    "generation": "",
    "genlip": "",
    "emu": "generation regression",
}
"""of each objective: the weights that its loss has, by its docstring"""


def said_of(**sections: Any) -> list[str]:
    return list(unused_settings(configs.from_dict(sections)))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("weight", ["contrastive", "generation", "regression"])
def test_a_weight_that_the_objective_does_not_have_is_said(name: str, weight: str) -> None:
    field = f"{weight}_weight"
    line = f"objective.{field} has no effect on objective.name = {name}"
    assert said_of(objective={"name": name, field: 0.0}) == ([] if weight in WEIGHTS[name].split() else [line])
    assert said_of(objective={"name": name, field: None}) == []


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bias", [-3.0, 0.0])
def test_a_bias_is_of_the_sigmoid_loss_alone(name: str, bias: float) -> None:
    line = f"model.logit_bias has no effect on objective.name = {name}"
    assert said_of(objective={"name": name}, model={"logit_bias": bias}) == ([] if name == "siglip" else [line])


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_scale_is_of_contrasts_alone(name: str) -> None:
    line = f"contrast.initial_log_scale has no effect on objective.name = {name}"
    contrasts = name in ("lcl", "clip", "siglip", "coca")
    assert said_of(objective={"name": name}, contrast={"initial_log_scale": 2.0}) == ([] if contrasts else [line])
    assert said_of(objective={"name": name}) == []


@pytest.mark.parametrize(
    ("name", "sections"),
    [("clip", {"model": {"logit_bias": -3.0}}), ("generation", {"contrast": {"initial_log_scale": 2.0}})],
)
def test_what_terms_may_read_is_not_said_of_an_objective_of_another_package(
    name: str, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`StepInputs.logit_bias` and `log_scale`."""
    monkeypatch.setattr("megatron_lcl.objectives.package_of", lambda config: {"theirs": "1.0"})
    assert said_of(objective={"name": name}, **sections) == []


@pytest.mark.parametrize(
    ("name", "value"), [("corpus", "held"), ("labeled", "images"), ("tasks", ["knn"]), ("average", "ema_0.5")]
)
def test_what_is_not_measured_is_said(name: str, value: Any) -> None:
    line = f"evaluate.{name} is not measured during the run: train.evaluate_every is 0"
    assert said_of(evaluate={name: value}) == [line]
    assert said_of(evaluate={name: value}, train={"evaluate_every": 2}) == []


def test_a_constant_learning_rate_has_no_decay_that_is_long() -> None:
    line = "schedule.decay_steps has no effect on schedule.learning_rate = constant"
    assert said_of(schedule={"decay_steps": 500, "learning_rate": "constant"}) == [line]
    for other in ("linear", "cosine"):
        assert said_of(schedule={"decay_steps": 500, "learning_rate": other}) == []


def test_no_cooldown_has_no_shape() -> None:
    line = "schedule.cooldown_shape has no effect on schedule.cooldown = 0"
    assert said_of(schedule={"cooldown_shape": "linear"}) == [line]
    assert said_of(schedule={"cooldown_shape": "linear", "cooldown": 5}) == []
    assert said_of(schedule={"cooldown_shape": "sqrt"}) == []
