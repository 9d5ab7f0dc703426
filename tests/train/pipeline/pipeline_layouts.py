"""A tiny model, ragged global batches, the plain one-process truth, and what a pipeline gives on real processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers
from megatron_lcl.model.lcl import LayerList, pack_padded
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.train.parts import frozen_parameters

VOCABULARY, LR = 61, 3e-3
MODEL = {
    "vision": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "heads": 2, "mlp_width": 40},
    "language": {
        "context_length": 48,
        "vocab_size": VOCABULARY,
        "width": 16,
        "layers": 3,
        "heads": 2,
        "mlp_width": 32,
    },
    "pool_heads": 2,
}
NUM_LAYERS = 8
OF_CONTRAST = (
    "image_accuracy",
    "text_accuracy",
    "positive_similarity",
    "hardest_negative_similarity",
    "mutual_information",
)

Split = tuple[tuple[tuple[int, ...], ...], ...]
"""for each replica, for each micro-batch, for each sequence: its number of images"""


@dataclass(frozen=True)
class Case:
    """A layout, and how its global batch is split."""

    partition: tuple[int, ...]
    """the first layer of each pipeline stage"""
    split: Split
    strategy: str = "retain"
    objective: str = "lcl"
    climbs: bool = False
    """the log scale starts just below ln 100, and the steps go uphill, with a negative learning rate: so it goes up,
    and is clamped"""
    dtype: str = "float32"
    clip_norm: float = 0.5
    tensor: int = 1
    checkpointing: str = "none"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    """see `pipeline_faults`"""
    limit: float = math.inf
    """of the loss"""
    steps: int = 2

    @property
    def lr(self) -> float:
        if self.objective == "clip":  # so steep alone that after two steps of LR roundings show in the norm at 7e-5
            return LR / 30
        return -LR if self.climbs else LR

    @property
    def config(self) -> Config:
        replicas, micro_batches = len(self.split), len(self.split[0])
        return configs.from_dict(
            {
                "model": MODEL,
                "optimizer": {"clip_norm": self.clip_norm, "weight_decay": 0.1},
                "parallel": {"pipeline": len(self.partition), "tensor": self.tensor},
                "contrast": {
                    "strategy": self.strategy,
                    "initial_log_scale": math.log(99.95 if self.climbs else 1 / 0.07),
                },
                "objective": {"name": self.objective},
                "train": {
                    "global_batch": replicas * micro_batches,
                    "dtype": self.dtype,
                    "activation_checkpointing": self.checkpointing,
                },
                "deepspeed": self.deepspeed,
            }
        )


def micro_batch(images_of_sequences: tuple[int, ...], config: Config, generator: torch.Generator) -> PackedBatch:
    """Sequences of random text with so many images each; the first image has no text before it, one sequence in two."""
    special = SpecialTokens.of(VOCABULARY)
    num_patches, size = config.model.vision.num_patches, config.model.vision.image_size

    def text(longest: int) -> list[int]:
        return torch.randint(
            1, 50, (int(torch.randint(1, longest, (1,), generator=generator)),), generator=generator
        ).tolist()

    rows = []
    for number, num_images in enumerate(images_of_sequences):
        row = [] if number % 2 and num_images else [special.sot, *text(6)]
        for _ in range(num_images):
            row += [special.soi, *[special.placeholder] * num_patches, special.eoi, *text(5)]
        rows.append([*row, special.eot])
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
    images = torch.randint(0, 256, (sum(images_of_sequences), 3, size, size), generator=generator, dtype=torch.uint8)
    return pack_padded(ids, lengths, images, config.model)


def global_batch(case: Case, step: int) -> list[list[PackedBatch]]:
    """For each replica its micro-batches."""
    generator = torch.Generator().manual_seed(step)
    return [[micro_batch(m, case.config, generator) for m in replica] for replica in case.split]


def layers_of(config: Config) -> LayerList:
    layers = build_layers(config.model, config.initial_log_scale)
    initialize(dict(enumerate(layers)), config.model, config.train.seed)
    return LayerList(*layers)


def truth(case: Case, max_log_scale: float = math.log(100)) -> dict[str, Any]:
    """Losses, gradient norms, log scales, first gradients, last parameters: plain torch, one process, no DeepSpeed."""
    config = case.config
    model = layers_of(config)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=config.optimizer.betas, eps=config.optimizer.eps)
    for group in optimizer.param_groups:
        group["lr"] = case.lr
    log_scale, untrained = named[f"{NUM_LAYERS - 1}.log_scale"], frozen_parameters(config)
    found: dict[str, Any] = {"rows": [], "contrast": []}
    for step in range(case.steps):
        batches = [batch for replica in global_batch(case, step) for batch in replica]
        outputs = [model(batch) for batch in batches]
        generation = sum(out.generation for out in outputs) / max(1, sum(batch.num_targets for batch in batches))
        image, text = (
            torch.cat([getattr(o, name)[b.image_soi >= 0] for o, b in zip(outputs, batches, strict=True)])
            for name in ("image_features", "text_features")
        )
        logits, target = log_scale.exp() * image @ text.t(), torch.arange(len(image))
        contrast = torch.zeros(())
        if len(image):
            contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
        loss = {"lcl": generation + 0.1 * contrast, "clip": contrast, "generation": generation}[case.objective]
        found["contrast"].append(of_contrast(image.detach(), text.detach(), contrast.detach(), case))
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
        for name, parameter in named.items():  # DeepSpeed's are zero where torch has none
            parameter.grad = None if name in untrained else gradients[name]
        if step == 0:
            found["gradients"] = {name: gradient.clone() for name, gradient in gradients.items()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm or math.inf)
        optimizer.step()
        with torch.no_grad():
            log_scale.clamp_(0, max_log_scale)
        contrast = contrast if case.objective != "generation" else torch.zeros(())
        found["rows"].append([float(v.detach()) for v in (loss, generation, contrast, norm, log_scale[0])])
    found["parameters"] = {name: p.detach().clone() for name, p in named.items()}
    return found


def of_contrast(image: torch.Tensor, text: torch.Tensor, loss: torch.Tensor, case: Case) -> dict[str, float]:
    """What is said of a step's contrast, from the whole matrix of similarities [N, N] at once."""
    num = len(image)
    if case.objective == "generation":
        return dict.fromkeys(OF_CONTRAST, 0.0)
    if num == 0:
        return {**dict.fromkeys(OF_CONTRAST, 0.0), "hardest_negative_similarity": -1.0}
    similarity, pairs = image @ text.t(), torch.arange(num)
    others = similarity.masked_fill(torch.eye(num, dtype=torch.bool), -math.inf)
    values = (
        (similarity.argmax(1) == pairs).float().mean(),
        (similarity.argmax(0) == pairs).float().mean(),
        similarity.diagonal().mean(),
        (others.amax(1).mean() + others.amax(0).mean()) / 2 if num > 1 else -1.0,
        math.log(num) - loss,
    )
    return dict(zip(OF_CONTRAST, map(float, values), strict=True))


def run_cases(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    """The same from a pipeline, case after case, on the processes of one start; each gives what its stage holds."""
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses float16 on a CPU without such instructions; torch is merely slow
    get_accelerator().is_fp16_supported = lambda: True
    results = [run_case(case) for case in cases]
    dist.destroy_process_group()
    return results


def run_case(case: Case) -> dict[str, Any]:
    from unittest.mock import patch

    from pipeline_faults import planted
    from pipeline_probes import count_bytes, count_graphs

    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    config = case.config
    mesh = init_processes(config)
    engine = build_engine(build_module(config, mesh, case.partition), config, mesh)
    found: dict[str, Any] = {"rows": [], "results": [], "applied": [], "loss_scales": []}
    take_step = engine._take_model_step

    def recording(*arguments: Any) -> None:
        if "gradients" not in found:
            found["gradients"] = whole_tensors(engine, mesh, "gradients")
        take_step(*arguments)

    stepper = build_stepper(engine, config, mesh)
    with (
        patch.object(engine, "_take_model_step", recording),
        count_bytes() as sent,
        count_graphs(engine.module) as graphs,
        planted(case.fault, engine, mesh),
    ):
        for step in range(case.steps):
            batches = global_batch(case, step)[mesh.data.rank]
            if mesh.pipeline.rank:
                batches = [without_images(batch) for batch in batches]
            sent.clear()
            result = stepper.run(batches, case.lr, case.limit)
            found["results"].append(result.numbers())
            found["applied"].append(result.applied)
            found["loss_scales"].append(float(getattr(engine.optimizer, "loss_scale", 1)))
            names = ("loss", "generation", "contrastive", "grad_norm", "log_scale")
            found["rows"].append([result.numbers()[name] for name in names])
            found["bytes"] = (mesh.pipeline.rank, sum(sent), expected_bytes(case, batches))
    found["scales of a forward"] = {float(out.log_scale) for out in stepper.forward(batches)}
    found["graphs"] = (mesh.pipeline.rank, graphs.most)
    found["parameters"] = whole_tensors(engine, mesh, "parameters")
    engine.destroy()
    return found


def whole_tensors(engine: Any, mesh: Any, kind: str) -> dict[str, Any]:
    """Gradients or float32 parameters of this stage, of all tensor ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from megatron_lcl.parallel.layers import full_tensor

    get = safe_get_full_grad if kind == "gradients" else safe_get_full_fp32_param
    whole = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            value = get(parameter)
        else:  # the objective does not train it
            value = torch.zeros_like(parameter) if kind == "gradients" else parameter
        assert value.dtype == torch.float32, f"{kind} of {name} are {value.dtype}"
        whole[name] = full_tensor(value, parameter, mesh.tensor).detach().numpy().copy()
    return whole


def expected_bytes(case: Case, batches: list[PackedBatch]) -> list[int]:
    """What each stage sends in a step: to the next, of every micro-batch, hidden rows; to the one before, a gradient.

    Up to the pool a row of 24 numbers for each of an image's 4 patches and its class token, behind it a row of 16 for
    each token and each image; each padded to a multiple of the tensor ranks, which share them.
    """

    def rows(number: int) -> int:
        return -(-number // case.tensor)

    size = {"float32": 4}.get(case.dtype, 2)
    over = []
    for first in case.partition[1:]:
        images, tokens = [len(b.image_soi) for b in batches], [len(b.tokens) for b in batches]
        in_encoder = first <= MODEL["vision"]["layers"] + 1
        vision, language = sum(rows(5 * n) * 24 for n in images), sum(rows(n) * 16 for n in [*tokens, *images])
        over.append(size * (vision if in_encoder else language))
    forwards = 2 if case.strategy == "recompute" and case.objective != "generation" else 1
    return [forwards * after + before for after, before in zip([*over, 0], [0, *over], strict=True)]


def without_images(batch: PackedBatch) -> PackedBatch:
    """As `broadcast_batches` gives it to the later stages."""
    import dataclasses

    return dataclasses.replace(batch, images=batch.images[:0])


def gathered(results: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    """The whole model by name; processes that hold the same parameter must hold the same."""
    whole: dict[str, torch.Tensor] = {}
    for result in results:
        for name, array in result[key].items():
            tensor = torch.from_numpy(array)
            assert name not in whole or torch.equal(whole[name], tensor), f"replicas differ in {key} of {name}"
            whole[name] = tensor
    return whole


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of the whole model; key biases, whose gradient is 0, are skipped."""
    assert ours.keys() == theirs.keys()
    names = [name for name in theirs if not name.endswith("k.bias")]
    a, b = (torch.cat([t[n].flatten().double() for n in names]) for t in (ours, theirs))
    return float((a - b).norm() / b.norm())


def faults_of(results: list[dict[str, Any]], expected: dict[str, Any], bound: float = 1e-5) -> list[str]:
    """What a run gave that is not what it should; empty if nothing is."""
    faults = []
    if any(result["results"] != results[0]["results"] for result in results):
        faults.append("processes report different results")
    for step, (ours, theirs) in enumerate(zip(results[0]["rows"], expected["rows"], strict=True)):
        for name, a, b in zip(("loss", "generation", "contrastive", "norm", "log scale"), ours, theirs, strict=True):
            if not abs(a - b) <= bound * abs(b):
                faults.append(f"step {step}: {name} {a} instead of {b}")
    for step, (result, contrast) in enumerate(zip(results[0]["results"], expected.get("contrast", ()), strict=False)):
        for name, value in contrast.items():
            if not abs(result[name] - value) <= bound * max(1.0, abs(value)):
                faults.append(f"step {step}: {name} {result[name]} instead of {value}")
    for kind in ("gradients", "parameters"):
        away = distance(gathered(results, kind), expected[kind])
        if not away <= bound:
            faults.append(f"{kind} {away:.1e} away")
    return faults
