"""The bytes of a plan are those that real processes are counted to send."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl.plan.network import Sending, by_axis, mesh_of, sending_of, shapes_of_stage
from megatron_lcl.selftest.cases import STEPS, Case, make_batches
from megatron_lcl.selftest.count_traffic import Traffic
from megatron_lcl.train.memory import estimate
from megatron_lcl.train.parts import frozen_parameters
from megatron_lcl.train.pipeline.partition import partition_uniform

MICRO_BATCHES = 4


def config_of(case: Case):  # type: ignore[no-untyped-def]
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
        (Case(tensor=2, pipeline=2, strategy="recompute", freeze=True), 1e-9),
        (Case(data=2, objective="siglip"), 1e-9),  # the vocabulary is not trained
        (Case(data=2, objective="siglip", dtype="bfloat16"), 1e-9),
        # what torch's ZeRO-3 gathers with padding: selftest/run.py
        (Case(data=2, zero=3, strategy="recompute", freeze=True), 4e-3),
    ],
)
def test_what_a_plan_says_is_what_is_sent(case: Case, tolerance: float) -> None:
    counted = run_processes(count, case.processes, case, timeout=400)
    config, pack = config_of(case), make_batches(case.config(), 0)[0]
    layers = config.model.vision.layers + config.model.language.layers + 3
    bounds = [*partition_uniform(config), layers]
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


def test_for_what_is_frozen_nothing_is_sent_or_kept() -> None:
    """Gradients and new weights of what is trained alone, and its optimizer's state; ZeRO-3 gathers a frozen tower for
    forwards only, as backward does not enter it."""
    for zero in (1, 2, 3):
        case = Case(data=2, zero=zero, strategy="recompute")
        plain = config_of(case)
        config, pack = configs.replace(plain, train__freeze=("vision.*",)), make_batches(case.config(), 0)[0]
        mesh, shapes = mesh_of(config, 2, 0), shapes_of_stage(config.model, 1, 0, 99)
        frozen = frozen_parameters(config)
        all_numbers = sum(shape.numel() for shape in shapes.values())
        trained = all_numbers - sum(shapes[name].numel() for name in frozen)
        (found, _), (before, _) = (sending_of(c, mesh, shapes, pack, MICRO_BATCHES) for c in (config, plain))
        if zero < 3:
            sums = MICRO_BATCHES if zero == 2 else 1
            assert found.data == pytest.approx(4 * trained * sums + 4 * trained / 2, rel=1e-4)
        else:
            less = before.data - found.data
            assert less == pytest.approx(4 * MICRO_BATCHES * 2 * (all_numbers - trained) / 2, rel=1e-4)
        least, of_all = estimate(config, 2), estimate(plain, 2)
        assert least.optimizer == pytest.approx(12 * trained / 2)
        assert least.gradients / of_all.gradients == pytest.approx(trained / all_numbers)
        assert least.parameters == of_all.parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_objective_does_not_train_is_not_sent_or_kept(dtype: str) -> None:
    """Also by DeepSpeed's `BF16_Optimizer`, of ZeRO-1 in bfloat16, which reduces gradients of zero like others."""
    trains_all, pack = config_of(Case(data=2, dtype=dtype)), make_batches(Case().config(), 0)[0]
    config = configs.replace(trains_all, objective__name="clip")
    mesh, shapes = mesh_of(config, 2, 0), shapes_of_stage(config.model, 1, 0, 99)
    vocabulary = sum(shape.numel() for name, shape in shapes.items() if ".vocabulary" in name)
    (less, _), (whole, _) = (sending_of(c, mesh, shapes, pack, MICRO_BATCHES) for c in (config, trains_all))
    number = 4 if dtype == "float32" else 2
    # the gradient's sum, 2 (n - 1)/n times, and the new weights, half as often; of both groups multiples of 4 numbers
    assert whole.data - less.data == pytest.approx((4 + number / 2) * vocabulary, abs=2 * 3 * (4 + number / 2))
    assert estimate(trains_all, 2).optimizer - estimate(config, 2).optimizer == 12 * vocabulary / 2
