"""Retrieval among images and texts: the ranks of what belongs together, their recalls, and what chance gives."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.results import Metric, Result, bootstrap, chance_of_hit

_ROWS = 1024
"""of a similarity matrix at a time"""
_TIED = 1e-6
"""Cosine similarities are the same within this. Of two equal images in other batches they differ by float32's rounding:
by 1e-6 at most, ViT-B/32."""


def retrieval(
    encoder: Encoder,
    data: ImageSet,
    features: np.ndarray,
    seed: int = 0,
    batch: int = 256,
    progress: bool = False,
) -> Result:
    """Recall@1/5/10, image → text (is one of the image's captions among the first k) and text → image.

    Images with the same bytes are one image, to which all their captions belong. Captions that are the same are one
    text, which belongs to all their images.
    """
    captions, images = data.need_captions(), data.numbers.tolist()
    _, firsts = np.unique(images, return_index=True)
    number = {text: j for j, text in enumerate(dict.fromkeys(text for several in captions for text in several))}
    pairs = np.array(sorted({(i, number[t]) for i, several in zip(images, captions, strict=True) for t in several}))
    texts = list(number)
    bar = tqdm(range(0, len(texts), batch), unit_scale=batch, unit="texts", desc="captions", disable=not progress)
    text_features = torch.cat([encoder.encode_texts(texts[i : i + batch]) for i in bar])
    image_ranks, text_ranks = retrieval_ranks(torch.from_numpy(np.array(features[firsts])), text_features, pairs)
    metrics: dict[str, Metric] = {}
    own_texts, own_images = np.bincount(pairs[:, 0]), np.bincount(pairs[:, 1])
    for k in (1, 5, 10):
        image_chance, text_chance = chance_of_hit(own_texts, len(texts), k), chance_of_hit(own_images, len(firsts), k)
        metrics[f"image → text recall@{k}"] = bootstrap(image_ranks < k, seed, image_chance)
        metrics[f"text → image recall@{k}"] = bootstrap(text_ranks < k, seed, text_chance)
    settings = {"texts": len(texts), "image copies": len(captions) - len(firsts), "seed": seed}
    return Result("retrieval", encoder.name, data.name, len(firsts), metrics, settings)


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
        ranks.append((not_below(scores, best) & ~mine).sum(1))
    return torch.cat(ranks).numpy()


def not_below(similarity: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Where a cosine similarity is larger than `own`, equal but for rounding, or NaN. The shapes broadcast."""
    return ~(similarity < own - _TIED)


def rank_own(
    queries_nD: torch.Tensor,
    candidates_ND: torch.Tensor,
    offset: int = 0,
    scale: float = 1.0,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: float | None = None,
    same: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """1-based rank [n] of each query's best right candidate among the wrong ones; and the cross-entropy [n] of finding
    its own candidate, index offset + i.

    same: numbers of queries [n] and candidates [N]; candidates with the query's number are right. None: its own is.
    A tie counts against it (`not_below`), and so does NaN: a model that says nothing must not look good, whatever
    batches were encoded together. The cross-entropy is that of a softmax of
    `scale` times the inner products, nats, or, with a bias, the sum of the sigmoid losses of all candidates
    (`losses.sigmoid`). groups: of queries [n] and candidates [N]; only candidates of the query's group count for the
    rank.
    """
    ranks, losses = [], []
    numbers = torch.arange(len(candidates_ND), device=candidates_ND.device)
    mine, theirs = same or (numbers[offset : offset + len(queries_nD)], numbers)
    for low in range(0, len(queries_nD), _ROWS):
        similarity = queries_nD[low : low + _ROWS] @ candidates_ND.t()
        own = similarity.gather(1, torch.arange(len(similarity), device=similarity.device)[:, None] + low + offset)
        right = mine[low : low + _ROWS, None] == theirs
        wrong = ~right
        if groups is not None:
            inside = groups[0][low : low + _ROWS, None] == groups[1]
            right, wrong = right & inside, wrong & inside
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (not_below(similarity, best) & wrong).sum(1))
        if bias is None:
            losses.append(((scale * similarity).logsumexp(1) - scale * own[:, 0]).double())
        else:
            each = F.softplus((scale * similarity + bias).double())
            losses.append(each.sum(1) - (scale * own[:, 0] + bias).double())
    none = queries_nD.new_zeros(0, dtype=torch.int64)
    return torch.cat([none, *ranks]), torch.cat([none.double(), *losses])
