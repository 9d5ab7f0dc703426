"""The bytes of a plan are those that real processes are counted to send."""

from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist
from processes import run_processes

from megatron_lcl.plan.network import Sending, by_axis, mesh_of, sending_of, shapes_of_stage
from megatron_lcl.selftest.cases import STEPS, Case, make_batches
from megatron_lcl.selftest.count_traffic import Traffic
from megatron_lcl.train.pipeline.partition import partition_uniform

MICRO_BATCHES = 4


def config_of(case: Case):  # type: ignore[no-untyped-def]
    from megatron_lcl import config as configs

    return configs.replace(case.config(), train__global_batch=MICRO_BATCHES * case.data)


def count(rank: int, case: Case) -> dict[str, float]:
    """What this process sends in the last of a few steps, by axis."""
    from megatron_lcl.train.broadcast_batches import broadcast_batches
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    config = config_of(case)
    mesh = init_processes(config)
    try:
        engine = build_engine(build_module(config, mesh), config, mesh)
        stepper, pack = build_stepper(engine, config, mesh), make_batches(case.config(), 0)[0]
        for _ in range(STEPS):
            packs = [pack] * MICRO_BATCHES
            with Traffic() as reading:
                batches = broadcast_batches(packs if mesh.loads_data else None, MICRO_BATCHES, 1, mesh, engine.device)
            with Traffic() as traffic:
                stepper.run(batches, 1e-3)
        parts = {"model": traffic.sent, "reading": reading.sent, "terms": {}, "muon": {}}
        return by_axis(parts, mesh).by_axis()  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        (Case(tensor=2, pipeline=2, strategy="recompute"), 1e-9),
        (Case(data=2, zero=3, strategy="recompute"), 4e-3),  # what torch's ZeRO-3 gathers with padding: selftest/run.py
    ],
)
def test_what_a_plan_says_is_what_is_sent(case: Case, tolerance: float) -> None:
    counted = run_processes(count, case.processes, case, timeout=400)
    config, pack = config_of(case), make_batches(case.config(), 0)[0]
    layers = config.model.vision.layers + config.model.language.layers + 3
    bounds = [*partition_uniform(layers, case.pipeline), layers]
    for stage in range(case.pipeline):
        mesh = mesh_of(config, case.processes, stage)
        shapes = shapes_of_stage(config.model, case.tensor, bounds[stage], bounds[stage + 1])
        found, more = sending_of(config, mesh, shapes, pack, MICRO_BATCHES)
        sent = Sending(**counted[mesh.world.rank])
        assert found.reading == pytest.approx(sent.reading)
        assert found.total == pytest.approx(sent.total, rel=tolerance)
        assert found.pipeline == pytest.approx(sent.pipeline, rel=tolerance)
        assert found.data + found.contrast + found.tensor == pytest.approx(sent.data + sent.tensor, rel=tolerance)
        assert more.tensor <= found.tensor / MICRO_BATCHES + 1e-6


def test_a_step_of_many_micro_batches_follows_from_few() -> None:
    case = Case(tensor=2, pipeline=2, strategy="recompute")
    config, pack = config_of(case), make_batches(case.config(), 0)[0]
    mesh, shapes = mesh_of(config, 4, 0), shapes_of_stage(config.model, 2, 0, 4)
    few, more = sending_of(config, mesh, shapes, pack, 5)
    many, _ = sending_of(config, mesh, shapes, pack, 9)
    for name in ("tensor", "pipeline", "reading", "data"):
        assert getattr(many, name) == pytest.approx(getattr(few, name) + 4 * getattr(more, name)), name
    from megatron_lcl.train.traffic import of_layout

    whole = by_axis(of_layout([pack] * 9, [9 * pack.num_pairs] * 1, shapes, config, mesh), mesh)
    assert dataclasses.asdict(many) == pytest.approx(dataclasses.asdict(whole))
