"""Muon's momentum, averages of the weights and frozen parameters through a checkpoint, at any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_processes
from small_runs import FIRST, LAST, LR, PARTITION, Job, build_config, pack, run_each

from megatron_lcl import LCL, load_model
from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.convert.find import find_average
from megatron_lcl.errors import UserError
from megatron_lcl.train.checkpoint.folder import read_progress, step_folder
from megatron_lcl.train.optimizer import muon_parts

DECAY = 0.5
FREEZE = ("vision.patches.*", "language.blocks.0.mlp.*")
FROZEN = ("0.", "3.mlp.")
"""beginnings of what is frozen, by our names"""
VISION, LANGUAGE = ("vision.*", "pool.*"), ("language.*",)
TOWERS = {
    VISION: ("0.", "1.", "2.norm", "2.query", "2.q.", "2.k.", "2.v.", "2.out."),
    LANGUAGE: ("2.embedding.", "2.positions", "3.", "4."),
}
"""the same of whole encoders"""
RECIPE = {
    "optimizer__name": "muon",
    "optimizer__muon__dtype": "float32",
    "optimizer__parts__vision__lr": 0.5,
    "average__ema": (DECAY,),
    "average__tail": (0.5,),
    "evaluate__average": "ema_0.5",
    "train__steps": LAST,
}


@dataclass(frozen=True)
class Run(Job):
    """With the recipe, and with what is frozen."""

    freeze: tuple[str, ...] = FREEZE
    seed: int = 0
    other: tuple[tuple[str, Any], ...] = ()
    """what is not as the recipe says"""
    passes_on: bool = False
    """what it has loaded is saved again, as a checkpoint of this run, before its first step"""
    packs: int = 4
    reads: frozenset[str] = frozenset({"every step", "averages", "inside", "loaded", "moments"})
    """what is looked at beside the weights after the last step, each of which takes as long to read as a step: the
    weights after every one, averages, what the model computes with, names of moments that were loaded and of the last
    ones"""

    def config(self, folder: Path) -> Config:
        recipe = RECIPE | dict(self.other) | {"train__freeze": self.freeze, "train__seed": self.seed}
        return configs.replace(build_config(folder, self), **recipe)


def run(rank: int, folder: str, jobs: list[Run]) -> dict[str, dict[str, Any]]:
    return run_each(run_job, Path(folder), jobs)


def run_job(folder: Path, job: Run) -> dict[str, Any]:
    """Losses after the checkpoint; weights after every step, averages after the last one, as numpy arrays."""
    from megatron_lcl.train.averages import Averages
    from megatron_lcl.train.broadcast_batches import broadcast_batches
    from megatron_lcl.train.checkpoint.checkpointer import Checkpointer
    from megatron_lcl.train.checkpoint.folder import Progress
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.master_weights import read_parameters
    from megatron_lcl.train.optimizers.pieces import partitions_of

    config = job.config(folder)
    mesh = init_processes(config)
    engine = build_engine(build_module(config, mesh, PARTITION if job.pipeline > 1 else None), config, mesh)
    stepper, averages = build_stepper(engine, config, mesh), Averages(config, engine)
    each, averaged, run = job.packs // mesh.data.size, {}, Path(config.train.output)
    with_gradient: set[str] = set()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: with_gradient.add(name))
    rows: list[tuple[float, float]] = []
    moments: dict[str, set[str]] = {}
    weights: list[dict[str, np.ndarray]] = []

    def steps(first: int, last: int) -> None:
        nonlocal averaged
        for step in range(first, last):
            own = range(mesh.data.rank * each, (mesh.data.rank + 1) * each)
            batches = [pack(step, number, config) for number in own] if mesh.loads_data else None
            pending = stepper.start(broadcast_batches(batches, each, 1, mesh, engine.device), LR[step])
            averages.update(step + 1, pending.skipped)
            result, averaged = pending.read(), averages.count(step + 1, averaged)
            rows.append((result.loss, result.grad_norm))
            if "every step" in job.reads or step == LAST - 1:
                weights.append(arrays(read_parameters(engine, mesh)))

    with Checkpointer(engine, config, mesh, run) as checkpoints:
        if job.source is None:
            steps(0, FIRST)
            checkpoints.save(Progress(FIRST, FIRST * job.packs, {}, averaged=averaged))
            checkpoints.wait()
        else:
            checkpoints.load(step_folder(folder / job.source, FIRST))
            averaged = read_progress(step_folder(folder / job.source, FIRST)).averaged
            assert averages.begin(averaged, config.train.steps) == averaged
            for kind in ("exp_avg", "exp_avg_sq") if "loaded" in job.reads else ():
                moments[kind] = {name for name, v in read_parameters(engine, mesh, kind).items() if v.any()}
            if job.passes_on:
                checkpoints.save(Progress(FIRST, FIRST * job.packs, {}, averaged=averaged))
                checkpoints.wait()
        steps(FIRST, LAST)
    of_last = ("exp_avg", "exp_avg_sq") if "moments" in job.reads else ()
    in_optimizer = sum(piece.length for each in partitions_of(engine.optimizer, mesh) for piece in each.pieces)
    looks_inside = "inside" in job.reads
    before = in_model(engine, mesh) if looks_inside else {}
    with averages.evaluated(averaged):
        inside = in_model(engine, mesh) if looks_inside else {}
    after = in_model(engine, mesh) if looks_inside else {}
    return {
        "rows": rows[FIRST - LAST :],
        "weights": weights,
        "averages": {name: arrays(read_parameters(engine, mesh, name)) for name in averaged if "averages" in job.reads},
        "inside": inside,
        "moments at first": moments,
        "undone": all(np.array_equal(before[name], after[name]) for name in before),
        "in optimizer": sum(mesh.world.gather_objects(in_optimizer)),
        "moments": {name for kind in of_last for name in read_parameters(engine, mesh, kind)},
        "with gradient": {name for names in mesh.world.gather_objects(with_gradient) for name in names},
    }


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.clone().numpy() for name, value in tensors.items()}


def in_model(engine: Any, mesh: Any) -> dict[str, np.ndarray]:
    """What the model computes with, not the masters."""
    import deepspeed

    from megatron_lcl.parallel.layers import full_tensor

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        own = {name: full_tensor(p.detach(), p, mesh.tensor).float() for name, p in named.items()}
        return {name: value for part in mesh.pipeline.gather_objects(arrays(own)) for name, value in part.items()}


HALF = (("optimizer__muon__dtype", "bfloat16"),)
"""as it is by default: what is summed in another order is rounded otherwise in Muon's iteration"""
SOURCES = {
    "zero1": Run("zero1"),
    "zero3": Run("zero3", 3, zero_options={"sub_group_size": 2000}),
    "tensor": Run("tensor", 2, tensor=2),
    "pipeline": Run("pipeline", pipeline=2, other=HALF),
    "bfloat16": Run("bfloat16", dtype="bfloat16"),
    "thawed": Run("thawed", freeze=()),
}
# small parameters are sharded too
HIERARCHICAL = Run(
    "hierarchical", 3, zero_options={"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
)
FROZEN_TOWERS = [
    Run("zero1 without vision", freeze=VISION),
    Run("pipeline without vision", pipeline=2, freeze=VISION),
    Run("zero3 without language", 3, freeze=LANGUAGE),
    Run("pipeline without language", pipeline=2, freeze=LANGUAGE),
]
ADAMW = (("optimizer__name", "adamw"),)
STABLE = (("optimizer__name", "stable_adamw"),)
PLAIN = (*ADAMW, ("optimizer__parts__vision__lr", 1.0))
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
OF_MUON = [
    Run("to adamw", source="zero1", other=ADAMW),
    Run("to adamw, zero3", 3, source="zero3", zero_options={"sub_group_size": 2000}, other=PLAIN),
    Run("to stable", source="bfloat16", dtype="bfloat16", other=STABLE),
    Run("to tensor ranks", tensor=2, source="tensor", zero=2, other=ADAMW),
    Run("to offloaded", 2, source="pipeline", zero_options=OFFLOADED, other=PLAIN),
    Run("thaw with adamw", 3, source="zero1", freeze=(), other=STABLE),
]
"""from a checkpoint of Muon's to another optimizer, at the same layout and at others"""
OF_ADAMW = [Run("adamw", other=ADAMW), Run("to muon", 3, source="adamw", passes_on=True)]
AND_BACK = [
    Run("back", 3, source="to muon", other=ADAMW),
    Run("back at another layout", source="to muon", tensor=2, zero=2, other=PLAIN),
]
"""from a checkpoint of Muon's with the second moments of the AdamW before it, which Muon leaves as they are"""
AGAIN = ("zero1", "zero3", "bfloat16")
OTHERS = [
    Run("a", 3, source="zero1"),
    Run("b", tensor=2, source="zero3"),
    Run("c", pipeline=2, source="tensor"),
    Run("d", 2, source="pipeline", other=HALF),
    Run("thaw", source="zero1", freeze=()),
    Run("freeze", 3, source="thawed"),
]


def again(job: Run) -> Run:
    """From its checkpoint, into a model drawn otherwise: all that it has comes from there."""
    return dataclasses.replace(job, name=f"{job.name}, fresh", source=job.name, seed=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    fresh = [again(SOURCES[name]) for name in AGAIN]
    # the last ones: once there is a hierarchy, DeepSpeed uses it in all that follows with ZeRO-3
    jobs = [
        *reading(SOURCES.values(), "every step", "averages", "inside"),
        *reading(fresh, "averages", "inside"),
        *reading(OTHERS, "averages"),
        *reading(OF_MUON, "every step", "loaded"),
        *reading([*OF_ADAMW, *AND_BACK], "loaded"),
        *reading(FROZEN_TOWERS, "averages", "moments"),
        *reading([HIERARCHICAL, again(HIERARCHICAL)], "averages", "inside"),
    ]
    return folder, run_processes(run, 2, str(folder), jobs, timeout=500.0)[0]


def reading(jobs: Iterable[Run], *reads: str) -> list[Run]:
    """Only what the tests look at."""
    return [dataclasses.replace(job, reads=frozenset(reads)) for job in jobs]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*AGAIN, HIERARCHICAL.name])
def test_at_the_same_layout_to_the_last_bit(name: str, runs: Any) -> None:
    first, again = runs[1][name], runs[1][f"{name}, fresh"]
    assert again["rows"] == first["rows"]
    for kind, average in first["averages"].items():
        for parameter, value in average.items():
            assert np.array_equal(value, again["averages"][kind][parameter]), (kind, parameter)
    assert first["undone"]
    assert again["undone"]


@pytest.mark.slow
@pytest.mark.parametrize("job", OTHERS[:4], ids=lambda job: f"{job.source} to {job.name}")
def test_at_another_layout(job: Run, runs: Any) -> None:
    """Losses, weights and averages as of the run that was not interrupted."""
    ours, theirs = runs[1][job.name], runs[1][job.source]
    # the largest seen: 1.3e-4 of Muon's parameters in bfloat16, 3.6e-7 of all else; another CPU rounds otherwise
    bound = 4e-4 if job.other == HALF else 1e-5
    for (loss, norm), (of_loss, of_norm) in zip(ours["rows"], theirs["rows"], strict=True):
        assert loss == pytest.approx(of_loss, rel=1e-5)
        assert norm == pytest.approx(of_norm, rel=bound)
    near(ours["weights"][-1], theirs["weights"][-1], bound)
    for kind, average in theirs["averages"].items():
        near(ours["averages"][kind], average, bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero3", "tensor", "pipeline"])
def test_averages_are_the_sums_that_they_are_said_to_be(name: str, runs: Any) -> None:
    folder, results = runs
    weights = results[name]["weights"]
    ema, tail = (results[name]["averages"][kind] for kind in ("ema_0.5", "tail_0.5"))
    saved = load_model(find_average(step_folder(folder / name, FIRST), "ema_0.5"))
    saved_parameters = {key: value.detach().numpy() for key, value in saved.layers.named_parameters()}
    near(saved_parameters, exponential(weights[:FIRST]))
    of_trained = {key: value for key, value in exponential(weights).items() if not key.startswith(FROZEN)}
    near(ema, of_trained)
    near(tail, {key: np.mean([w[key] for w in weights[FIRST:]], 0, np.float64) for key in of_trained})
    assert any(np.abs(tail[key] - weights[-1][key]).max() > 1e-3 for key in tail)
    near({key: results[name]["inside"][key] for key in ema}, ema)  # what is evaluated


def exponential(weights: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    shares = [DECAY ** (len(weights) - 1 - i) for i in range(len(weights))]
    return {
        key: sum(share * w[key].astype(np.float64) for share, w in zip(shares, weights, strict=True)) / sum(shares)
        for key in weights[0]
    }


@pytest.mark.slow
def test_what_is_frozen_stays_and_is_not_in_the_optimizer(runs: Any) -> None:
    results = runs[1]
    start = {
        name: p.detach().numpy()
        for name, p in LCL(SOURCES["zero1"].config(Path()).model, seed=0).layers.named_parameters()
    }
    trained = sum(value.size for name, value in start.items() if not name.startswith(FROZEN))
    for name in ("zero1", "zero3", "pipeline", "a", "b", "c", "d"):
        last = results[name]["weights"][-1]
        for key, value in start.items():
            assert np.array_equal(last[key], value) == key.startswith(FROZEN), (name, key)
        split = name in ("b",)  # each tensor rank has what is not split, and its shard of a padded vocabulary
        assert split or results[name]["in optimizer"] == trained, name
    assert results["thawed"]["in optimizer"] == sum(value.size for value in start.values())


@pytest.mark.slow
@pytest.mark.parametrize("job", FROZEN_TOWERS, ids=lambda job: job.name)
def test_a_whole_encoder_that_is_frozen(job: Run, runs: Any) -> None:
    """It keeps its bits, and neither gradients nor moments, masters or averages; all else moves."""
    frozen, result = TOWERS[job.freeze], runs[1][job.name]
    start = dict(LCL(job.config(Path()).model, seed=0).layers.named_parameters())
    trained = {key: value for key, value in start.items() if not key.startswith(frozen)}
    assert {key.partition(".")[0] for key in start.keys() - trained.keys()} == {key[0] for key in frozen}
    for key, value in start.items():
        assert np.array_equal(result["weights"][-1][key], value.detach().numpy()) == (key not in trained), key
    assert result["with gradient"] == trained.keys()
    assert result["moments"] == trained.keys()
    assert result["averages"]["ema_0.5"].keys() == trained.keys()
    assert result["in optimizer"] == sum(value.numel() for value in trained.values())


@pytest.mark.slow
def test_what_is_frozen_may_change_at_a_resume(runs: Any) -> None:
    folder, results = runs
    for job, source in (("thaw", "zero1"), ("freeze", "thawed")):
        saved = {
            name: p.detach().numpy()
            for name, p in load_model(step_folder(folder / source, FIRST)).layers.named_parameters()
        }
        last = results[job]["weights"][-1]
        for key, value in saved.items():
            stays = job == "freeze" and key.startswith(FROZEN)
            assert np.array_equal(last[key], value) == stays, (job, key)
    assert results["freeze"]["rows"][0][0] == pytest.approx(results["thawed"]["rows"][0][0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("job", OF_MUON, ids=lambda job: job.name)
def test_after_muon_steps_of_another_optimizer_are_bounded(job: Run, runs: Any) -> None:
    """In every element, whatever the gradients (Cauchy-Schwarz); with Muon's momentum some moved by hundreds of
    learning rates."""
    folder, results = runs
    config = job.config(folder)
    beta1, beta2 = config.optimizer.betas
    bound = (1 - beta1) / np.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    for key, value in load_model(step_folder(folder / job.source, FIRST)).layers.named_parameters():
        before = value.detach().numpy()
        for lr, weights in zip(LR[FIRST:], results[job.name]["weights"], strict=True):
            moved = np.abs(weights[key] - before) - lr * config.optimizer.weight_decay * np.abs(before)
            assert moved.max() < 1.001 * bound * lr, key
            before = weights[key]


@pytest.mark.slow
@pytest.mark.parametrize("job", [*OF_MUON, *AND_BACK], ids=lambda job: job.name)
def test_after_muon_what_it_stepped_begins_without_moments(job: Run, runs: Any) -> None:
    """Also where the AdamW before Muon has left its second moments, of other gradients; all else has both."""
    model = job.config(Path()).model
    named = dict(LCL(model, seed=0).layers.named_parameters())
    by_adamw = {name for name, p in named.items() if not muon_parts(name, p.shape, model, per_head=False)}
    kept = {name for name in by_adamw if not name.startswith(FROZEN)}
    assert runs[1][job.name]["moments at first"] == {"exp_avg": kept, "exp_avg_sq": kept}


@pytest.mark.slow
def test_muon_goes_on_with_the_moments_of_adamw(runs: Any) -> None:
    named = LCL(OF_ADAMW[0].config(Path()).model, seed=0).layers.named_parameters()
    trained = {name for name, _ in named if not name.startswith(FROZEN)}
    assert runs[1]["to muon"]["moments at first"] == {"exp_avg": trained, "exp_avg_sq": trained}


@pytest.mark.slow
def test_an_average_that_is_not_there_is_named(runs: Any) -> None:
    folder = step_folder(runs[0] / "zero1", FIRST)
    with pytest.raises(UserError, match=r"has no average ema_0.9; there are ema_0.5$"):
        find_average(folder, "ema_0.9")  # the tail has not begun


def near(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float = 1e-4) -> None:
    """Key biases left out: their gradients are rounding, which Adam makes large."""
    assert ours.keys() == expected.keys()
    for key in (key for key in ours if not key.endswith("k.bias")):
        error = np.linalg.norm(ours[key] - expected[key]) / max(np.linalg.norm(expected[key]), 1e-2)
        assert error < bound, (key, error)
