"""Linear and attentive probes on a frozen encoder.

Linear: L2-regularized logistic regression on pooled features, by SciPy's L-BFGS, its strength chosen on held-out
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
from threadpoolctl import ThreadpoolController
from torch import nn
from tqdm import tqdm, trange

from megatron_lcl.evaluate.encoders.encoder import drawn_from
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.knn import same_classes
from megatron_lcl.evaluate.patches import Patches
from megatron_lcl.evaluate.results import Result, proportion
from megatron_lcl.evaluate.settings import AttentiveSettings, LinearSettings

_ROWS = 1 << 16
"""images whose logits are in memory together"""
_COLUMNS = 32
"""features whose deviations are computed together"""


@dataclass(frozen=True)
class Linear:
    """A linear classifier on standardized features."""

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
    """Multinomial logistic regression: minimizes strength · Σ cross-entropy + ½ |weight|² (as scikit-learn's C).

    Features are standardized first; the bias is not regularized. float64.
    """
    x, mean, scale = _standardized(features)
    inputs = torch.from_numpy(x).to(device)
    del x  # on a GPU it is in host memory no longer than this
    targets = torch.from_numpy(np.asarray(labels)).to(device)
    shape = (num_classes, len(mean) + 1)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).to(device).view(shape).requires_grad_()
        norm = parameters[:, :-1].square().sum() / (2 * strength * len(targets))
        norm.backward()
        value = norm.item()
        # backward after each block, which lets go of its logits: of ImageNet they are 10 GB, and their gradient again
        for rows, classes in zip(inputs.split(_ROWS), targets.split(_ROWS), strict=True):
            per_image = F.cross_entropy(F.linear(rows, parameters[:, :-1], parameters[:, -1]), classes)
            part = per_image * (len(rows) / len(inputs))
            part.backward()
            value += part.item()
        assert parameters.grad is not None
        return value, parameters.grad.cpu().numpy().ravel()

    # between two losses SciPy adds vectors of a few thousand numbers: threads take longer to meet than to add them
    with ThreadpoolController().select(prefix="libscipy_openblas").limit(limits=1):
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


def _standardized(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, D] as float64, each column less its mean and divided by its deviation; the means; the deviations,
    1 where one is 0. One copy of all features is made, and parts of another."""
    x = np.array(features, np.float64)
    mean = x.mean(0)
    parts = np.array_split(x, max(1, x.shape[1] // _COLUMNS), axis=1)
    scale = np.concatenate([part.std(0) for part in parts])  # for which NumPy copies what it is given
    scale[scale == 0] = 1
    x -= mean
    x /= scale
    return x, mean, scale


def linear_probe(
    encoder: str,
    train: ImageSet,
    test: ImageSet,
    train_features: np.ndarray,
    test_features: np.ndarray,
    settings: LinearSettings,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Result:
    """Test accuracy of the logistic regression whose strength does best on held-out training images."""
    labels, num_classes, train_labels = same_classes(train, test), len(test.classes), train.need_labels()
    strength, *others = settings.strengths
    if others:
        strength = _choose(train_features, train_labels, num_classes, settings, seed, device, progress)
    classifier = fit_linear(train_features, train_labels, num_classes, strength, settings.max_iterations, device)
    correct = classifier.logits(test_features).argmax(1) == labels
    metrics = {
        "accuracy": proportion(correct, 1 / num_classes),
        "mean per-class recall": proportion(correct, 1 / num_classes, groups=labels),
    }
    facts = {"C": strength, **asdict(settings), "train images": len(train), "seed": seed}
    return Result("linear probe", encoder, test.name, len(test), metrics, facts)


def _choose(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    settings: LinearSettings,
    seed: int,
    device: str | torch.device,
    progress: bool,
) -> float:
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, kept = np.split(order, [min(max(1, round(settings.validation * len(order))), len(order) - 1)])
    x, held = np.asarray(features), []
    strengths = sorted(settings.strengths)
    for strength in tqdm(strengths, unit="strengths", desc="linear probe", disable=not progress):
        classifier = fit_linear(x[kept], labels[kept], num_classes, strength, settings.max_iterations, device)
        held.append((classifier.logits(x[held_out]).argmax(1) == labels[held_out]).mean())
    return strengths[int(np.argmax(held))]  # the strongest regularization among equals


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
    train_patches: Patches,
    test_patches: Patches,
    settings: AttentiveSettings,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Result:
    """Mean test accuracy of probes trained from several seeds; the interval is over test images."""
    labels, num_classes = same_classes(train, test), len(test.classes)
    probes = [
        fit_attentive(train_patches, train.need_labels(), num_classes, settings, seed, device, progress)
        for seed in settings.seeds
    ]
    by_seed = [predicted == labels for predicted in _predict(probes, test_patches, len(labels), settings.batch_size)]
    accuracies = [float(correct.mean()) for correct in by_seed]
    metrics = {"accuracy": proportion(np.mean(by_seed, axis=0), 1 / num_classes)}
    facts = {**asdict(settings), "accuracy by seed": accuracies, "train images": len(train)}
    return Result("attentive probe", encoder, test.name, len(test), metrics, facts)


def fit_attentive(
    patches: Patches,
    labels: np.ndarray,
    num_classes: int,
    settings: AttentiveSettings,
    seed: int,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> AttentiveProbe:
    """A trained probe."""
    with drawn_from(seed):
        probe = AttentiveProbe(patches.width, num_classes, settings.heads).to(device).train()
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
        chosen = [np.sort(part) for part in _parts(order, settings.batch_size)]
        for indices, batch in zip(chosen, patches.batches(chosen), strict=True):
            loss = F.cross_entropy(probe(batch.to(device)), torch.from_numpy(labels[indices]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()


def _parts(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[low : low + size] for low in range(0, len(indices), size)]


@torch.no_grad()
def _predict(probes: Sequence[AttentiveProbe], patches: Patches, num_images: int, batch_size: int) -> list[np.ndarray]:
    """Each probe's classes [N] of the images, in one pass over them."""
    predicted: list[list[torch.Tensor]] = [[] for _ in probes]
    for batch in patches.batches(_parts(np.arange(num_images), batch_size)):
        for probe, of_probe in zip(probes, predicted, strict=True):
            of_probe.append(probe(batch.to(probe.query.device)).argmax(1).cpu())
    return [torch.cat(of_probe).numpy() for of_probe in predicted]
