"""The learning rate's schedules, against other libraries and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_lcl import config as configs
from megatron_lcl.config import Schedule
from megatron_lcl.errors import UserError
from megatron_lcl.train.optimizer import check_optimizer, learning_rate, unfinished_warmup

STEPS = 40


def rates(schedule: Schedule, steps: int = STEPS, **optimizer: float) -> list[float]:
    tree = {"optimizer": {"lr": 0.5, "warmup": 0, **optimizer}, "train": {"steps": steps}}
    config = replace(configs.from_dict(tree), schedule=schedule)
    return [learning_rate(step, config) for step in range(steps)]


def test_by_default_it_is_what_it_was() -> None:
    ours = rates(Schedule(), warmup=7, min_lr=0.1)
    theirs = [0.5 * (s + 1) / 7 for s in range(7)]
    theirs += [0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * ((s - 7) / (STEPS - 7)))) for s in range(7, STEPS)]
    assert ours == theirs, "bit for bit"


def test_linear_against_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, STEPS)
    theirs = []
    for _ in range(STEPS):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(Schedule(learning_rate="linear"), min_lr=0.1) == pytest.approx(theirs)


@pytest.mark.parametrize(("shape", "name"), [("sqrt", "1-sqrt"), ("linear", "linear"), ("cosine", "cosine")])
def test_wsd_against_transformers(shape: str, name: str) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = optimization.get_wsd_schedule(
        optimizer, 0, num_decay_steps=12, num_training_steps=STEPS, decay_type=name, min_lr_ratio=0.1
    )
    theirs = []
    for _ in range(STEPS):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = rates(Schedule(learning_rate="constant", cooldown=12, cooldown_shape=shape), min_lr=0.05)  # type: ignore[arg-type]
    assert ours == pytest.approx(theirs)
    assert ours[27] == ours[28] == 0.5 > ours[29], "the first step of the cooldown still has all of it"


def test_the_square_cooldown() -> None:
    ours = rates(Schedule(learning_rate="constant", cooldown=10, cooldown_shape="square"))
    assert ours[30:] == pytest.approx([0.5 * (1 - (t / 10) ** 2) for t in range(10)])


def test_one_more_cooldown_from_any_step_of_a_cosine() -> None:
    """From step 15 of a run of 40 steps: what was before is as it was, and it goes on from there without a jump."""
    whole = rates(Schedule(), warmup=5)
    cooled = rates(Schedule(decay_steps=STEPS, cooldown=6, cooldown_shape="linear"), steps=21, warmup=5)
    assert cooled[:16] == whole[:16]
    assert cooled[15:] == pytest.approx([whole[15] * (1 - t / 6) for t in range(6)])


def test_a_cooldown_that_begins_in_the_warmup_falls_from_there() -> None:
    ours = rates(Schedule(learning_rate="constant", cooldown=4, cooldown_shape="linear"), steps=6, warmup=4)
    assert ours == pytest.approx([0.125, 0.25, 0.375, 0.375 * 0.75, 0.375 * 0.5, 0.375 * 0.25])


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("cooldown", [0, 1, 5, 12])
def test_a_warmup_that_is_not_over_is_said(shape: str, cooldown: int) -> None:
    """Where no step has the peak, or only the last one of a schedule that would fall from there."""
    for warmup in range(16):
        config = configs.from_dict(
            {
                "train": {"steps": 12},
                "optimizer": {"lr": 0.5, "warmup": warmup},
                "schedule": {"learning_rate": shape, "cooldown": cooldown},
            }
        )
        made = rates(config.schedule, 12, warmup=warmup)
        no_decay = shape != "constant" and not cooldown and warmup == 12
        said = unfinished_warmup(config)
        assert (said is None) == (max(made) == 0.5 and not no_decay), (warmup, made)
        assert said is None or f"reaches {max(made) / 0.5:.2g} of optimizer.lr" in said


def test_what_is_said_of_a_warmup() -> None:
    said = "optimizer.warmup = 2000 is not over before the end, train.steps = 1000: the learning rate reaches 0.5 of "
    said += "optimizer.lr and does not decay; but for a trial, lower optimizer.warmup"
    assert unfinished_warmup(configs.Config()) == said
    config = configs.load(None, {"schedule.cooldown": "101", "schedule.learning_rate": "constant"})
    assert "before schedule.cooldown = 101 begins in step 900: the learning rate reaches 0.45 of optimizer.lr; " in str(
        unfinished_warmup(config)
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay_steps": 5}, r"schedule\.decay_steps = 5 is not above optimizer\.warmup = 5, .*; raise"),
        ({"decay_steps": 39}, r"decay_steps = 39 with optimizer\.min_lr = 0: the learning rate is 0 from step 40 on"),
        ({"decay_steps": 34, "cooldown": 6}, r"decay_steps = 34 with .* is 0 from step 35 on, of train\.steps = 40"),
        ({"decay_steps": 5, "learning_rate": "constant"}, None),
        ({"decay_steps": 40}, None),
        ({"decay_steps": 35, "cooldown": 6}, None),
        ({"cooldown": 40}, None),
    ],
)
def test_what_gives_no_learning_rate_is_refused(settings: dict[str, Any], said: str | None) -> None:
    for shape in ("linear", "cosine"):
        schedule = {"learning_rate": shape, **settings}
        tree = {"train": {"steps": STEPS}, "optimizer": {"warmup": 5, "lr": 0.5}, "schedule": schedule}
        config = configs.from_dict(tree)
        if said is None:
            check_optimizer(config)
            assert all(rate > 0 for rate in rates(config.schedule, warmup=5))
            continue
        with pytest.raises(UserError, match=said):
            check_optimizer(config)


def test_a_decay_that_would_rise_is_refused() -> None:
    check_optimizer(configs.load(None, {"optimizer.lr": "1e-4", "optimizer.min_lr": "1e-4"}))
    with pytest.raises(UserError, match=r"optimizer\.min_lr = 0\.001 is above optimizer\.lr = 0\.0005, .*; lower"):
        check_optimizer(configs.load(None, {"optimizer.min_lr": "1e-3"}))
