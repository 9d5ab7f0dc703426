"""The truth: the same steps in one process, in plain torch, with every pair of the global batch in one matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.block import Block
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import MAX_LOG_SCALE, PARTS, PoolInterleave, build_layers
from megatron_lcl.model.lcl import LCL, LayerList
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.selftest.cases import EMA, STEPS, TAIL, WEIGHTS_OF_PHASES, Case, lone_images_and_texts, make_batches
from megatron_lcl.train.optimizer import rules_of
from megatron_lcl.train.optimizers.muon import newton_schulz
from megatron_lcl.train.optimizers.pieces import tensors_of
from megatron_lcl.train.optimizers.tensorwise import Rule
from megatron_lcl.train.parts import called, freeze, frozen_parameters

WEIGHTS = {"lcl": (1.0, 0.1), "coca": (2.0, 1.0), "emu": (1.0, 1.0)}
WEIGHTS |= dict.fromkeys(("clip", "siglip"), (0.0, 1.0)) | dict.fromkeys(("generation", "genlip"), (1.0, 0.0))
"""by objective: of generation, and of contrast or regression, as published"""


@dataclass
class Trajectory:
    """What three steps gave."""

    losses: list[list[float]] = field(default_factory=list)
    """per step: generation; contrastive or regression, whichever the objective has; log scale after it"""
    grad_norms: list[float] = field(default_factory=list)
    norms_of_parts: list[list[float]] = field(default_factory=list)
    """per step but the last: of the gradient before it is clipped, by part of the model; then of the update"""
    attention_logits: list[list[float]] = field(default_factory=list)
    """of the same steps: the largest of the vision encoder, the pool, the language model"""
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """of the first step, clipped, by parameter that is trained"""
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    """after the last step"""
    averages: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """then, by name and parameter that is trained"""
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    """then, of images and texts by themselves, as an evaluation reads them; by the exponential average, if there is
    one"""
    sent: list[dict[tuple[int, ...], float]] = field(default_factory=list)
    """of each process: bytes it sent for the last step, by the ranks of the group (see selftest.count_traffic)"""
    expected: list[dict[tuple[int, ...], float]] = field(default_factory=list)
    """the same by the formulas of train.traffic"""


def reference(case: Case) -> Trajectory:
    """The steps of a case without any parallelism, DeepSpeed or fused loss, on the CPU."""
    config = case.config()
    stages = build_layers(config.model, config.initial_log_scale, seed=config.train.seed)
    initialize(dict(enumerate(stages)), config.model, config.train.seed)
    model = LayerList(*stages)
    freeze(dict(model.named_parameters()), frozen_parameters(config))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings, optimizer = config.optimizer, _Optimizer(model, config)
    weights: list[dict[str, torch.Tensor]] = []
    weight, published = WEIGHTS[case.objective]
    log_scale = dict(model.named_parameters())[f"{len(stages) - 1}.log_scale"]
    out = Trajectory()
    for step in range(STEPS):
        model.zero_grad()
        other_weight = WEIGHTS_OF_PHASES[step] if case.phases else published
        batches = make_batches(config, step)
        if step < STEPS - 1:
            out.attention_logits.append(_attention_logits(model, batches))
        generation, other = _losses(model, batches, case.objective)
        (weight * generation + other_weight * other).backward()
        # DeepSpeed's gradients are zero where torch has none
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        for name, p in trained.items():
            p.grad = gradients[name]
        by_part = _norms_by_part(gradients, config)
        before = {name: p.detach().clone() for name, p in trained.items()}
        norm = nn.utils.clip_grad_norm_(trained.values(), settings.clip_norm)
        out.grad_norms.append(float(norm))
        if step == 0:
            out.gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        optimizer.step(case.lr(step))
        if step < STEPS - 1:
            updates = {name: p.detach() - before[name] for name, p in trained.items()}
            out.norms_of_parts.append(by_part + _norms_by_part(updates, config))
        with torch.no_grad():
            log_scale.clamp_(0, MAX_LOG_SCALE)
        weights.append({name: p.detach().clone() for name, p in trained.items()})
        out.losses.append([generation.item(), other.item(), log_scale.item()])
    if case.averages:
        out.averages = _averages(weights)
    out.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, texts = lone_images_and_texts(config)
    whole = LCL(config.model, seed=None).eval()
    whole.layers.load_state_dict(model.state_dict() | out.averages.get(f"ema_{EMA:g}", {}))
    special = SpecialTokens.of(config.model.language.vocab_size)
    with torch.no_grad():
        latents, _ = whole.pool.pool(whole.vision_tokens(images))
        contexts = [whole.encode_text(torch.tensor([[special.sot, *text, special.eot]])) for text in texts]
    out.features = {"images": latents, "texts": torch.cat(contexts)}
    return out


def _averages(weights: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Of the weights after each step: sum_i d^(n - i) w_i / sum_i d^(n - i), and the mean of the last ones."""
    numbers = range(1, len(weights) + 1)
    shares = {
        f"ema_{EMA:g}": [EMA ** (len(weights) - number) for number in numbers],
        f"tail_{TAIL:g}": [float(number > STEPS * (1 - TAIL)) for number in numbers],
    }

    def mean(of_steps: Sequence[float], name: str) -> torch.Tensor:
        whole = torch.stack([share * each[name].double() for share, each in zip(of_steps, weights, strict=True)])
        return (whole.sum(0) / sum(of_steps)).float()

    return {average: {name: mean(each, name) for name in weights[0]} for average, each in shares.items()}


def _norms_by_part(tensors: Mapping[str, torch.Tensor], config: Config) -> list[float]:
    """In float64, in the order of `PARTS`."""
    squares = dict.fromkeys(PARTS, 0.0)
    for name, tensor in tensors.items():
        squares[called(name, config.model).partition(".")[0]] += float(tensor.double().square().sum())
    return [math.sqrt(square) for square in squares.values()]


@torch.no_grad()
def _attention_logits(model: LayerList, batches: Sequence[PackedBatch]) -> list[float]:
    """q·k/√K of the queries that docs/metrics.md names, one after another, in float64."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.attention.register_forward_hook(lambda _, __, qkv: kept.append((qkv[0].double(), qkv[1].double())))
        for layer in model
        if isinstance(layer, Block)
    ]
    vision = language = pool = -math.inf
    for batch in batches:
        kept.clear()
        x: Any = Activations.of(batch)
        for layer in model:
            if isinstance(layer, PoolInterleave):
                q = layer.q(layer.norm_q(layer.query)).unflatten(-1, (layer.heads, -1))[0].double()
                keys = layer.k(layer.norm_k(layer.norm(x.hidden))).unflatten(-1, (layer.heads, -1)).double()
                blocks_of_vision, first = len(kept), layer.prefix
            x = layer(x)
        length = len(keys) // len(batch.image_start)
        for slot in torch.nonzero((batch.image_start >= 0) | (batch.image_soi >= 0))[:, 0].tolist():
            own = slice(slot * length, (slot + 1) * length)
            pool = max(pool, _largest(q, keys[own][first:]))
            for queries, k in kept[:blocks_of_vision]:
                vision = max(vision, *(_largest(queries[own][row], k[own]) for row in _spread(length, 16)))
        starts, tokens = batch.cu_seqlens.tolist(), len(batch.tokens) // len(batch.packs)
        for row in (pack * tokens + row for pack in range(len(batch.packs)) for row in _spread(tokens, 64)):
            start = max(start for start in starts if start <= row)
            for queries, k in kept[blocks_of_vision:] if batch.positions[row] else ():
                language = max(language, _largest(queries[row], k[start : row + 1]))
    for hook in hooks:
        hook.remove()
    return [vision, pool, language]


def _largest(q_HK: torch.Tensor, k_LHK: torch.Tensor) -> float:
    return float((q_HK * k_LHK).sum(-1).max()) / math.sqrt(q_HK.shape[-1])


def _spread(number: int, most: int) -> list[int]:
    return sorted({math.floor(i * (number - 1) / (most - 1)) for i in range(most)} if number > most else range(number))


class _Optimizer:
    """Torch's AdamW, each parameter a group of its own; Muon's matrices, and how StableAdamW clips, by their
    formulas."""

    def __init__(self, model: LayerList, config: Config) -> None:
        named, settings = {n: p for n, p in model.named_parameters() if p.requires_grad}, config.optimizer
        rules = {name: Rule(tensor) for name, tensor in tensors_of(named).items()}
        rules |= rules_of({name: rule.tensor for name, rule in rules.items()}, config) or {}
        self.settings = settings
        self.matrices = {named[name]: rule for name, rule in rules.items() if rule.algorithm == "muon"}
        self.momentum = {parameter: torch.zeros_like(parameter) for parameter in self.matrices}
        decay = {name: settings.weight_decay * (p.dim() >= 2) for name, p in named.items()}
        groups = [
            {"params": [named[name]], "weight_decay": decay[name] * rule.weight_decay, "rate": rule.lr}
            for name, rule in rules.items()
            if rule.algorithm != "muon"
        ]
        self.adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        self.squares: dict[torch.Tensor, list[torch.Tensor]] = defaultdict(list)
        """of each parameter's gradients, where updates are clipped"""

    def clipping(self, parameter: torch.Tensor) -> float:
        """What a learning rate is divided by (StableAdamW, arXiv 2304.13013, algorithm 2): max(1, RMS of g / sqrt(u))
        of a whole tensor, u the mean of all g² with weights beta2^(t - i)."""
        if self.settings.name != "stable_adamw":
            return 1.0
        assert parameter.grad is not None
        squares, beta = self.squares[parameter], self.settings.betas[1]
        squares.append(parameter.grad.square())
        shares = [beta**age for age in reversed(range(len(squares)))]
        u = torch.stack([share * square for share, square in zip(shares, squares, strict=True)]).sum(0) / sum(shares)
        return max(1.0, math.sqrt(float((squares[-1] / u.clamp(min=self.settings.eps**2)).mean())))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["rate"] / self.clipping(group["params"][0])
        self.adamw.step()
        muon = self.settings.muon
        for matrix, rule in self.matrices.items():
            assert matrix.grad is not None
            momentum, rate = self.momentum[matrix], lr * rule.lr
            momentum.mul_(muon.momentum).add_(matrix.grad * (1 - muon.momentum))
            blended = matrix.grad * (1 - muon.momentum) + momentum * muon.momentum
            matrix.mul_(1 - rate * self.settings.weight_decay * rule.weight_decay)
            for own, update in zip(matrix.chunk(rule.heads), blended.chunk(rule.heads), strict=True):
                own.sub_(rate * 0.2 * math.sqrt(max(own.shape)) * newton_schulz(update, muon.newton_schulz_steps))


def _losses(model: LayerList, batches: list[PackedBatch], objective: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Generation, and regression or contrast; 0 where nothing is contrasted."""
    outputs = [model(batch) for batch in batches]
    generation = torch.stack([out.generation for out in outputs]).sum() / sum(b.num_targets for b in batches)
    chosen = [(b.image_soi >= 0).nonzero()[:, 0] for b in batches]
    latents = torch.cat([out.latents[c] for out, c in zip(outputs, chosen, strict=True)])
    contexts = torch.cat([out.contexts[c] for out, c in zip(outputs, chosen, strict=True)])
    if objective == "emu":
        return generation, F.mse_loss(contexts, latents)
    if not len(latents):
        return generation, torch.zeros(())
    logits = outputs[0].log_scale.exp() * F.normalize(latents, dim=1) @ F.normalize(contexts, dim=1).t()
    if (bias := outputs[0].logit_bias) is not None:  # SigLIP (arXiv 2303.15343), algorithm 1
        signs = 2 * torch.eye(len(logits)) - 1
        return generation, -F.logsigmoid(signs * (logits + bias)).sum() / len(logits)
    pairs = torch.arange(len(latents))
    return generation, (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2
