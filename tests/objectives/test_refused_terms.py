"""What a step refuses of the terms of another package, and the first forwards that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lcl import config as configs
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.model.activations import Outputs
from megatron_lcl.objectives.base import GlobalCounts, Objective, StepInputs, Term
from megatron_lcl.objectives.contrast import Contrast
from megatron_lcl.parallel.mesh import ALONE, Axis, Mesh
from megatron_lcl.train import step as step_module
from megatron_lcl.train.step import StepLoss, Stepper

OUT: Any = SimpleNamespace()
BATCH: Any = SimpleNamespace()


class First(Term):
    """Gives what is set."""

    task = "generation"
    given: Any = torch.ones(())
    measured: Any = {"first": torch.ones(())}  # noqa: RUF012

    def surrogate(self, m: int, out: Outputs) -> Any:
        return self.given

    def loss(self) -> Any:
        return self.given

    def metrics(self) -> Any:
        return self.measured


class Second(First):
    all_features_first = True


class Own(Objective):
    sequences, tasks, metrics = Sequences(), ("generation",), ("first",)
    all_features_first = True  # type: ignore[assignment]
    made: Sequence[Term] = ()

    def terms(self, step: StepInputs) -> Sequence[Term]:
        return self.made


class Silent(Own):
    all_features_first = False  # type: ignore[assignment]


def loss_of(*terms: Term, objective: type[Own] = Own, pipeline: Axis = ALONE) -> StepLoss:
    """A step's of one micro-batch."""
    found = objective(configs.from_dict({}))
    found.made = terms
    step = StepInputs([BATCH], [], torch.zeros(1), GlobalCounts({}, [0]), Mesh(ALONE, ALONE, pipeline=pipeline))
    return StepLoss(found, step, 9.0)


def test_what_terms_give_is_checked_where_their_class_is_known() -> None:
    first, second = First(), Second()
    second.measured = {"second": torch.full((), 2.0)}
    loss = loss_of(first, second)
    assert loss.of(0, OUT) == 2
    assert loss.numbers() == {"loss": 2, "first": 1, "second": 2}
    second.given = None
    assert loss_of(first, second).terms[1].surrogate(0, OUT) is None
    second.given = torch.ones(1)  # as what is made of the log scale is
    second.loss = lambda: torch.ones(())  # type: ignore[method-assign]
    assert loss_of(first, second).of(0, OUT) == 2
    del second.loss
    second.given = torch.ones(3)
    with pytest.raises(
        UserError, match=r"^Second\.surrogate is of shape \[3\]; it has to be one number, of shape \(\)"
    ):
        loss.of(0, OUT)
    with pytest.raises(UserError, match=r"^Second\.loss is of shape \[3\]"):
        loss.mean()


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (None, "Second.metrics gives None; it has to give a dict, maybe an empty one"),
        ({"second": 0.5}, "Second.metrics gives 0.5 as `second`; it has to be a tensor of shape ()"),
        ({"second": torch.ones(1)}, "Second.metrics['second'] is of shape [1]; it has to be one number"),
        ({"first": torch.ones(())}, "Second.metrics gives `first`, a name that First gives already; give it another"),
        ({"loss": torch.ones(())}, "Second.metrics gives `loss`, a name that the run itself gives already; give"),
        ({"grad_norm": torch.ones(())}, "Second.metrics gives `grad_norm`, a name that the run itself"),
    ],
)
def test_metrics_that_are_refused(measured: Any, said: str) -> None:
    first, second = First(), Second()
    second.measured = measured
    with pytest.raises(UserError) as error:
        loss_of(first, second).numbers()
    assert str(error.value).startswith(said)


def test_a_term_that_needs_all_features_is_refused_where_its_objective_does_not_say_so() -> None:
    said = (
        r"^Second needs the features of all .*, and Silent has `terms` .*; add `all_features_first = True` to Silent$"
    )
    with pytest.raises(RunError, match=said):
        loss_of(First(), Second(), objective=Silent)
    two_stages = Axis(None, 1, 2, (0, 1))
    with pytest.raises(UserError, match=said) as error:  # the first stage makes no terms
        loss_of(First(), Second(), objective=Silent, pipeline=two_stages)
    assert not isinstance(error.value, RunError)
    loss_of(First(), Second())
    loss_of(First(), objective=Silent)
    with pytest.raises(RunError, match=r"^Contrast needs .*; add `all_features_first = True` to its objective"):
        Contrast(loss_of(First()).step, 1.0)


class Given(Exception):
    """With the outputs of the first forwards."""


@pytest.mark.parametrize("strategy", ["retain", "recompute"])
def test_the_first_forwards_of_recompute_have_no_generation(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A term that reads it would train otherwise where memory suffices for `retain`."""

    class Engine(SimpleNamespace):
        def __call__(self, batch: object) -> Outputs:
            return Outputs(torch.full((), 3.0), torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1))

    def caught(objective: Objective, step: StepInputs, *_: object) -> None:
        raise Given(step.outputs)

    monkeypatch.setattr(step_module, "StepLoss", caught)
    monkeypatch.setattr(step_module, "read_numbers", lambda head: {"log_scale": torch.zeros(1)})
    monkeypatch.setattr(step_module, "without_targets", lambda batch: batch)
    monkeypatch.setattr(GlobalCounts, "of", lambda *_: GlobalCounts({}, [0]))
    engine = Engine(device=torch.device("cpu"), optimizer=SimpleNamespace(param_groups=[]), module=[BATCH])
    stepper = Stepper(engine, configs.from_dict({"contrast": {"strategy": strategy}}), Mesh(ALONE, ALONE))
    with pytest.raises(Given) as given:
        stepper.start([BATCH, BATCH], 0.1)
    (outputs,) = given.value.args
    assert [float(out.generation) for out in outputs] == pytest.approx(
        [3.0] * 2 if strategy == "retain" else [float("nan")] * 2, nan_ok=True
    )
    assert all(out.latents.sum() == 2 for out in outputs)
