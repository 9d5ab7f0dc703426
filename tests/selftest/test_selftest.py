"""The selftest finds every layout equal, and finds the faults that distributed training has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_lcl.selftest.cases import CASES, Case
from megatron_lcl.selftest.run import selftest

TENSOR, PIPELINE, DATA = Case(tensor=2), Case(pipeline=2), Case(data=2)


@pytest.mark.slow
def test_every_layout_gives_what_one_process_gives() -> None:
    command = [sys.executable, "-m", "megatron_lcl", "selftest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("equal")]
    assert len(rows) == len(CASES), done.stdout
    for case, row in zip(CASES, rows, strict=True):
        sent, formula = (float(number) for number in row.removesuffix("equal").split()[-3:-1])
        assert sent == pytest.approx(formula, rel=0.02 if case.zero == 3 else 0, abs=0.05), row
        assert bool(sent) == (case.processes > 1), row


def lose_a_sum(rank: int) -> None:
    """What tensor ranks owe each other for the parameters that all of them hold is not summed."""
    from megatron_lcl.model import stages
    from megatron_lcl.parallel import collectives

    assert stages is not None
    summing = collectives.sum_gradients
    for module in list(sys.modules.values()):
        if getattr(module, "sum_gradients", None) is summing:
            module.sum_gradients = lambda tensors, axis: tensors  # type: ignore[union-attr]


def gather_in_another_order(rank: int) -> None:
    """A collective that puts the ranks' rows together in the wrong order."""
    from megatron_lcl.parallel import collectives

    gather = collectives._all_gather

    def turned(whole: torch.Tensor, share: torch.Tensor, **options: Any) -> Any:
        work = gather(whole, share, **options)
        work.wait()
        whole.copy_(torch.cat([whole[len(share) :], whole[: len(share)]]))
        return work

    collectives._all_gather = turned


def scale_gradients_of(name: str, factor: float) -> None:
    from megatron_lcl.train import engine

    build = engine.build_engine

    def with_fault(module: Any, *arguments: Any) -> Any:
        chosen = dict(module.named_parameters()).get(name)
        if chosen is not None:
            chosen.register_hook(lambda gradient: gradient * factor)
        return build(module, *arguments)

    engine.build_engine = with_fault


def average_twice(rank: int) -> None:
    scale_gradients_of("1.mlp.down.bias", 0.5)


def miss_a_gradient(rank: int) -> None:
    scale_gradients_of("7.norm.weight", 0.0)


def forget_the_other_replicas(rank: int) -> None:
    """Negatives of a replica's own pairs only."""
    from megatron_lcl.train import step

    loss = step.contrastive_loss
    step.contrastive_loss = lambda image, text, scale, **_: loss(image, text, scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "case", "found"),
    [
        (average_twice, DATA, "gradient of 1.mlp.down.bias"),
        (average_twice, PIPELINE, "gradient of 1.mlp.down.bias"),
        (miss_a_gradient, PIPELINE, "gradient of 7.norm.weight"),
        (forget_the_other_replicas, Case(data=2, strategy="recompute"), "losses"),
        (lose_a_sum, TENSOR, "gradient"),
        (gather_in_another_order, TENSOR, "losses"),
    ],
)
def test_a_planted_fault_is_found(fault: Callable[[int], None], case: Case, found: str) -> None:
    lines: list[str] = []
    (verdict,) = selftest([case], prepare=fault, say=lines.append)
    assert any(found in text for text in verdict.faults), verdict
    assert "DIFFERS" in lines[-1]


def fall_silent(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def fall_silent_in_the_tensor_group(rank: int) -> None:
    from megatron_lcl.selftest import worker

    check = worker.check_group

    def silent(axis: Any, name: str, *arguments: Any) -> None:
        if rank == 1 and name == "tensor":
            os.kill(os.getpid(), signal.SIGSTOP)
        check(axis, name, *arguments)

    worker.check_group = silent


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fall_silent, fall_silent_in_the_tensor_group])
def test_a_process_that_does_not_answer_is_named(fault: Callable[[int], None]) -> None:
    (verdict,) = selftest([Case(tensor=2)], prepare=fault, timeout=40, say=lambda _: None)
    assert "processes [1] did not answer" in verdict.faults[0], verdict
