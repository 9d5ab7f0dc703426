"""Linear and attentive probes on a frozen encoder.

Linear: L2-regularised logistic regression on pooled features, by SciPy's L-BFGS, its strength chosen on held-out
training images (CLIP, Radford et al. 2021, appendix A.3). Attentive: an attention pool with one learned query over the
patch tokens, then a linear classifier (the paper's transfer protocol), trained by AdamW.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn
from tqdm import tqdm, trange

from megatron_lcl.evaluate.knn import same_classes
from megatron_lcl.evaluate.results import Result, bootstrap
from megatron_lcl.evaluate.sources import ImageSet

STRENGTHS = tuple(10.0**e for e in range(-4, 5))
"""values of C that are tried: C times the summed loss is weighed against half the squared weights"""
VALIDATION = 0.2
"""share of the training images on which the strength is chosen"""


@dataclass(frozen=True)
class Linear:
    """A linear classifier on standardised features."""

    weight: np.ndarray
    """[C, D]"""
    bias: np.ndarray
    """[C]"""
    mean: np.ndarray
    scale: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Features [N, D] → logits [N, C]."""
        return (np.asarray(features, np.float64) - self.mean) / self.scale @ self.weight.T + self.bias


def fit_linear(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    strength: float,
    max_iterations: int = 1000,
    device: str | torch.device = "cpu",
) -> Linear:
    """Multinomial logistic regression: minimises strength · Σ cross-entropy + ½ |weight|² (as scikit-learn's C).

    Features are standardised first; the bias is not regularised. float64.
    """
    x = np.asarray(features, np.float64)
    mean, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1
    inputs = torch.from_numpy((x - mean) / scale).to(device)
    targets = torch.from_numpy(np.asarray(labels)).to(device)
    shape = (num_classes, x.shape[1] + 1)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).to(device).view(shape).requires_grad_()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        per_image = F.cross_entropy(F.linear(inputs, weight, bias), targets, reduction="mean")
        value = per_image + weight.square().sum() / (2 * strength * len(targets))
        value.backward()
        assert parameters.grad is not None
        return value.item(), parameters.grad.cpu().numpy().ravel()

    found = minimize(
        loss,
        np.zeros(shape).ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "gtol": 1e-7, "ftol": 1e-14},
    )
    steepest = float(np.abs(found.jac).max())
    if not found.success and steepest > 1e-4:  # else it stands at the optimum and merely cannot get nearer
        warnings.warn(
            f"logistic regression (C = {strength:g}) stopped after {found.nit} iterations with a gradient of "
            f"{steepest:.2g}: {found.message}",
            stacklevel=2,
        )
    parameters = found.x.reshape(shape)
    return Linear(parameters[:, :-1], parameters[:, -1], mean, scale)


def linear_probe(
    encoder: str,
    train: ImageSet,
    test: ImageSet,
    train_features: np.ndarray,
    test_features: np.ndarray,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Result:
    """Test accuracy of the logistic regression whose strength does best on held-out training images."""
    labels, num_classes, train_labels = same_classes(train, test), len(test.classes), train.need_labels()
    strength = (
        strengths[0]
        if len(strengths) == 1
        else _choose(train_features, train_labels, num_classes, strengths, seed, device, progress)
    )
    classifier = fit_linear(train_features, train_labels, num_classes, strength, device=device)
    correct = classifier.logits(test_features).argmax(1) == labels
    metrics = {
        "accuracy": bootstrap(correct, seed, 1 / num_classes),
        "mean per-class recall": bootstrap(correct, seed, 1 / num_classes, groups=labels),
    }
    settings = {"C": strength, "train images": len(train), "seed": seed}
    return Result("linear probe", encoder, test.name, len(test), metrics, settings)


def _choose(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    strengths: Sequence[float],
    seed: int,
    device: str | torch.device,
    progress: bool,
) -> float:
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, kept = np.split(order, [max(1, round(VALIDATION * len(order)))])
    x, held = np.asarray(features), []
    for strength in tqdm(strengths, unit="strengths", desc="linear probe", disable=not progress):
        classifier = fit_linear(x[kept], labels[kept], num_classes, strength, device=device)
        held.append((classifier.logits(x[held_out]).argmax(1) == labels[held_out]).mean())
    return strengths[int(np.argmax(held))]  # the strongest regularisation among equals


@dataclass(frozen=True)
class AttentiveSettings:
    """How attentive probes are trained (ours: the paper's code for it was never published)."""

    epochs: int = 20
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    """share of the steps"""
    heads: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)


class AttentiveProbe(nn.Module):
    """Patch tokens [N, P, V] → logits [N, C]: norm, cross-attention of one learned query, norm, linear layer."""

    def __init__(self, width: int, num_classes: int, heads: int) -> None:
        super().__init__()
        heads = next(h for h in range(min(heads, width), 0, -1) if width % h == 0)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classifier = nn.Linear(width, num_classes)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, patches_NPV: torch.Tensor) -> torch.Tensor:
        patches = self.norm_in(patches_NPV)
        pooled, _ = self.attention(self.query.expand(len(patches), -1, -1), patches, patches, need_weights=False)
        return self.classifier(self.norm_out(pooled[:, 0]))


def attentive_probe(
    encoder: str,
    train: ImageSet,
    test: ImageSet,
    train_patches: np.ndarray,
    test_patches: np.ndarray,
    settings: AttentiveSettings | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Result:
    """Mean test accuracy of probes trained from several seeds; the interval is over test images."""
    settings = settings or AttentiveSettings()
    labels, num_classes = same_classes(train, test), len(test.classes)
    by_seed = []
    for seed in settings.seeds:
        probe = fit_attentive(train_patches, train.need_labels(), num_classes, settings, seed, device, progress)
        by_seed.append(_attentive_logits(probe, test_patches, settings.batch_size).argmax(1) == labels)
    accuracies = [float(correct.mean()) for correct in by_seed]
    metrics = {"accuracy": bootstrap(np.mean(by_seed, axis=0), settings.seeds[0], 1 / num_classes)}
    facts = {**asdict(settings), "accuracy by seed": accuracies, "train images": len(train)}
    return Result("attentive probe", encoder, test.name, len(test), metrics, facts)


def fit_attentive(
    patches: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    settings: AttentiveSettings,
    seed: int,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> AttentiveProbe:
    """A trained probe; patches [N, P, V] may be memory-mapped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = AttentiveProbe(patches.shape[-1], num_classes, settings.heads).to(device).train()
    optimizer = torch.optim.AdamW(probe.parameters(), settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(labels) // settings.batch_size)
    warmup = max(1, round(settings.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.5 * (1 + np.cos(np.pi * max(s - warmup, 0) / max(steps - warmup, 1)))),
    )
    generator = np.random.default_rng(seed)
    for _ in trange(settings.epochs, unit="epochs", desc=f"attentive probe, seed {seed}", disable=not progress):
        order = generator.permutation(len(labels))
        for low in range(0, len(order), settings.batch_size):
            chosen = np.sort(order[low : low + settings.batch_size])
            loss = F.cross_entropy(
                probe(torch.from_numpy(patches[chosen]).float().to(device)), torch.from_numpy(labels[chosen]).to(device)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()


@torch.no_grad()
def _attentive_logits(probe: AttentiveProbe, patches: np.ndarray, batch_size: int) -> np.ndarray:
    device = probe.query.device
    parts = [
        probe(torch.from_numpy(np.array(patches[i : i + batch_size])).float().to(device)).cpu()
        for i in range(0, len(patches), batch_size)
    ]
    return torch.cat(parts).numpy()
