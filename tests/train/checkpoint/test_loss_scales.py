"""float16's loss scale through a checkpoint, also one of a run that has only looked for it, and made no step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_processes
from small_runs import LR, Job, build_config, pack

from megatron_lcl import config as configs
from megatron_lcl import load_model
from megatron_lcl.train.checkpoint.checkpointer import adopt_scale
from megatron_lcl.train.checkpoint.folder import read_progress, step_folder, verify
from megatron_lcl.train.checkpoint.state import MOMENTS, State

HIGH = {"initial_scale_power": 40, "hysteresis": 1}
"""so high that the first steps overflow"""
FIXED = {"loss_scale": 256}
# (zero.stage, deepspeed.fp16, the run that it goes on from)
RUNS: dict[str, tuple[int, dict[str, Any], str | None]] = {
    "overflowed": (1, HIGH, None),
    "overflowed, zero3": (3, HIGH, None),
    "same": (1, HIGH, "overflowed"),
    "same, zero3": (3, HIGH, "overflowed, zero3"),
    "other window": (1, {**HIGH, "loss_scale_window": 7}, "overflowed"),
    "higher minimum": (1, {**HIGH, "min_loss_scale": 2**39}, "overflowed"),
    "fixed": (1, FIXED, "overflowed"),
    "fixed, zero3": (3, FIXED, "overflowed"),
    "fixed, from zero3": (1, FIXED, "overflowed, zero3"),
    "fixed, new": (1, FIXED, None),
    "no longer fixed": (1, {"initial_scale_power": 8}, "fixed"),
}


def run_all(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch is merely slow without such instructions
    results = {name: run(Path(folder), name, *settings) for name, settings in RUNS.items()}
    dist.destroy_process_group()
    return results


def run(folder: Path, name: str, zero: int, fp16: dict[str, Any], source: str | None) -> dict[str, Any]:
    """The loss scale, as it goes on and whether it can be lower; then two steps, and a checkpoint."""
    from megatron_lcl.train.checkpoint.checkpointer import Checkpointer
    from megatron_lcl.train.checkpoint.folder import Progress
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.precision import lowerable_scale

    config = build_config(folder, Job(name, zero, dtype="float16"))
    config = configs.replace(config, deepspeed={"fp16": fp16})
    mesh = init_processes(config)
    engine = build_engine(build_module(config, mesh), config, mesh)
    stepper, applied, losses = build_stepper(engine, config, mesh), [], []
    with Checkpointer(engine, config, mesh, Path(config.train.output)) as checkpoints:
        if source is not None:
            checkpoints.load(step_folder(folder / source, 2))
        scaler = engine.optimizer.loss_scaler
        found = {"scale": scaler.cur_scale, "lowerable": lowerable_scale(engine.optimizer)}
        found["window"] = getattr(scaler, "scale_window", None)
        for step in range(2):
            result = stepper.run([pack(step, number, config) for number in range(6)], LR[step])
            applied.append(result.applied)
            losses.append(result.loss)
        checkpoints.save(Progress(2, 12, {}))
        checkpoints.wait()
    return {**found, "applied": applied, "losses": losses}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_processes(run_all, 1, str(folder))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overflowed", "overflowed, zero3"])
def test_a_run_whose_steps_all_overflowed_is_saved(name: str, runs: Any) -> None:
    folder, results = runs
    assert results[name]["applied"] == [False, False]
    saved = step_folder(folder / name, 2)
    assert verify(saved) == []
    config = configs.load(saved / "config.yaml")
    state = State(saved / "state", config.model)
    assert float(state.step) == 0
    weights = dict(load_model(saved).layers.named_parameters())
    for parameter, shape in state.shapes.items():
        assert torch.equal(state.whole(parameter, "fp32"), weights[parameter])
        for moment in MOMENTS:
            assert torch.equal(state.whole(parameter, moment), torch.zeros(shape))


@pytest.mark.slow
def test_the_scale_that_was_found_goes_on_as_the_config_now_says(runs: Any) -> None:
    _, results = runs
    scales = {name: (result["scale"], result["lowerable"]) for name, result in results.items()}
    for name in ("same", "same, zero3", "other window"):
        assert scales[name] == (2**38, 2**38)
    assert (results["same"]["window"], results["other window"]["window"]) == (1000, 7)
    assert scales["higher minimum"] == (2**39, None), "it can fall no more"
    for name in ("fixed", "fixed, zero3", "fixed, from zero3", "fixed, new"):
        assert scales[name] == (256, None)
    assert scales["no longer fixed"] == (256, 256), "2^8, with which it begins"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed", "fixed, zero3", "fixed, from zero3"])
def test_going_on_without_a_step_is_beginning(name: str, runs: Any) -> None:
    """Also at another layout, from moments of zeros."""
    folder, results = runs
    assert results[name]["applied"] == [True, True]
    assert results[name]["losses"] == pytest.approx(results["fixed, new"]["losses"], rel=1e-5)
    ours, theirs = (load_model(step_folder(folder / run, 2)).layers.parameters() for run in (name, "fixed, new"))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    assert read_progress(step_folder(folder / name, 2)).step == 2


def test_the_search_for_the_scale_goes_on_where_it_was() -> None:
    """The scale grows a window of steps after the last overflow, and falls after as many overflows as are left of the
    hysteresis: never more than the run's own."""
    saved = SimpleNamespace(dynamic=True, cur_scale=2.0**8, cur_iter=1700, last_overflow_iter=900, cur_hysteresis=3)
    for own, left in ((4, 3), (2, 2)):
        scaler = SimpleNamespace(dynamic=True, cur_scale=2.0**16, min_scale=1.0, cur_iter=0, last_overflow_iter=-1)
        vars(scaler).update(cur_hysteresis=own, delayed_shift=own)
        adopt_scale(scaler, saved)
        assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (2.0**8, 1700, 900)
        assert scaler.cur_hysteresis == left
