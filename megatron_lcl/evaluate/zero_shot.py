"""Zero-shot classification (CLIP, Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.results import Result, proportion
from megatron_lcl.evaluate.retrieval import not_below

_ROWS = 1024
"""of a similarity matrix at a time"""
_TEXTS = 256
"""encoded at a time, where a class has no more"""


@dataclass(frozen=True)
class Classified:
    """What class each of N images was given."""

    rank: np.ndarray
    """int64 [N] of the image's own class, 0 is nearest; a tie with another class counts against it"""
    given: np.ndarray
    """int64 [N] the nearest class, which is another than its own where `rank` is not 0"""


def class_features(
    encoder: Encoder, classes: Sequence[str], templates: Sequence[str], progress: bool = False
) -> torch.Tensor:
    """[C, D] unit norm: the mean over templates of each class's text features, scaled to unit norm again."""
    at_once = max(1, _TEXTS // len(templates))
    means = []
    with tqdm(total=len(classes), unit="classes", desc="class texts", disable=not progress) as bar:
        for start in range(0, len(classes), at_once):
            some = classes[start : start + at_once]
            features = encoder.encode_texts([t.replace("{c}", c) for c in some for t in templates])
            means.append(features.unflatten(0, (len(some), len(templates))).mean(1))
            bar.update(len(some))
    return F.normalize(torch.cat(means), dim=-1)


def classify(encoder: Encoder, data: ImageSet, features: np.ndarray, progress: bool = False) -> Classified:
    """The classes by the nearness of their texts. `features`: pooled, [N, D]."""
    texts = class_features(encoder, data.need_names(), data.templates, progress)
    return by_texts(texts, features, data.need_labels())


def by_texts(texts: torch.Tensor, features: np.ndarray, labels: np.ndarray) -> Classified:
    """The same with the classes' features [C, D], for images with pooled `features` [N, D] and `labels` [N]."""
    ranks, given = zip(*(_classify(x, texts, y) for x, y in _batches(features, labels)), strict=True)
    return Classified(np.concatenate(ranks), np.concatenate(given))


def accuracy(encoder: Encoder, data: ImageSet, classified: Classified) -> Result:
    """Accuracy (top 1, top 5, mean of the classes' recalls) of what `classify` gave."""
    labels, ranks, num = data.need_labels(), classified.rank, len(data.classes)
    metrics = {
        "accuracy": proportion(ranks < 1, 1 / num),
        "accuracy, top 5": proportion(ranks < 5, min(5 / num, 1)),
        "mean per-class recall": proportion(ranks < 1, 1 / num, groups=labels),
    }
    settings = {"classes": num, "templates": len(data.templates), "prompts": list(data.templates)}
    return Result("zero-shot classification", encoder.name, data.name, len(labels), metrics, settings)


def _classify(features: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    scores = F.normalize(features, dim=-1) @ texts.t()
    own = scores.gather(1, labels[:, None])
    ranks = not_below(scores, own).sum(1) - 1
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return ranks.numpy(), torch.where(ranks < 1, labels, others.argmax(1)).numpy()


def _batches(features: np.ndarray, labels: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.from_numpy(np.array(features[i : i + _ROWS])).float(), torch.from_numpy(labels[i : i + _ROWS]))
        for i in range(0, len(labels), _ROWS)
    ]
