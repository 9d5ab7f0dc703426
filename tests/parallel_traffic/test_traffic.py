"""The bytes that a step sends are those of the formulas, to the byte, in every layout of the selftest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl.selftest.cases import CASES, Case, make_batches

Bytes = dict[tuple[int, ...], float]


def one_step(rank: int, case: Case, deepspeed: dict[str, Any], repeat: bool) -> tuple[Bytes, Bytes]:
    """Bytes counted and expected, of reading and of a step."""
    import torch.distributed as dist

    from megatron_lcl.parallel.traffic import Traffic
    from megatron_lcl.train import traffic
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.share import share

    config = configs.replace(case.config(), deepspeed=deepspeed)
    mesh = init_processes(config)
    module = build_module(config, mesh)
    engine = build_engine(module, config, mesh)
    stepper = build_stepper(engine, config, mesh)
    parameters = list(engine.module.named_parameters())
    packs = make_batches(config, 0)[mesh.data.rank :: mesh.data.size]
    if repeat:
        stepper.run(share(packs, len(packs), 1, mesh, engine.device), 1e-3)
    with Traffic() as counted:
        batches = share(packs if mesh.reads else None, len(packs), 1, mesh, engine.device)
        stepper.run(batches, 1e-3)
    pairs = [sum(b.num_pairs for b in make_batches(config, 0)[r :: mesh.data.size]) for r in range(mesh.data.size)]
    if case.zero == 3:
        sizes = [p.ds_numel for _, p in parameters]
        parts = [traffic.zero3(sizes, len(packs), config, mesh)]
        parts.append(traffic.contrast(pairs, config.model.language.width, mesh))
    else:
        stages = sorted({int(name.split(".")[0]) for name, _ in parameters})
        groups = [sum(p.numel() for _, p in parameters if (p.dim() >= 2) == decays) for decays in (True, False)]
        parts = [traffic.reading(batches, config, mesh)]
        parts.append(traffic.stepping(batches, pairs, stages, groups, config, mesh))
    expected: Bytes = {}
    for part in parts:
        for ranks, number in part.items():
            expected[ranks] = expected.get(ranks, 0) + number
    dist.destroy_process_group()
    return _nonzero(counted.sent), _nonzero(expected)


def _nonzero(sent: Bytes) -> Bytes:
    return {ranks: round(number, 3) for ranks, number in sent.items() if number}


LAYOUTS: Sequence[Case] = [case for case in CASES if case.zero < 3 and case.initial_log_scale == Case.initial_log_scale]


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_bytes_of_a_step(case: Case) -> None:
    for counted, expected in run_processes(one_step, case.processes, case, {}, False):
        assert counted == expected
        assert bool(counted) == (case.processes > 1)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0, 100_000])
def test_bytes_of_zero3(threshold: int) -> None:
    options = {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
    case = Case(data=2, zero=3, strategy="recompute")
    for counted, expected in run_processes(one_step, 2, case, options, True):
        assert sum(counted.values()) == pytest.approx(sum(expected.values()), rel=0.02)
