"""Zero-shot classification (CLIP, Radford et al. 2021, section 3.1) and image-text retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from megatron_lcl.evaluate.encoders import Encoder
from megatron_lcl.evaluate.results import Metric, Result, bootstrap
from megatron_lcl.evaluate.sources import ImageSet

_ROWS = 1024
"""of a similarity matrix at a time"""


def class_features(encoder: Encoder, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """[C, D] unit norm: the mean over templates of each class's text features, scaled to unit norm again."""
    means = [encoder.encode_texts([t.replace("{c}", c) for t in templates]).mean(0) for c in classes]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot(encoder: Encoder, data: ImageSet, features: np.ndarray, seed: int = 0) -> Result:
    """Accuracy (top 1, top 5, mean of the classes' recalls) of the nearest class text. `features`: pooled, [N, D]."""
    labels = data.need_labels()
    texts = class_features(encoder, data.classes, data.templates)
    ranks = np.concatenate([_rank_of_label(x, texts, y) for x, y in _batches(features, labels)])
    num = len(data.classes)
    metrics = {
        "accuracy": bootstrap(ranks < 1, seed, 1 / num),
        "accuracy, top 5": bootstrap(ranks < 5, seed, min(5 / num, 1)),
        "mean per-class recall": bootstrap(ranks < 1, seed, 1 / num, groups=labels),
    }
    settings = {"classes": num, "templates": len(data.templates), "seed": seed}
    return Result("zero-shot classification", encoder.name, data.name, len(labels), metrics, settings)


def retrieval(encoder: Encoder, data: ImageSet, features: np.ndarray, seed: int = 0, batch: int = 256) -> Result:
    """Recall@1/5/10, image → text (is one of the image's captions among the first k) and text → image."""
    captions = data.need_captions()
    texts = [caption for several in captions for caption in several]
    owner = np.repeat(np.arange(len(captions)), [len(several) for several in captions])
    text_features = torch.cat([encoder.encode_texts(texts[i : i + batch]) for i in range(0, len(texts), batch)])
    image_ranks, text_ranks = retrieval_ranks(torch.from_numpy(np.array(features)), text_features, owner)
    metrics: dict[str, Metric] = {}
    per_image = len(texts) / len(captions)
    for k in (1, 5, 10):
        chance = min(k / len(captions), 1)
        metrics[f"image → text recall@{k}"] = bootstrap(image_ranks < k, seed, min(chance * min(per_image, k), 1))
        metrics[f"text → image recall@{k}"] = bootstrap(text_ranks < k, seed, chance)
    settings = {"texts": len(texts), "seed": seed}
    return Result("retrieval", encoder.name, data.name, len(captions), metrics, settings)


def retrieval_ranks(images: torch.Tensor, texts: torch.Tensor, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0-based ranks: of each image's best caption among all texts [N], of each text's image among all images [M].

    `owner` [M]: the image of each text. Cosine similarity; a tie counts against the true one, and so does NaN.
    """
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    own = torch.from_numpy(owner)
    image_ranks, text_ranks = [], []
    for low in range(0, len(images), _ROWS):
        scores = images[low : low + _ROWS] @ texts.t()
        mine = own == torch.arange(low, low + len(scores))[:, None]
        best = scores.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        image_ranks.append((~(scores < best) & ~mine).sum(1))
    for low in range(0, len(texts), _ROWS):
        scores = texts[low : low + _ROWS] @ images.t()
        true = own[low : low + _ROWS, None]
        text_ranks.append((~(scores < scores.gather(1, true))).sum(1) - 1)
    return torch.cat(image_ranks).numpy(), torch.cat(text_ranks).numpy()


def _rank_of_label(features: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    scores = F.normalize(features, dim=-1) @ texts.t()
    return ((~(scores < scores.gather(1, labels[:, None]))).sum(1) - 1).numpy()


def _batches(features: np.ndarray, labels: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.from_numpy(np.array(features[i : i + _ROWS])).float(), torch.from_numpy(labels[i : i + _ROWS]))
        for i in range(0, len(labels), _ROWS)
    ]
