"""Norms by part in one process, in float64, against DeepSpeed's layouts. `selftest` compares all others so: tensor
parallel, pipelines, ZeRO-1 to 3, half precision, Muon."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl.model.layers import PARTS
from megatron_lcl.parallel.mesh import ALONE, Mesh
from megatron_lcl.selftest.cases import Case, make_batches
from megatron_lcl.selftest.reference import reference
from megatron_lcl.train.telemetry.norms import PartNorms

ON_CPU = {"device": "cpu"}
ZERO3 = {"zero": 3, "strategy": "recompute"}
SMALL_TOO = {"stage3_param_persistence_threshold": 0}  # are sharded; DeepSpeed leaves small parameters whole
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "optimizer on the CPU": (2, {}, {"offload_optimizer": ON_CPU}),
    "all on the CPU": (2, ZERO3, {"offload_optimizer": ON_CPU, "offload_param": ON_CPU}),
    "hierarchical ZeRO-3": (4, ZERO3, {"zero_hpz_partition_size": 2, **SMALL_TOO}),
    "aligned": (2, {"zero": 2}, {"parameter_alignment": True}),
}
"""by name: processes, of the layout, DeepSpeed's"""


def measure(rank: int, processes: int) -> dict[str, list[float]]:
    """Of the first step at each layout of so many: norms of gradient and update by part, and the whole gradient's."""
    import torch.distributed as dist

    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    found = {}
    for name, (needed, layout, zero) in LAYOUTS.items():
        if needed != processes:
            continue
        config = configs.replace(Case(data=processes, **layout).config(), deepspeed={"zero_optimization": zero})
        mesh = init_processes(config)
        engine = build_engine(build_module(config, mesh), config, mesh)
        packs = make_batches(config, 0)[rank::processes]
        result = build_stepper(engine, config, mesh).start(packs, config.optimizer.lr, measure=True).read()
        assert result.measured is not None
        norms = [*result.measured.grad_norms.values(), *result.measured.update_norms.values()]
        found[name] = [*norms, result.grad_norm]
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_norms_by_part_are_those_of_one_process() -> None:
    truth = reference(Case(data=2))
    expected = truth.norms_of_parts[0]
    assert math.hypot(*expected[: len(PARTS)]) == pytest.approx(truth.grad_norms[0], rel=1e-5)
    results = [found for size in (2, 4) for found in run_processes(measure, size, size, timeout=400.0)]
    assert {name for found in results for name in found} == LAYOUTS.keys()
    for found in results:
        for name, (*norms, whole) in found.items():
            assert whole == pytest.approx(truth.grad_norms[0], rel=1e-5), name
            if name == "aligned":  # tensors lie elsewhere than is known: left out, not wrong
                assert all(math.isnan(norm) for norm in norms)
            else:
                assert norms == pytest.approx(expected, rel=1e-4), name


class AsMeasured(PartNorms):
    """Squares of norms as they were measured, without an engine."""

    def __init__(self, squares: torch.Tensor, clip_norm: float) -> None:
        self._squares, self._clip_norm, self._known, self._mesh = squares.clone(), clip_norm, True, Mesh(ALONE, ALONE)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 20.0])
def test_clipping_is_undone_where_the_gradient_was_clipped(clip_norm: float) -> None:
    """A gradient of norms 3, 4 and 12 by part, whose own is 13, as torch clips it."""
    gradient = torch.nn.Parameter(torch.zeros(3))
    gradient.grad, update = torch.tensor([3.0, 4.0, 12.0]), torch.tensor([0.1, 0.2, 0.3])
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(gradient, clip_norm)
    norms = AsMeasured(torch.stack([gradient.grad, update]).square(), clip_norm).over_all_processes(torch.tensor(13.0))
    torch.testing.assert_close(norms, torch.tensor([[3.0, 4.0, 12.0], [0.1, 0.2, 0.3]]))
