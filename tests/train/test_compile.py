"""`train.compile`: the same numbers, in graphs that are made in the first step and serve all later ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.errors import UserError
from megatron_lcl.selftest.cases import STEPS, Case, make_batches
from megatron_lcl.train import kernels
from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
from megatron_lcl.train.kernels import check_kernels, has_compiler

CASES = [Case(strategy="recompute", options=True), Case(pipeline=2), Case(data=2, zero=2)]


def trained(_rank: int, case: Case, compiled: bool) -> tuple[list[int], list[np.ndarray]]:
    """Graphs that were there after each step, and the parameters after the last one."""
    config = configs.replace(case.config(), train__compile=compiled, train__activation_checkpointing="attention")
    mesh = init_processes(config)
    graphs = []
    try:
        engine = build_engine(build_module(config, mesh), config, mesh)
        stepper = build_stepper(engine, config, mesh)
        for step in range(STEPS):
            # as where phases change it: no graph may depend on it
            weighted = configs.replace(config, objective__contrastive_weight=0.1 + 0.2 * step)
            stepper.objective = objectives.create(weighted)
            packs = make_batches(config, step)[mesh.data.rank :: mesh.data.size]
            stepper.start(packs, case.lr(step), measure=step == 1).read()  # a look makes no graph either
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return graphs, [parameter.detach().numpy() for parameter in engine.module.parameters()]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("case", CASES, ids=["one process", "pipeline", "ZeRO-2"])
def test_compiled_blocks_give_the_same_and_are_compiled_once(case: Case) -> None:
    """In steps of packs with other sequences and images."""
    compiled = run_processes(trained, case.processes, case, True, timeout=500.0)
    eager = run_processes(trained, case.processes, case, False)
    for (graphs, ours), (none, theirs) in zip(compiled, eager, strict=True):
        assert none == [0] * STEPS
        # before attention and behind it, of both encoders, with gradients and without, with drop path and without
        assert 2 <= graphs[0] <= 16
        assert graphs == graphs[:1] * STEPS
        one, other = (np.concatenate([parameter.ravel() for parameter in found]) for found in (ours, theirs))
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel__tensor": 2}, "parallel.tensor is 2"),
        ({"zero__stage": 3, "contrast__strategy": "recompute"}, "zero.stage is 3"),
        ({"train__apex_layer_norm": True}, "train.apex_layer_norm is set"),
    ],
)
def test_what_is_not_compiled_is_refused(changes: dict[str, Any], said: str) -> None:
    config = configs.replace(Case().config(), train__compile=True, **changes)
    with pytest.raises(UserError, match=rf"^train.compile is set, but {said}, .*leave train.compile unset$"):
        check_kernels(config, elsewhere=True)


def test_on_a_gpu_triton_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "triton_fault", lambda: "triton is not installed")
    monkeypatch.setattr(kernels, "has_compiler", lambda: True)
    assert kernels.compile_fault(Case().config()) == "triton is not installed"
    assert kernels.compile_fault(Case().config(), elsewhere=True) is None


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_compiler", lambda: False)
    config = configs.replace(Case().config(), train__compile=True)
    with pytest.raises(UserError, match="no C\\+\\+ compiler for this CPU; install g\\+\\+, or name one in CXX"):
        check_kernels(config, elsewhere=False)
    check_kernels(config, elsewhere=True)
