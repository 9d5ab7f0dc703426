"""Steps at tensor-parallel layouts on real processes, against one process: losses, gradients, norms, parameters."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
from planted_faults import FAULTS
from processes import run_processes
from tensor_layouts import STEPS, Case, Run, differences, one_process, run_cases

pytestmark = pytest.mark.slow

# the reference's vocabulary of 211, its 17 rows an image and its ragged texts divide into no number of ranks
TWO = (
    Case(2),
    Case(2, strategy="recompute", clip_norm=0.5),
    Case(2, zero=2, clip_norm=0.5, checkpointing="full", offloaded=True),
    Case(2, zero=2, strategy="recompute", checkpointing="attention", climbs=True),
    Case(2, objective="generation"),
    Case(1, (((0,), ()), ((1,), (2,))), zero=3, strategy="recompute", checkpointing="full", climbs=True),
)
FOUR = (
    Case(4, clip_norm=0.5),
    Case(4, zero=2, strategy="recompute", checkpointing="full"),
    Case(2, (((0,), ()), ((1,), (2,))), clip_norm=0.5, climbs=True),
    Case(2, (((), ()), ((0, 1), (2,))), zero=2, strategy="recompute", clip_norm=0.5),  # a replica has nothing
)
HALF = (
    Case(2, dtype="bfloat16"),
    Case(2, dtype="bfloat16", zero=2, strategy="recompute", clip_norm=0.5),
    Case(2, dtype="float16", clip_norm=0.5),
    Case(1, (((0,), ()), ((1,), (2,))), zero=2, dtype="bfloat16", climbs=True),
    Case(1, (((0,), ()), ((1,), (2,))), zero=3, strategy="recompute", dtype="bfloat16"),
    Case(1, (((0,), ()), ((1,), (2,))), zero=3, strategy="recompute", dtype="bfloat16", climbs=True),
)


@pytest.fixture(scope="module")
def file(shared: Path) -> str:
    return str(shared / "reference" / "lcl_tiny.safetensors")


@functools.cache
def runs(file: str, cases: tuple[Case, ...]) -> dict[Case, Run]:
    """The first process's run of each case; the others must report the same losses."""
    everyone = run_processes(run_cases, cases[0].processes, file, cases, timeout=500)
    for of_rank in everyone[1:]:
        assert [run.losses for run in of_rank] == [run.losses for run in everyone[0]]
    return dict(zip(cases, everyone[0], strict=True))


@pytest.mark.parametrize("case", [*TWO, *FOUR], ids=str)
def test_steps_equal_one_process(case: Case, file: str) -> None:
    run = runs(file, TWO if case in TWO else FOUR)[case]
    assert not differences(case, run, one_process(file, case))


@pytest.mark.parametrize("case", [case for case in (*TWO, *FOUR, *HALF) if case.climbs], ids=str)
def test_a_scale_that_is_not_clamped_would_be_seen(case: Case, file: str) -> None:
    found = differences(case, one_process(file, case, clamp=False), one_process(file, case))
    assert all(found[f"log scale of step {step}"] > 5e-5 for step in range(STEPS))


@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision_stays_close(case: Case, file: str) -> None:
    """Within what rounding to eight bits of mantissa makes of the same steps in one process."""
    run, truth = runs(file, HALF)[case], one_process(file, case)
    found = differences(case, run, truth)
    assert found["parameters"] < 5e-3
    for step in range(STEPS):
        assert found.get(f"generation of step {step}", 0) < 2e-3
        assert found.get(f"gradient norm of step {step}", 0) < 3e-2
        assert found.get(f"log scale of step {step}", 0) < 5e-5
    if case.dtype == "bfloat16":  # float16's gradients are recorded with their loss scale
        whole = math.sqrt(sum(float((g.astype("float64") ** 2).sum()) for g in run.gradients.values()))
        assert run.losses[0][2] == pytest.approx(whole, rel=1e-3), "the norm counts every parameter once"
    assert not run.unlike
    # the log scale trains in float32, and is clamped there: bfloat16 has no number between 4.59375 and 4.625
    assert len({losses[3] for losses in run.losses}) == (1 if case.climbs else STEPS)


def test_faults_are_found(file: str) -> None:
    case = Case(2, clip_norm=0.5)
    faulty = run_processes(run_cases, 2, file, (case,), FAULTS, timeout=500)[0]
    truth = one_process(file, case)
    missed = [fault for fault, run in zip(FAULTS, faulty, strict=True) if not differences(case, run, truth)]
    assert not missed
