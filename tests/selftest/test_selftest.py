"""The selftest finds every layout equal, and finds the faults that distributed training has."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from train.resilience.fleet import Fleet

from megatron_lcl import attention, objectives
from megatron_lcl.cli import main
from megatron_lcl.parallel.mesh import Axis, Pending
from megatron_lcl.selftest import reference, run, worker
from megatron_lcl.selftest.cases import CASES, MORE_CASES, Case
from megatron_lcl.selftest.kernels import KernelCase, compare_kernels
from megatron_lcl.selftest.run import Verdict, compare, selftest, those_that_fit
from megatron_lcl.selftest.worker import run_case
from megatron_lcl.train.precision import resolve_dtype

ALL = (*CASES, *MORE_CASES)
PATIENCE = 400.0  # of a case: a machine may be busy with others
TENSOR, PIPELINE, DATA = Case(tensor=2), Case(pipeline=2), Case(data=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_layout_gives_what_one_process_gives(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = main(["selftest", "--all", "--timeout", f"{PATIENCE:g}"]), capsys.readouterr().out
    assert code == 0, said
    equal = [line for line in said.splitlines() if line.endswith("equal")]
    rows = [line for line in equal if line.startswith("tp ")]
    assert len(rows) == len(ALL), said
    kernels = {line.split("  ")[0] for line in equal if not line.startswith("tp ")}
    assert {"attention per_sequence, bfloat16", "contrastive loss torch, float32"} <= kernels
    if importlib.util.find_spec("triton"):
        assert "generation loss triton, interpreted, bfloat16" in kernels
    last = said.splitlines()[-1]
    assert re.fullmatch(rf"all {len(ALL) + 1} checks passed in \d+ s on CPU \(4 processes, gloo\)", last)
    header = next(line for line in said.splitlines() if line.startswith("layout"))
    for column in re.split(r" {2,}", header)[1:]:  # each is explained above
        assert re.search(rf"^  .*\b{column.split()[0]}\b", said.split(header)[0], re.M), column
    for case, row in zip(ALL, rows, strict=True):
        sent = float(row.removesuffix("equal").split()[-3])  # that it is the formula's is the selftest's own business
        assert bool(sent) == (case.processes > 1), row


@pytest.mark.slow
def test_eight_processes_send_what_the_formulas_say() -> None:
    """Three axes at once, and an axis of eight; what each process sends in each group is compared."""
    cases = [Case(tensor=2, pipeline=2, data=2), Case(data=8, zero=2)]
    for verdict in selftest(cases, timeout=PATIENCE, say=lambda _: None):
        assert isinstance(verdict, Verdict)
        assert not verdict.faults, verdict
        assert verdict.sent > 0


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_layout_uses_every_device(world: int) -> None:
    """Also beside the kernels, which every process compares."""
    given = [KernelCase(world), *CASES]
    more = [] if any(case.processes == world for case in CASES) else [Case(data=world)]
    assert those_that_fit(given, world) == [*(case for case in given if case.processes <= world), *more]
    assert bool(more) == (world in (3, 8))
    assert those_that_fit(given[:1], world) == given[:1]


def test_the_short_one_leaves_nothing_out() -> None:
    assert len(set(ALL)) == len(ALL)
    for field in dataclasses.fields(Case):
        covered, known = ({getattr(case, field.name) for case in cases} for cases in (CASES, ALL))
        if field.name in ("tensor", "pipeline", "data"):
            covered, known = {degree > 1 for degree in covered}, {degree > 1 for degree in known}
        elif field.name == "phases":  # which placeholders is the packs' business, whatever the layout
            covered, known = {bool(phases) for phases in covered}, {bool(phases) for phases in known}
        elif field.name == "objective":
            assert known == set(objectives.names())
            known -= {"clip", "generation", "genlip"}  # their losses are those of lcl and coca
        elif field.name == "compiled":  # it takes longest
            assert known == {False, True}
            assert all(case.processes == 1 for case in ALL if case.compiled)
            known = {False}
        assert covered == known, field.name
    for world in (1, 2, 4):  # what most runs are, on any number of GPUs
        fitting = [case for case in those_that_fit(CASES, world) if isinstance(case, Case)]
        assert "bfloat16" in {case.dtype for case in fitting}
        assert (Case(data=2) in fitting) == (world > 1)


def test_compiled_blocks_are_skipped_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "compile_fault", lambda config: "no compiler" * config.train.compile or None)
    lines: list[str] = []
    assert selftest([Case(compiled=True)], say=lines.append) == []
    assert lines[1:] == ["no compiler: its layouts are skipped", lines[-1]]
    assert lines[-1].endswith("(1 skipped)")


def test_in_the_same_precision_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [resolve_dtype(case.config()) for case in ALL] == [case.dtype for case in ALL]
    assert {case.dtype for case in ALL} == {"float32", "bfloat16"}


def test_a_scale_that_is_not_clamped_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in {case.global_batch: case for case in ALL if case.climbs}.values():
        clamped = reference.reference(case).losses
        monkeypatch.setattr(reference, "MAX_LOG_SCALE", 10.0)
        free = reference.reference(case).losses
        assert all(b[2] > a[2] * (1 + 5e-5) for a, b in zip(clamped, free, strict=True))


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_not_equal(column: int, odd: float) -> None:
    """Wherever it stands, and also where one process gives it too."""

    def trajectory(loss: float, norm: float) -> reference.Trajectory:
        one = {"weight": torch.ones(2)}
        return reference.Trajectory([[1.0, loss]], [1.0, norm], gradients=one, parameters=one, features=one)

    truth, ours = trajectory(1.0, 1.0), [trajectory(odd, 1.0), trajectory(1.0, odd)][column]
    assert compare(DATA, truth, truth).faults == ()
    for other in (truth, ours):
        verdict = compare(DATA, ours, other)
        assert verdict.faults == (("losses", "gradient norms")[column],)
        assert (verdict.loss, verdict.grad_norm)[column] == math.inf


def lose_a_sum(rank: int) -> None:
    """What tensor ranks owe each other for the parameters that all of them hold is not summed."""
    from megatron_lcl.model import layers
    from megatron_lcl.parallel import mappings

    assert layers is not None
    summing = mappings.copy_to_tensor_parallel
    for module in list(sys.modules.values()):
        if getattr(module, "copy_to_tensor_parallel", None) is summing:
            module.copy_to_tensor_parallel = lambda tensors, axis: tensors  # type: ignore[union-attr]


def gather_in_another_order(rank: int) -> None:
    """A collective that puts the ranks' rows together in the wrong order."""
    from megatron_lcl.parallel import layers, mappings

    def reversed_order(local: torch.Tensor, axis: Axis, num_rows: int) -> Pending:
        return axis.start_all_gather(local).then(lambda shards: shards.flip(0).flatten(0, 1)[:num_rows])

    mappings.start_gather = layers.start_gather = reversed_order


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
    from megatron_lcl.objectives import contrast

    start = contrast.start_gather
    contrast.start_gather = lambda image, text, scale, **_: start(image, text, scale)


def draw_by_process(rank: int) -> None:
    """Drop path that differs between the processes of a replica."""
    from megatron_lcl.model.drop_path import DropPath

    factors = DropPath.factors

    def drawn(self: DropPath, *arguments: Any) -> Any:
        self.seed = rank
        return factors(self, *arguments)

    DropPath.factors = drawn  # type: ignore[method-assign]


def forget_the_clamp(rank: int) -> None:
    from megatron_lcl.train import step

    step.update_log_scale = lambda parameter, function: None


def send_twice(rank: int) -> None:
    """Right in every number, and wasteful."""
    from megatron_lcl.parallel import layers, mappings

    gather = mappings.start_gather

    def twice(*arguments: Any) -> Pending:
        gather(*arguments).wait()
        return gather(*arguments)

    mappings.start_gather = layers.start_gather = twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "case", "found"),
    [
        (average_twice, DATA, "gradient of 1.mlp.down.bias"),
        (average_twice, PIPELINE, "gradient of 1.mlp.down.bias"),
        (average_twice, Case(data=2, dtype="bfloat16"), "gradient of 1.mlp.down.bias"),
        (miss_a_gradient, PIPELINE, "gradient of 7.norm.weight"),
        (forget_the_other_replicas, Case(data=2, strategy="recompute"), "losses"),
        (lose_a_sum, TENSOR, "gradient"),
        (gather_in_another_order, TENSOR, "losses"),
        (forget_the_clamp, Case(data=2, climbs=True), "losses"),
        (draw_by_process, Case(data=2, objective="siglip", options=True), "losses"),
        (send_twice, TENSOR, "bytes: process 0 sent"),
    ],
)
def test_a_planted_fault_is_found(fault: Callable[[int], None], case: Case, found: str) -> None:
    lines: list[str] = []
    (verdict,) = selftest([case], prepare=fault, timeout=PATIENCE, say=lines.append)
    assert any(found in text for text in verdict.faults), verdict
    assert "DIFFERS" in lines[-2]
    assert re.fullmatch(rf"FAILED: 1 of 1 checks in \d+ s on CPU \(.*\): {' '.join(case.name.split())}", lines[-1])


def compute_wrongly(rank: int) -> None:
    """One attention looks ahead; the sigmoid loss's gradient of images and one Triton kernel are off by 2 %."""
    from megatron_lcl import attention
    from megatron_lcl.losses import sigmoid

    tiles = sigmoid.loss_and_gradients

    def off(*arguments: Any) -> Any:
        parts = tiles(*arguments)
        return parts._replace(image=parts.image * 1.02)

    sigmoid.loss_and_gradients = off

    def not_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1)

    attention._by_sequence = not_causal
    if importlib.util.find_spec("triton"):
        from megatron_lcl.losses import softmax_triton

        error = softmax_triton.error
        softmax_triton.error = lambda *arguments: error(*arguments) * 1.02


@pytest.mark.slow
def test_a_wrong_kernel_is_found() -> None:
    lines: list[str] = []
    (verdict,) = selftest([KernelCase()], prepare=compute_wrongly, timeout=PATIENCE, say=lines.append)
    wrong = {fault.split(":")[0] for fault in verdict.faults}
    expected = {"attention per_sequence, float32", "attention per_sequence, bfloat16"}
    dtypes = ("float32", "bfloat16", "float16")
    expected |= {f"sigmoid loss torch, {dtype}" for dtype in dtypes}
    if importlib.util.find_spec("triton"):
        expected |= {f"generation loss triton, interpreted, {dtype}" for dtype in dtypes}
    assert wrong == expected
    rows = lines[-2].splitlines()
    assert {row.split("  ")[0] for row in rows if row.endswith("WRONG")} == expected
    assert any(row.startswith("attention dense, float32") and row.endswith("equal") for row in rows)


def test_a_kernel_that_raises_is_wrong_and_the_others_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(attention, "_dense", fail)
    kernels = {kernel.name: kernel for kernel in compare_kernels(torch.device("cpu"))}
    wrong = {name for name, kernel in kernels.items() if kernel.fault}
    assert wrong == {"attention dense, float32", "attention dense, bfloat16"}
    kernel = kernels["attention dense, float32"]
    assert kernel.fault == "attention dense, float32: RuntimeError: no kernel image is available"
    assert re.fullmatch(r"attention dense, float32 +WRONG: RuntimeError: no kernel image is available", kernel.row())
    assert kernels["generation loss torch, float16"].row().endswith("equal")


def group_after_a_case(rank: int) -> bool:
    assert run_case(Case(), rank, dist.HashStore(), PATIENCE) is not None
    return dist.is_initialized()


def test_a_case_leaves_its_process_group() -> None:
    """NCCL's is not left to the end of the process, where torch warns of it between the rows of the table."""
    assert run_processes(group_after_a_case, 1) == [False]


def die(rank: int) -> None:
    os._exit(9)


@pytest.mark.slow
def test_a_kernel_that_ends_its_process_is_a_fault() -> None:
    lines: list[str] = []
    (verdict,) = selftest([KernelCase()], prepare=die, timeout=PATIENCE, say=lines.append)
    assert verdict.faults == ("process 0 ended with code 9",)
    assert "process 0 ended with code 9" in lines[-2]
    assert lines[-1].startswith("FAILED: 1 of 1 checks")


def break_down(rank: int) -> None:
    """In the second process of a layout with tensor ranks, before it meets the others."""
    meet = worker.meet

    def faulty(store: dist.Store, rank: int, processes: int, timeout: float) -> None:
        if rank == 1 and processes == 2:
            raise RuntimeError("a fault of this process alone")
        meet(store, rank, processes, timeout)

    worker.meet = faulty


def with_a_fault(rank: int) -> None:
    """One layout. Each launched process has imported everything, and what it starts is forked from it."""
    whole = run.selftest
    run.selftest = lambda _, timeout: whole([TENSOR], prepare=break_down, timeout=timeout)  # type: ignore[assignment]
    run.forkserver = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment]


@pytest.mark.slow
def test_a_launch_goes_on_after_a_fault_and_uses_all_its_processes(tmp_path: Path) -> None:
    command = ("selftest", "--timeout", f"{PATIENCE:g}")
    with Fleet(tmp_path / "run", size=3, plant=with_a_fault, command=command) as fleet:
        assert fleet.wait(580) == [1, 0, 0], fleet.said()
        said = [log.read_text().splitlines() for log in fleet.logs]
    first, second, last = said[0][-3:]
    assert "DIFFERS: process 1: a fault of this process alone" in first
    assert second.startswith("tp 1  pp 1  dp 3")
    assert second.endswith("equal")
    assert last.startswith("FAILED: 1 of 2 checks"), last
