"""What a step computes and in which order: on one process, on an engine that is nothing but the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers
from megatron_lcl.model.lcl import LayerList
from megatron_lcl.objectives import contrast
from megatron_lcl.parallel.mesh import ALONE, Mesh
from megatron_lcl.selftest.cases import Case, make_batches
from megatron_lcl.train import step
from megatron_lcl.train.step import Stepper, StepResult

MESH = Mesh(ALONE, ALONE)


class VocabularyRows(TorchDispatchMode):
    """Rows that are multiplied with the vocabulary, whoever does it."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm") and result.shape[1] == self.vocab_size:
            self.rows += len(result)
        return result


class Engine:
    """As much of DeepSpeed's engine as a step needs; `events` are its calls, in order."""

    device = torch.device("cpu")

    def __init__(self, case: Case) -> None:
        config = case.config()
        layers = build_layers(config.model, config.initial_log_scale)
        initialize(dict(enumerate(layers)), config.model, config.train.seed)
        self.module = LayerList(*layers)
        base = torch.optim.SGD(self.module.parameters(), lr=0.0)
        self.optimizer = SimpleNamespace(optimizer=base, param_groups=base.param_groups)
        self.events: list[str] = []

    def __call__(self, batch: Any) -> Any:
        self.events.append("forward")
        return self.module(batch)

    def backward(self, loss: torch.Tensor) -> None:
        self.events.append("backward")
        loss.backward()

    def step(self) -> None: ...

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.stack([g.norm() for g in gradients]).norm())


def run(strategy: str) -> tuple[Engine, int, StepResult]:
    """An engine after one step, the rows it multiplied with the vocabulary, and the step's result."""
    case = Case(strategy=strategy)
    engine, config = Engine(case), case.config()
    start, finish = contrast.start_gather, contrast.finish_contrastive_loss

    def starting(*arguments: Any, **named: Any) -> Any:
        engine.events.append("gather")
        return start(*arguments, **named)

    def finishing(gather: Any) -> Any:
        engine.events.append("contrast")
        return finish(gather)

    with (
        patch.object(contrast, "start_gather", starting),
        patch.object(contrast, "finish_contrastive_loss", finishing),
        patch.object(step, "update_log_scale", lambda parameter, function: None),
        VocabularyRows(config.model.language.vocab_size) as vocabulary,
    ):
        result = Stepper(engine, config, MESH).run(make_batches(config, 0), 0.0)
    return engine, vocabulary.rows, result


@pytest.mark.parametrize(
    ("strategy", "events"),
    [
        ("retain", ["forward"] * 4 + ["gather", "contrast"] + ["backward"] * 4),
        # features travel during a forward
        ("recompute", ["forward"] * 4 + ["gather", "forward", "contrast", "backward"] + ["forward", "backward"] * 3),
    ],
)
def test_only_rows_with_a_target_meet_the_vocabulary_and_only_once(strategy: str, events: list[str]) -> None:
    engine, rows, result = run(strategy)
    assert engine.events == events
    batches = make_batches(Case().config(), 0)
    assert 0 < rows == result.num_targets == sum(int((batch.targets >= 0).sum()) for batch in batches)
    assert rows < sum(len(batch.tokens) for batch in batches)


def test_both_strategies_give_the_same_to_the_bit() -> None:
    (retain, _, result), (recompute, _, same) = run("retain"), run("recompute")
    assert result == same
    for a, b in zip(retain.module.parameters(), recompute.module.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
