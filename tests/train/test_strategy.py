"""`contrast.strategy: auto` on both sides of a limit, and what a run that goes on takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.train import strategy
from megatron_lcl.train.checkpoint.folder import Layout, Progress, progress_text
from megatron_lcl.train.memory import Memory, largest_estimate
from megatron_lcl.train.strategy import Choice, choose_strategy, with_choice

AUTO: dict[str, Any] = {
    "contrast": {"strategy": "auto"},
    "train": {"global_batch": 64, "dtype": "float32"},
    "data": {"images_per_pack": 4},
}


def auto(**sections: dict[str, Any]) -> Config:
    return configs.from_dict({name: {**AUTO.get(name, {}), **sections.get(name, {})} for name in {*AUTO, *sections}})


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A step takes twice its lower bound; the strategies that were simulated."""
    asked: list[str] = []

    def predicted(config: Config, processes: int, slots: Any, on_gpu: bool) -> float:
        asked.append(config.contrast.strategy)
        return 2 * largest_estimate(config, processes, slots).total

    monkeypatch.setattr(strategy, "predicted", predicted)
    return asked


def bound(config: Config, processes: int = 1) -> float:
    return largest_estimate(configs.replace(config, contrast__strategy="retain"), processes).total


def test_retain_where_it_fits(simulated: list[str]) -> None:
    config = auto()
    cases = ((10.1, "retain", 0), (9.9, "retain", 1), (2.3, "retain", 1), (2.1, "recompute", 1), (1.0, "recompute", 0))
    for room, expected, num_simulated in cases:
        simulated.clear()
        choice = choose_strategy(config, 1, Memory(room * bound(config), ""))
        assert choice is not None
        assert choice.strategy == expected
        assert simulated == ["retain"] * num_simulated, "far from the limit the lower bound alone says it"
        assert choice.needs == 2 * bound(config) * num_simulated
    assert choose_strategy(configs.replace(config, contrast__strategy="retain"), 1, Memory(0.0, "")) is None


@pytest.mark.usefixtures("simulated")
def test_what_is_said_has_the_numbers_and_nothing_of_the_machine() -> None:
    assert str(Choice("retain", 30e9, 34e9)) == "retain (auto): about 34 GB a process"
    assert str(Choice("recompute", 90e9, 102e9)) == "recompute (auto): retain would need about 102 GB a process"
    assert str(Choice("recompute", 90e9)) == "recompute (auto): retain would need at least 90 GB a process"


def test_where_nothing_is_to_be_chosen(simulated: list[str]) -> None:
    enough = Memory(1e15, "")
    zero = choose_strategy(auto(zero={"stage": 3}), 2, enough)
    assert str(zero) == "recompute (auto): under ZeRO-3 there is no other"
    one_pass = choose_strategy(auto(objective={"name": "generation"}), 1, Memory(1.0, ""))
    assert str(one_pass) == "retain (auto): the objective has one pass"
    assert simulated == []
    assert objectives.create(auto()).strategy == "recompute", "what must hold of either"


def test_the_largest_phase_decides(simulated: list[str]) -> None:
    config = auto(train={**AUTO["train"], "steps": 10}, schedule={"phases": [{"steps": 5, "global_batch": 16}]})
    small = configs.replace(config, schedule__phases=[], train__global_batch=16)
    between = Memory(1.5 * (bound(small) + bound(config)), "")
    assert bound(small) < bound(config) / 3
    choice = choose_strategy(config, 1, between)
    assert choice is not None
    assert choice.strategy == "recompute"


def saved(config: Config, choice: Choice | None, **layout: Any) -> Progress:
    """The progress of a checkpoint of one process."""
    _, progress = with_choice(config, Progress(3, 24, {}), choice)
    return replace(progress, layout=replace(Layout(), **layout))


@pytest.mark.parametrize("name", ["retain", "recompute"])
def test_a_run_goes_on_with_what_it_had(name: Any, simulated: list[str]) -> None:
    """Also where the limit has moved a little over it: another card of the same kind."""
    config = auto()
    least, enough = Memory(2.01 * bound(config), ""), Memory(2.3 * bound(config), "")
    before = Choice(name, bound(config), 2 * bound(config))
    for has in (least, enough):
        assert choose_strategy(config, 1, has, None, saved(config, before)) == before
    assert simulated == []


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({}, {"tensor": 2}),  # another layout
        ({}, {"dtype": "bfloat16"}),
        ({"data": {"images_per_pack": 5}}, {}),  # a setting that decides
    ],
)
def test_at_another_layout_it_is_chosen_anew(
    change: dict[str, Any], changed: dict[str, Any], simulated: list[str]
) -> None:
    began = auto()
    now = auto(**change)
    enough, few = Memory(2.3 * bound(now), ""), Memory(1.5 * bound(now), "")
    for before, has, expected in (("recompute", enough, "retain"), ("retain", few, "recompute")):
        progress = saved(began, Choice(before, bound(began), 1.4 * bound(began)), **changed)
        choice = choose_strategy(now, 1, has, None, progress)
        assert choice is not None
        assert choice.strategy == expected
    assert simulated == ["retain"] * 2


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("factor", [2.0, 0.0], ids=["simulated", "not simulated"])
def test_on_a_smaller_device_it_is_chosen_anew(factor: float) -> None:
    config = auto()
    progress = saved(config, Choice("retain", bound(config), factor * bound(config)))
    choice = choose_strategy(config, 1, Memory(1.9 * bound(config), ""), None, progress)
    assert choice is not None
    assert choice.strategy == "recompute"


def test_only_what_was_chosen_is_saved() -> None:
    config = auto()
    chosen, progress = with_choice(config, Progress(0, 0, {}), Choice("recompute", 5.0))
    assert chosen.contrast.strategy == "recompute"
    assert '"contrast": {"strategy": "recompute", "bound": 5.0, "needs": 0.0}' in progress_text(progress)
    named = configs.replace(config, contrast__strategy="retain")
    assert with_choice(named, progress, None)[0] is named
    assert "contrast" not in progress_text(with_choice(named, progress, None)[1]), "files are as they were"


def test_every_shipped_config_of_a_cluster_says_auto() -> None:
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert {configs.load(file).contrast.strategy for file in files} == {"auto"}
