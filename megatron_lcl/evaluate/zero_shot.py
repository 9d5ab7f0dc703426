"""Zero-shot classification (CLIP, Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.results import Result, bootstrap
from megatron_lcl.evaluate.sources import ImageSet

_ROWS = 1024
"""of a similarity matrix at a time"""


def class_features(
    encoder: Encoder, classes: Sequence[str], templates: Sequence[str], progress: bool = False
) -> torch.Tensor:
    """[C, D] unit norm: the mean over templates of each class's text features, scaled to unit norm again."""
    bar = tqdm(classes, unit="classes", desc="class texts", disable=not progress)
    means = [encoder.encode_texts([t.replace("{c}", c) for t in templates]).mean(0) for c in bar]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot(encoder: Encoder, data: ImageSet, features: np.ndarray, seed: int = 0, progress: bool = False) -> Result:
    """Accuracy (top 1, top 5, mean of the classes' recalls) of the nearest class text. `features`: pooled, [N, D]."""
    labels = data.need_labels()
    texts = class_features(encoder, data.classes, data.templates, progress)
    ranks = np.concatenate([_rank_of_label(x, texts, y) for x, y in _batches(features, labels)])
    num = len(data.classes)
    metrics = {
        "accuracy": bootstrap(ranks < 1, seed, 1 / num),
        "accuracy, top 5": bootstrap(ranks < 5, seed, min(5 / num, 1)),
        "mean per-class recall": bootstrap(ranks < 1, seed, 1 / num, groups=labels),
    }
    settings = {"classes": num, "templates": len(data.templates), "prompts": list(data.templates), "seed": seed}
    return Result("zero-shot classification", encoder.name, data.name, len(labels), metrics, settings)


def _rank_of_label(features: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    scores = F.normalize(features, dim=-1) @ texts.t()
    return ((~(scores < scores.gather(1, labels[:, None]))).sum(1) - 1).numpy()


def _batches(features: np.ndarray, labels: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.from_numpy(np.array(features[i : i + _ROWS])).float(), torch.from_numpy(labels[i : i + _ROWS]))
        for i in range(0, len(labels), _ROWS)
    ]
