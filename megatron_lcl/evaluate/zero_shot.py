"""Zero-shot classification (CLIP, Radford et al. 2021, section 3.1) and image-text retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_lcl.evaluate.encoders import Encoder
from megatron_lcl.evaluate.results import Metric, Result, bootstrap
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
    settings = {"classes": num, "templates": len(data.templates), "seed": seed}
    return Result("zero-shot classification", encoder.name, data.name, len(labels), metrics, settings)


def retrieval(
    encoder: Encoder,
    data: ImageSet,
    features: np.ndarray,
    seed: int = 0,
    batch: int = 256,
    progress: bool = False,
) -> Result:
    """Recall@1/5/10, image → text (is one of the image's captions among the first k) and text → image.

    Captions that are the same are one text, which belongs to all their images.
    """
    captions = data.need_captions()
    number = {text: j for j, text in enumerate(dict.fromkeys(text for several in captions for text in several))}
    pairs = np.array([(i, j) for i, several in enumerate(captions) for j in sorted({number[t] for t in several})])
    texts = list(number)
    bar = tqdm(range(0, len(texts), batch), unit_scale=batch, unit="texts", desc="captions", disable=not progress)
    text_features = torch.cat([encoder.encode_texts(texts[i : i + batch]) for i in bar])
    image_ranks, text_ranks = retrieval_ranks(torch.from_numpy(np.array(features)), text_features, pairs)
    metrics: dict[str, Metric] = {}
    own_texts, own_images = np.bincount(pairs[:, 0]), np.bincount(pairs[:, 1])
    for k in (1, 5, 10):
        image_chance, text_chance = chance_of_hit(own_texts, len(texts), k), chance_of_hit(own_images, len(captions), k)
        metrics[f"image → text recall@{k}"] = bootstrap(image_ranks < k, seed, image_chance)
        metrics[f"text → image recall@{k}"] = bootstrap(text_ranks < k, seed, text_chance)
    settings = {"texts": len(texts), "seed": seed}
    return Result("retrieval", encoder.name, data.name, len(captions), metrics, settings)


def chance_of_hit(right: np.ndarray, total: int, k: int) -> float:
    """Share of queries that a random order of `total` answers gives one of the right ones among the first k.

    right [Q]: how many are right. 1 − C(total − right, k) / C(total, k), the mean over queries.
    """
    numbers, counts = np.unique(right, return_counts=True)
    missed = [math.comb(total - int(n), min(k, total)) / math.comb(total, min(k, total)) for n in numbers]
    return 1 - float(np.average(missed, weights=counts))


def retrieval_ranks(images: torch.Tensor, texts: torch.Tensor, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0-based ranks: of each image's best own text among the others' [N], of each text's best own image [M].

    `pairs` [K, 2]: (image, text) that belong together; every image and every text has one. Cosine similarity; a tie
    with another's counts as a miss, and so does NaN.
    """
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    own = torch.from_numpy(pairs)
    return _ranks(images, texts, own), _ranks(texts, images, own.flip(1))


def _ranks(queries: torch.Tensor, answers: torch.Tensor, pairs: torch.Tensor) -> np.ndarray:
    ranks = []
    for low in range(0, len(queries), _ROWS):
        scores = queries[low : low + _ROWS] @ answers.t()
        here = pairs[(pairs[:, 0] >= low) & (pairs[:, 0] < low + len(scores))]
        mine = torch.zeros_like(scores, dtype=torch.bool)
        mine[here[:, 0] - low, here[:, 1]] = True
        best = scores.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        ranks.append((~(scores < best) & ~mine).sum(1))
    return torch.cat(ranks).numpy()


def _rank_of_label(features: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    scores = F.normalize(features, dim=-1) @ texts.t()
    return ((~(scores < scores.gather(1, labels[:, None]))).sum(1) - 1).numpy()


def _batches(features: np.ndarray, labels: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.from_numpy(np.array(features[i : i + _ROWS])).float(), torch.from_numpy(labels[i : i + _ROWS]))
        for i in range(0, len(labels), _ROWS)
    ]
