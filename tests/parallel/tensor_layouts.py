"""Steps of the reference model at a tensor-parallel layout on real processes, and the same steps in one process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_lcl import LCL, from_open_clip
from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.train.parts import frozen_parameters

STEPS = 2
BELOW_BOUND = math.log(99.95)


@dataclass(frozen=True)
class Case:
    """A layout, what is special about the run, and the sequences of each micro-batch of each replica."""

    tensor: int
    split: tuple[tuple[tuple[int, ...], ...], ...] = (((2,), (0, 1)),)
    zero: int = 1
    strategy: str = "retain"
    clip_norm: float = 0.0
    climbs: bool = False
    """the log scale starts just below ln 100, not at the reference's, and the steps go uphill, with a negative learning
    rate: so it goes up, and is clamped"""
    dtype: str = "float32"
    checkpointing: str = "none"
    objective: str = "lcl"
    offloaded: bool = False
    """the optimizer is on the CPU"""

    @property
    def processes(self) -> int:
        return self.tensor * len(self.split)

    def lr(self, settings: dict[str, Any]) -> float:
        return -settings["lr"] if self.climbs else settings["lr"]

    def config(self, model: configs.Model, settings: dict[str, Any]) -> Config:
        tree = {
            "optimizer": {**settings, "clip_norm": self.clip_norm},
            "zero": {"stage": self.zero},
            "parallel": {"tensor": self.tensor},
            "contrast": {"strategy": self.strategy},
            "objective": {"name": self.objective},
            "train": {
                "global_batch": len(self.split) * len(self.split[0]),
                "dtype": self.dtype,
                "activation_checkpointing": self.checkpointing,
            },
            # no parameter so small that ZeRO-3 leaves it whole
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0} if self.zero == 3 else {}},
        }
        if self.offloaded:
            tree["deepspeed"]["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}  # type: ignore[index]
        if self.climbs:
            tree["contrast"]["initial_log_scale"] = BELOW_BOUND  # type: ignore[index]
        return configs.replace(configs.from_dict(tree), model=configs.to_dict(configs.Config(model=model))["model"])


@dataclass
class Run:
    """What the steps gave; tensors as numpy arrays, so that a queue copies them."""

    losses: list[list[float]]
    """per step: generation, contrastive, gradient norm, log scale after it"""
    gradients: dict[str, np.ndarray]
    """full, of the first step, before clipping"""
    parameters: dict[str, np.ndarray]
    """full, after the last step"""
    unlike: list[str]
    """parameters that should be the same on every tensor rank, and are not after the last step"""


def reference(file: str, case: Case) -> tuple[LCL, dict[str, torch.Tensor], dict[str, Any]]:
    """The reference's model, batches, and optimizer."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["optimizer"])
        model_config = json.loads(opened.metadata()["config"])
    model = from_open_clip({n[6:]: value for n, value in tensors.items() if n.startswith("param/")}, model_config)
    if case.climbs:
        model.head.log_scale.data.fill_(BELOW_BOUND)
    return model, tensors, settings


def one_process(file: str, case: Case, clamp: bool = True) -> Run:
    """The truth: every sequence in one forward, torch's own optimizer and clipping."""
    model, tensors, settings = reference(file, case)
    named = dict(model.layers.named_parameters())
    groups = [
        {"params": [p for p in named.values() if (p.dim() >= 2) == decays], "weight_decay": decay}
        for decays, decay in ((True, settings["weight_decay"]), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"])
    for group in optimizer.param_groups:
        group["lr"] = case.lr(settings)
    losses, gradients = [], {}
    untrained = frozen_parameters(case.config(model.config, settings))
    chosen = sorted(s for replica in case.split for micro_batch in replica for s in micro_batch)
    for step in range(STEPS):
        text, images = _sequences(tensors, model, step, chosen)
        out = model(images, text)
        optimizer.zero_grad()
        (out.generation_loss + (0.1 if case.objective == "lcl" else 0.0) * out.contrastive_loss).backward()
        for name in untrained:
            named[name].grad = None
        if step == 0:
            gradients = {name: p.grad.clone().numpy() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(named.values(), case.clip_norm or float("inf"))
        optimizer.step()
        if clamp:
            model.head.log_scale.data.clamp_(0, math.log(100))
        numbers = (out.generation_loss, out.contrastive_loss, norm, model.head.log_scale)
        losses.append([float(x.detach()) for x in numbers])
    return Run(losses, gradients, {name: p.detach().numpy() for name, p in named.items()}, [])


def differences(case: Case, ours: Run, truth: Run) -> dict[str, float]:
    """What differs by more than float32 sums in another order do, with the relative difference."""
    found = {}
    for step, (a, b) in enumerate(zip(ours.losses, truth.losses, strict=True)):
        for what, x, y in zip(("generation", "contrastive", "gradient norm", "log scale"), a, b, strict=True):
            if case.objective == "lcl" or what != "contrastive":
                found[f"{what} of step {step}"] = abs(x - y) / abs(y)
    total = _norm(truth.gradients.values())
    for name, gradient in truth.gradients.items():
        error = float(np.linalg.norm(ours.gradients[name] - gradient))
        allowed = 1e-5 * float(np.linalg.norm(gradient)) + 1e-8 * total
        found[f"gradient of {name}"] = 1e-5 * error / allowed
    # key biases: their gradients are rounding, which Adam turns into steps of full size
    names = [name for name in truth.parameters if not name.endswith("k.bias")]
    moved = _norm(ours.parameters[name] - truth.parameters[name] for name in names)
    found["parameters"] = moved / _norm(truth.parameters[name] for name in names)
    found |= {f"{name} is not the same on every rank": 1.0 for name in ours.unlike}
    return {what: difference for what, difference in found.items() if not difference <= 1e-5}


def _norm(arrays: Any) -> float:
    return float(np.sqrt(sum(np.square(a.astype(np.float64)).sum() for a in arrays)))


def _sequences(
    tensors: dict[str, torch.Tensor], model: LCL, step: int, chosen: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    text, images = (tensors[f"batch{step % 2}/{kind}"] for kind in ("text", "images"))
    of_sequences = images.split((text == model.special.soi).sum(1).tolist())
    return text[list(chosen)], torch.cat([images[:0], *(of_sequences[s] for s in chosen)])


def run_cases(rank: int, file: str, cases: tuple[Case, ...], faults: tuple[str, ...] = ("",)) -> list[Run]:
    """Every case on these processes, one after another, and with every fault."""
    import torch.distributed as dist
    from planted_faults import planted

    runs = []
    for case in cases:
        for fault in faults:
            with planted(fault):
                runs.append(run_case(file, case))
    dist.destroy_process_group()
    return runs


def run_case(file: str, case: Case) -> Run:
    """One case, on all processes of the default group."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from megatron_lcl.parallel.layers import full_tensor, is_split, shard
    from megatron_lcl.train.engine import build_engine, build_module, init_processes
    from megatron_lcl.train.step import Stepper

    get_accelerator().is_fp16_supported = lambda: True  # a CPU without such instructions is merely slow
    model, tensors, settings = reference(file, case)
    config = case.config(model.config, settings)
    mesh = init_processes(config)
    module = build_module(config, mesh)
    full = dict(model.layers.named_parameters())
    for name, parameter in module.named_parameters():
        parameter.data.copy_(shard(full[name].data, parameter, mesh.tensor))
    engine = build_engine(module, config, mesh)
    stepper = Stepper(engine, config, mesh)

    def gather(value: torch.Tensor | None, parameter: torch.Tensor) -> np.ndarray:
        value = parameter.detach() if value is None else value
        return full_tensor(value, parameter, mesh.tensor).float().clone().numpy()

    named = dict(engine.module.named_parameters())
    losses: list[list[float]] = []
    gradients: dict[str, np.ndarray] = {}
    engine_step = engine.step

    def recording_step() -> None:
        if not gradients and engine.is_gradient_accumulation_boundary():
            gradients.update((name, gather(safe_get_full_grad(p), p)) for name, p in named.items() if p.requires_grad)
        engine_step()

    engine.step = recording_step
    for step in range(STEPS):
        batches = []
        for sequences in case.split[mesh.data.rank]:
            text, images = _sequences(tensors, model, step, sequences)
            batches.append(pack_padded(text, (text != 0).sum(1), images, model.config))
        result = stepper.run(batches, case.lr(settings))
        losses.append([result.metrics["generation"], result.metrics["contrastive"], result.grad_norm, result.log_scale])
    same = {name: p.detach().float().numpy().tobytes() for name, p in named.items() if not is_split(p)}
    everyone = mesh.tensor.gather_objects(same)
    unlike = [name for name in same if any(of_rank[name] != same[name] for of_rank in everyone)]
    parameters = {name: gather(safe_get_full_fp32_param(p), p) for name, p in named.items()}
    return Run(losses, gradients, parameters, unlike)
