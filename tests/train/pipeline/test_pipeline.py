"""Pipelines on real processes against plain torch in one: losses, gradients, parameters, memory, bytes, faults."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from pipeline_layouts import Case, distance, faults_of, gathered, layers_of, run_cases, truth
from processes import run_processes

RAGGED = (((1, 2), (0,), (2, 0, 1)),)
WITHOUT_IMAGES = (((2,), (1, 0, 2), (1,)), ((0,), (0, 0), (0,)))
"""the second replica has no image"""
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}

TWO = {
    "retain": Case((0, 3), RAGGED),
    "recompute": Case((0, 5), (((1,), (0,), (2,), (1, 1), (0, 3)),), "recompute"),
    "one micro-batch": Case((0, 4), (((1, 2),),)),
    "generation": Case((0, 7), RAGGED, objective="generation"),
    "checkpointing": Case((0, 4), RAGGED, "recompute", checkpointing="full"),
    "no pairs at all": Case((0, 4), (((0,), (0, 0)),)),
    "no pairs at all, recompute": Case((0, 5), (((0,), (0, 0)),), "recompute"),
    "no pairs at all, replicas": Case((0,), (((0,),), ((0, 0),))),
    "optimizer on the CPU": Case((0, 4), RAGGED, deepspeed=OFFLOADED),
}
FOUR = {
    "retain": Case((0, 2, 4, 6), RAGGED),
    "recompute, scale at its bound": Case((0, 1, 4, 7), RAGGED, "recompute", climbs=True),
    "one micro-batch": Case((0, 2, 4, 6), (((1, 2),),), "recompute"),
    "many micro-batches": Case((0, 2, 4, 6), (((1,), (2,), (0,), (1,), (3,), (1, 1)),), "recompute"),
    "replicas, scale at its bound": Case((0, 4), WITHOUT_IMAGES, climbs=True),
    "replicas, recompute": Case((0, 3), WITHOUT_IMAGES, "recompute"),
    "replicas, clip": Case((0, 5), WITHOUT_IMAGES, objective="clip"),
    "tensor": Case((0, 4), RAGGED, tensor=2, climbs=True),
    "tensor, recompute, checkpointing, optimizer on the CPU": Case(
        (0, 3), RAGGED, "recompute", tensor=2, checkpointing="full", deepspeed=OFFLOADED
    ),
}
FAULTS = {
    "mean_taken_again": Case((0, 4), WITHOUT_IMAGES, fault="mean_taken_again"),
    "negatives_of_one_micro_batch": Case((0, 4), WITHOUT_IMAGES, fault="negatives_of_one_micro_batch"),
    "averaged_twice": Case((0, 4), WITHOUT_IMAGES, fault="averaged_twice"),
}
# the same sequences, in two replicas without a pipeline and in one with: nothing rounds but what rounds in both
HALF = {
    f"{dtype}, {name}": Case(
        partition, split, strategy, dtype=dtype, deepspeed={"communication_data_type": "fp32", **scaling}
    )
    for dtype, scaling in (("bfloat16", {}), ("float16", {"fp16": {"initial_scale_power": 8}}))
    for name, partition, split, strategy in (
        ("no pipeline", (0,), (((1,), (0,)), ((2, 1), (1,))), "retain"),
        ("retain", (0, 4), (((1,), (0,), (2, 1), (1,)),), "retain"),
        ("recompute", (0, 4), (((1,), (0,), (2, 1), (1,)),), "recompute"),
    )
}
# tensor ranks sum in another order than one process, but in the same with a pipeline as without
HALF_TENSOR = {
    "bfloat16, no pipeline": dataclasses.replace(HALF["bfloat16, no pipeline"], tensor=2),
    "bfloat16, retain": dataclasses.replace(HALF["bfloat16, retain"], tensor=2, checkpointing="full"),
}
CLAMPED = {
    "no pipeline": Case((0,), WITHOUT_IMAGES, climbs=True, dtype="bfloat16"),
    "pipeline": Case((0, 4), RAGGED, climbs=True, dtype="bfloat16"),
}
OVERFLOW = Case(
    (0, 4),
    RAGGED,
    tensor=2,
    dtype="float16",
    fault="overflow_in_the_first_stage",
    deepspeed={"fp16": {"initial_scale_power": 8, "hysteresis": 1}},
    steps=3,
)
OVERFLOW_ON_CPU = dataclasses.replace(OVERFLOW, tensor=1, deepspeed=OVERFLOW.deepspeed | OFFLOADED)

REFUSED = Case((0, 4), WITHOUT_IMAGES, "recompute", limit=1.0)

Runs = dict[str, list[dict[str, Any]]]
"""name of a case → what each process found"""


def run_all(cases: dict[str, Case], processes: int) -> Runs:
    of_processes = run_processes(run_cases, processes, list(cases.values()), timeout=400)
    return {name: [found[i] for found in of_processes] for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def two() -> Runs:
    return run_all(TWO | HALF | CLAMPED | {"overflow": OVERFLOW_ON_CPU}, 2)


@pytest.fixture(scope="module")
def four() -> Runs:
    return run_all(FOUR | HALF_TENSOR | FAULTS | {"refused": REFUSED, "overflow": OVERFLOW}, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_two_stages_give_what_one_process_gives(name: str, two: Runs) -> None:
    assert faults_of(two[name], truth(TWO[name])) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TWO if name.startswith("no pairs")])
def test_a_step_without_pairs_leaves_the_scale(name: str, two: Runs) -> None:
    for result in two[name]:
        assert {row[2] for row in result["rows"]} == {0.0}
        assert {row[4] for row in result["rows"]} == {float(torch.tensor(math.log(1 / 0.07)))}
    assert not gathered(two[name], "gradients")["7.log_scale"].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_give_what_one_gives(name: str, four: Runs) -> None:
    assert faults_of(four[name], truth(FOUR[name])) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str, four: Runs) -> None:
    assert faults_of(four[name], truth(FAULTS[name]), bound=1e-3) != []


@pytest.mark.slow
def test_a_process_has_its_own_layers_only(four: Runs) -> None:
    held = [{int(name.split(".")[0]) for name in result["parameters"]} for result in four["retain"]]
    assert held == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


def test_a_scale_that_is_not_clamped_would_be_seen() -> None:
    for case in [case for case in FOUR.values() if case.climbs]:
        pairs = zip(truth(case)["rows"], truth(case, max_log_scale=10)["rows"], strict=True)
        assert all(free[4] > clamped[4] * (1 + 5e-5) for clamped, free in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAMPED)
def test_in_half_precision_the_float32_scale_is_clamped(name: str, two: Runs) -> None:
    """bfloat16 has no number between 4.59375 and 4.625: a scale that it rounds would not be ln 100."""
    results = two[name]
    assert {row[4] for result in results for row in result["rows"]} == {float(torch.tensor(math.log(100)))}
    assert set.union(*(result["scales of a forward"] for result in results)) == {float(torch.tensor(math.log(100)))}
    held = [r["parameters"]["7.log_scale"] for r in results if "7.log_scale" in r["parameters"]]
    assert held
    assert all(value == torch.tensor([math.log(100)]).numpy() for value in held)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "strategy", "tensor"),
    [
        *[(dtype, strategy, 1) for dtype in ("bfloat16", "float16") for strategy in ("retain", "recompute")],
        ("bfloat16", "retain", 2),
    ],
)
def test_half_precision_gives_what_replicas_give(dtype: str, strategy: str, tensor: int, two: Runs, four: Runs) -> None:
    """Rounding is the same wherever a layer runs, until what is summed in another order rounds otherwise."""
    runs = four if tensor == 2 else two
    replicas, pipeline = runs[f"{dtype}, no pipeline"], runs[f"{dtype}, {strategy}"]
    assert all(all(result["applied"]) for result in [*replicas, *pipeline])
    expected = {"rows": replicas[0]["rows"], **{k: gathered(replicas, k) for k in ("gradients", "parameters")}}
    assert pipeline[0]["rows"][0] == pytest.approx(expected["rows"][0], rel=1e-4)
    assert faults_of(pipeline, expected, bound=1e-2) == []
    assert distance(gathered(pipeline, "gradients"), expected["gradients"]) < 1e-4
    assert len({row[4] for row in pipeline[0]["rows"]}) == 2  # the log scale moves


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_an_overflow_in_one_process_skips_the_step_in_all(processes: int, two: Runs, four: Runs) -> None:
    results = (two if processes == 2 else four)["overflow"]
    for result in results:
        assert result["applied"] == [True, False, True]
        assert result["loss_scales"] == [2**8, 2**7, 2**7]
    rows = results[0]["rows"]
    assert math.isinf(rows[1][3])
    assert rows[1][4] == rows[0][4] != rows[2][4]  # the log scale, in the other stage, stayed
    plain = truth(dataclasses.replace(OVERFLOW, dtype="float32"))
    assert rows[0] == pytest.approx(plain["rows"][0], rel=1e-2)  # also the norm: of gradients without the scale


@pytest.mark.slow
def test_graphs_kept_at_once(two: Runs, four: Runs) -> None:
    """retain: of every micro-batch. recompute: as 1F1B, of as many as there are stages from here on."""
    for cases, runs in ((TWO, two), (FOUR, four)):
        for name, case in cases.items():
            for stage, most in (result["graphs"] for result in runs[name]):
                micro_batches = len(case.split[0])
                retain = case.strategy == "retain" and case.objective != "generation"
                assert most == (micro_batches if retain else min(len(case.partition) - stage, micro_batches)), name


@pytest.mark.slow
def test_bytes_between_stages(two: Runs, four: Runs) -> None:
    for cases, runs in ((TWO | HALF, two), (FOUR | HALF_TENSOR, four)):
        for name in cases:
            for stage, sent, expected in (result["bytes"] for result in runs[name]):
                assert sent == expected[stage], name


@pytest.mark.slow
def test_a_loss_above_the_limit_changes_nothing_in_any_stage(four: Runs) -> None:
    initial = {name: p.detach() for name, p in layers_of(REFUSED.config).named_parameters()}
    for result in four["refused"]:
        assert result["applied"] == [False] * 2
        assert all((initial[name].numpy() == value).all() for name, value in result["parameters"].items())
    assert len({row[4] for row in four["refused"][0]["rows"]}) == 1
