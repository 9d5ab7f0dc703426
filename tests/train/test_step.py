"""Steps through DeepSpeed on real processes against the reference's optimizer steps on one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_lcl import LCL, from_open_clip
from megatron_lcl import config as configs
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.reference_format import open_clip_config
from megatron_lcl.selftest.cases import Case

OFFLOADED = {"device": "cpu"}

# (ZeRO stage, strategy, sequences of each micro-batch of each process, DeepSpeed's own settings)
SPLITS: dict[str, Any] = {
    "one process": (1, "retain", [[[0, 1, 2]]]),
    "two processes": (1, "retain", [[[0]], [[1, 2]]]),
    "two micro-batches": (1, "retain", [[[2], [0, 1]]]),
    "two of each": (1, "retain", [[[0], []], [[1], [2]]]),
    "two of each, recomputed": (1, "recompute", [[[0], []], [[1], [2]]]),
    "ZeRO-2": (2, "retain", [[[0], []], [[1], [2]]]),
    "ZeRO-3": (3, "recompute", [[[0], []], [[1], [2]]], {"stage3_param_persistence_threshold": 0}),  # small ones too
    "optimizer on the CPU": (1, "retain", [[[0], []], [[1], [2]]], {"offload_optimizer": OFFLOADED}),
    "parameters on the CPU": (
        3,
        "recompute",
        [[[0], []], [[1], [2]]],
        {"offload_optimizer": OFFLOADED, "offload_param": OFFLOADED},
    ),
    # two groups of two processes; with fewer processes there is no hierarchy
    "hierarchical ZeRO-3": (
        3,
        "recompute",
        [[[0], []], [[], [1]], [[2], []], [[], []]],
        {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0},
    ),
}


def steps_of(
    rank: int,
    reference: str,
    zero: int,
    strategy: str,
    split: list[list[list[int]]],
    dtype: str = "float32",
    objective: str = "lcl",
    deepspeed: dict[str, Any] | None = None,
    steps: int = 3,
) -> list[list[float]]:
    import torch.distributed as dist

    if dtype == "float16":  # DeepSpeed refuses it on a CPU without such instructions; torch is merely slow
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True

    from megatron_lcl.train.engine import build_engine, init_processes
    from megatron_lcl.train.step import Stepper

    tensors = load_file(reference)
    with safe_open(reference, "pt") as file:
        settings = json.loads(file.metadata()["optimizer"])
        model_config = json.loads(file.metadata()["config"])
    parameters = {name[6:]: value for name, value in tensors.items() if name.startswith("param/")}
    model = from_open_clip(parameters, model_config)
    micro_batches = len(split[0])
    config = configs.from_dict(
        {
            "optimizer": {**settings, "clip_norm": 0},
            "zero": {"stage": zero},
            "contrast": {"strategy": strategy},
            "objective": {"name": objective},
            "train": {"global_batch": len(split) * micro_batches, "dtype": dtype},
            "deepspeed": deepspeed or {},
        }
    )
    mesh = init_processes(config)
    contrast = of_contrast(model, tensors["batch0/images"], tensors["batch0/text"])
    engine = build_engine(model.layers, config, mesh)
    stepper = Stepper(engine, config, mesh)
    with_gradients = zero < 3 and dtype == "float32" and objective == "lcl"
    gradients = record_gradients(engine, model) if with_gradients else []
    rows = []
    for step in range(steps):
        text, images = (tensors[f"batch{step % 2}/{kind}"] for kind in ("text", "images"))
        num_images = (text == model.special.soi).sum(1).tolist()
        own_images = images.split(num_images)
        batches = []
        for sequences in split[rank]:
            chosen = torch.cat([images[:0], *(own_images[i] for i in sequences)])
            batches.append(pack_padded(text[sequences], (text[sequences] != 0).sum(1), chosen, model.config))
        # DeepSpeed would start one for each sum of ZeRO-3's gradients
        with patch.object(subprocess, "Popen", side_effect=AssertionError("a step starts a process")):
            result = stepper.run(batches, settings["lr"])
        if step == 0 and dtype == "float32" and objective == "lcl":
            assert {name: result.numbers()[name] for name in contrast} == pytest.approx(contrast, rel=1e-5)
        rows.append([0.1 * result.metrics["contrastive"], result.metrics["generation"], result.loss, result.log_scale])
    if with_gradients:
        assert_gradients(gradients[0], tensors)  # what the first step's optimizer was given
    dist.destroy_process_group()
    return rows


@torch.no_grad()
def of_contrast(model: LCL, images: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """What is to be said of the contrast over a batch, from the whole matrix of similarities, in float64."""
    out = model(images, text)
    similarity = out.image_features.double() @ out.text_features.double().t()
    pairs = torch.arange(len(similarity))
    others = similarity.masked_fill(torch.eye(len(pairs), dtype=torch.bool), -math.inf)
    logits = similarity * out.logit_scale
    loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2
    return {
        "contrastive": float(loss),
        "image_accuracy": float((similarity.argmax(1) == pairs).double().mean()),
        "text_accuracy": float((similarity.argmax(0) == pairs).double().mean()),
        "positive_similarity": float(similarity.diagonal().mean()),
        "hardest_negative_similarity": float((others.amax(0).mean() + others.amax(1).mean()) / 2),
        "mutual_information": math.log(len(pairs)) - float(loss),
        "num_pairs": len(pairs),
    }


def record_gradients(engine: Any, model: LCL) -> list[dict[str, torch.Tensor]]:
    """The gradients that the first optimizer step is given, under the reference's names."""
    from deepspeed.utils import safe_get_full_grad

    recorded: list[dict[str, torch.Tensor]] = []
    step = engine.step

    def recording_step() -> None:
        if not recorded and engine.is_gradient_accumulation_boundary():
            copy = from_open_clip(model.state_dict_open_clip(), open_clip_config(model.config))
            for ours, theirs in zip(model.layers.parameters(), copy.layers.parameters(), strict=True):
                gradient = safe_get_full_grad(ours)
                theirs.data.copy_(torch.zeros_like(theirs) if gradient is None else gradient)
            recorded.append(copy.state_dict_open_clip())
        step()

    engine.step = recording_step
    return recorded


def assert_gradients(ours: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """As for one process: each within 1e-5 of itself and 1e-8 of all of them."""
    total = float(torch.stack([tensors[f"grad/{name}"].double().norm() for name in ours]).norm())
    for name, gradient in ours.items():
        theirs = tensors[f"grad/{name}"]
        error = float((gradient - theirs).norm())
        assert error <= 1e-5 * float(theirs.norm()) + 1e-8 * total, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_steps_equal_the_reference(name: str, shared: Path) -> None:
    zero, strategy, split, *zero_options = SPLITS[name]
    deepspeed = {"zero_optimization": zero_options[0]} if zero_options else {}
    file = str(shared / "reference" / "lcl_tiny.safetensors")
    steps = 5 if name == "one process" else 3
    results = run_processes(steps_of, len(split), file, zero, strategy, split, "float32", "lcl", deepspeed, steps)
    expected = load_file(file)["traj"][:steps]
    for rows in results:
        ours = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(ours[:, 2], expected[:, 2], rtol=5e-5, atol=0)
        torch.testing.assert_close(ours[:, 3], expected[:, 3], rtol=1e-5, atol=0)
        # the first step's losses, before any update
        torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_in_bfloat16_the_log_scale_trains_in_float32(shared: Path) -> None:
    """Rounded to bfloat16 it would stand still: a step moves it by a tenth of the distance between two neighbors."""
    file = str(shared / "reference" / "lcl_tiny.safetensors")
    results = run_processes(steps_of, 2, file, 1, "retain", [[[0], [2]], [[1], []]], "bfloat16")
    expected = load_file(file)["traj"][:3]
    for rows in results:
        ours = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(ours[:, 3], expected[:, 3], rtol=0, atol=4e-4)
        torch.testing.assert_close(ours[:, 2], expected[:, 2], rtol=2e-2, atol=0)
        assert len(set(ours[:, 3].tolist())) == 3


def numbers_in_bfloat16(rank: int) -> list[dict[str, float]]:
    """Scale and bias of a sigmoid contrast as a step reads them: of a new engine, and after an update of each."""
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.master_weights import read_numbers, update_log_scale

    config = configs.replace(Case(dtype="bfloat16", objective="siglip").config(), model__logit_bias=-9.99)
    mesh = init_processes(config)
    head = build_stepper(build_engine(build_module(config, mesh), config, mesh), config, mesh)._head()
    found = [read_numbers(head)]
    for parameter in head.numbers.values():
        update_log_scale(parameter, lambda value: value + 0.01)
    found.append(read_numbers(head))
    return [{name: float(value) for name, value in numbers.items()} for numbers in found]


@pytest.mark.slow
def test_in_bfloat16_scale_and_bias_are_read_in_float32() -> None:
    """bfloat16 has nothing between -10 and -9.9375, nor between 2.65625 and 2.671875."""
    before, after = run_processes(numbers_in_bfloat16, 1)[0]
    scale = math.log(1 / 0.07)
    assert before == pytest.approx({"log_scale": scale, "logit_bias": -9.99}, abs=1e-5)
    assert after == pytest.approx({"log_scale": scale + 0.01, "logit_bias": -9.98}, abs=1e-5)


@pytest.mark.slow
def test_without_a_contrast_zero3_accumulates_like_zero1(shared: Path) -> None:
    """Under ZeRO-3, forwards that are all kept before the first backward give wrong gradients without an error."""
    file = str(shared / "reference" / "lcl_tiny.safetensors")
    split = [[[0], [2]], [[1], []]]
    plain, sharded = (
        run_processes(steps_of, 2, file, zero, "retain", split, "float32", "generation")[0] for zero in (1, 3)
    )
    ours, theirs = torch.tensor(sharded, dtype=torch.float64), torch.tensor(plain, dtype=torch.float64)
    torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=1e-5, atol=0)
    assert theirs[-1, 1] < theirs[0, 1]


def one_loss(rank: int, reference: str, objective: str) -> tuple[float, float, list[float], float]:
    """Of a step for one of the losses: what was reported and the gradient's norm, and both by plain autograd."""
    from megatron_lcl.train.engine import build_engine, init_processes
    from megatron_lcl.train.step import Stepper

    tensors = load_file(reference)
    with safe_open(reference, "pt") as file:
        model_config = json.loads(file.metadata()["config"])
    model = from_open_clip({n[6:]: t for n, t in tensors.items() if n.startswith("param/")}, model_config)
    images, text = tensors["batch0/images"], tensors["batch0/text"]
    out = model(images, text)
    loss = out.contrastive_loss if objective == "clip" else out.generation_loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    config = configs.from_dict(
        # the weights of `lcl`, whatever they are, are not this objective's
        {
            "objective": {"name": objective, "contrastive_weight": 0.1, "generation_weight": 7.0},
            "optimizer": {"clip_norm": 0},
            "train": {"global_batch": 1},
        }
    )
    mesh = init_processes(config)
    stepper = Stepper(build_engine(model.layers, config, mesh), config, mesh)
    result = stepper.run([pack_padded(text, (text != 0).sum(1), images, model.config)], 0.0)
    reported = result.metrics["contrastive"] if objective == "clip" else result.metrics["generation"]
    return float(loss), float(norm), [result.loss, reported], result.grad_norm


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clip", "generation"])
def test_an_objective_of_one_loss_has_weight_1(objective: str, shared: Path) -> None:
    file = str(shared / "reference" / "lcl_tiny.safetensors")
    loss, norm, reported, grad_norm = run_processes(one_loss, 1, file, objective)[0]
    assert reported == pytest.approx([loss] * 2, rel=1e-5)
    assert grad_norm == pytest.approx(norm, rel=1e-5)


def scale_after_a_step(rank: int, reference: str, rate: float) -> float:
    """The log scale that was 0.001."""
    from megatron_lcl.train.engine import build_engine, init_processes
    from megatron_lcl.train.step import Stepper

    tensors = load_file(reference)
    with safe_open(reference, "pt") as file:
        model_config = json.loads(file.metadata()["config"])
    model = from_open_clip({n[6:]: t for n, t in tensors.items() if n.startswith("param/")}, model_config)
    model.head.log_scale.data.fill_(1e-3)
    config = configs.from_dict({"train": {"global_batch": 1}})
    mesh = init_processes(config)
    stepper = Stepper(build_engine(model.layers, config, mesh), config, mesh)
    text = tensors["batch0/text"]
    batches = [pack_padded(text, (text != 0).sum(1), tensors["batch0/images"], model.config)]
    stepper.run(batches, rate)
    return stepper.run(batches, 0.0).log_scale


@pytest.mark.slow
def test_the_scale_is_at_least_1(shared: Path) -> None:
    """One of two steps in opposite directions takes its logarithm below 0."""
    file = str(shared / "reference" / "lcl_tiny.safetensors")
    low, high = sorted(run_processes(scale_after_a_step, 1, file, rate)[0] for rate in (0.1, -0.1))
    assert low == 0
    assert high > 0.05


@pytest.mark.parametrize("objective", ["lcl", "clip"])
def test_zero3_with_kept_graphs_is_refused(objective: str) -> None:
    from megatron_lcl.train.settings import deepspeed_config

    config = configs.from_dict({"zero": {"stage": 3}, "objective": {"name": objective}})
    with pytest.raises(ValueError, match=r"set contrast\.strategy to recompute"):
        deepspeed_config(config, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "strategy"), [(1, "retain"), (3, "recompute")])
def test_float16_with_loss_scaling(zero: int, strategy: str, shared: Path) -> None:
    """A scale that overflows is halved until it fits, and the steps that overflowed change nothing."""
    file = str(shared / "reference" / "lcl_tiny.safetensors")
    split = [[[0], []], [[1], [2]]]
    expected = load_file(file)["traj"][:3]
    fits = {"fp16": {"initial_scale_power": 8}}
    for rows in run_processes(steps_of, 2, file, zero, strategy, split, "float16", "lcl", fits):
        ours = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(ours[:, 2], expected[:, 2], rtol=1e-3, atol=0)
        torch.testing.assert_close(ours[:, 3], expected[:, 3], rtol=0, atol=1e-4)
    too_large = {"fp16": {"initial_scale_power": 20, "hysteresis": 1}}
    for rows in run_processes(steps_of, 2, file, zero, strategy, split, "float16", "lcl", too_large, 5):
        ours = torch.tensor(rows, dtype=torch.float64)
        start = math.log(1 / 0.07)
        torch.testing.assert_close(ours[:2, 3], torch.full((2,), start, dtype=torch.float64), rtol=0, atol=1e-6)
        assert ours[2, 2] == ours[0, 2], "the same batch, and nothing has changed"
        assert abs(float(ours[-1, 3]) - start) > 5e-4, "a scale that fits is reached"
