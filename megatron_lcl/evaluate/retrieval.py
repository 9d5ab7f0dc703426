"""Retrieval among images and texts: the ranks of what belongs together, their recalls, and what chance gives."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.results import Metric, Result, chance_of_hit, proportion

_ROWS = 1024
"""of a similarity matrix at a time"""
_TIED = 1e-6
"""Cosine similarities are the same within this. Of two equal images in other batches they differ by float32's rounding:
by 1e-6 at most, ViT-B/32."""


def retrieval(
    encoder: Encoder,
    data: ImageSet,
    features: np.ndarray,
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
    _, first = np.unique(pairs[:, 1], return_index=True)
    image_of_text = pairs[first, 0]  # its captions are found, or not, together
    for k in (1, 5, 10):
        image_chance, text_chance = chance_of_hit(own_texts, len(texts), k), chance_of_hit(own_images, len(firsts), k)
        metrics[f"image → text recall@{k}"] = proportion(image_ranks < k, image_chance)
        metrics[f"text → image recall@{k}"] = proportion(text_ranks < k, text_chance, clusters=image_of_text)
    settings = {"texts": len(texts), "image copies": len(captions) - len(firsts)}
    return Result("retrieval", encoder.name, data.name, len(firsts), metrics, settings)


def retrieval_ranks(images: torch.Tensor, texts: torch.Tensor, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0-based ranks: of each image's best own text among the others' [N], of each text's best own image [M].

    `pairs` [K, 2]: (image, text) that belong together; every image and every text has one. Cosine similarity.
    """
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    return best_ranks(images, texts, pairs).numpy(), best_ranks(texts, images, pairs[:, ::-1]).numpy()


def best_ranks(
    queries: torch.Tensor,
    answers: torch.Tensor,
    pairs: np.ndarray,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
) -> torch.Tensor:
    """0-based rank [N] of each query's best right answer among the wrong ones; unit features [N, D] and [M, D].

    `pairs` [K, 2]: (query, answer) that are right; every query has one. `groups`: numbers of queries [N] and answers
    [M]; only answers of the query's group count, those that are right are of it. A tie with a wrong one counts as a
    miss (`not_below`), and so does NaN: a model that says nothing must not look good, whatever batches were encoded
    together.
    """
    device = queries.device
    right = torch.from_numpy(np.ascontiguousarray(pairs)).to(device)
    of_query, of_answer = (torch.from_numpy(of).to(device) for of in groups) if groups else (None, None)
    ranks = [right.new_zeros(0)]
    for low in range(0, len(queries), _ROWS):
        scores = queries[low : low + _ROWS] @ answers.t()
        here = right[(right[:, 0] >= low) & (right[:, 0] < low + len(scores))]
        mine = torch.zeros_like(scores, dtype=torch.bool)
        mine[here[:, 0] - low, here[:, 1]] = True
        best = scores.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        before = not_below(scores, best) & ~mine
        if of_query is not None:
            before &= of_query[low : low + _ROWS, None] == of_answer
        ranks.append(before.sum(1))
    return torch.cat(ranks)


def not_below(similarity: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Where a cosine similarity is larger than `own`, equal but for rounding, or NaN. The shapes broadcast."""
    return ~(similarity < own - _TIED)


def contrast_losses(
    queries_nD: torch.Tensor,
    candidates_ND: torch.Tensor,
    offset: int = 0,
    scale: float = 1.0,
    bias: float | None = None,
) -> torch.Tensor:
    """The cross-entropy [n] of finding each query's own candidate, index offset + i: that of a softmax of `scale` times
    the inner products, nats, or, with a bias, the sum of the sigmoid losses of all candidates (`losses.sigmoid`)."""
    losses = [torch.zeros(0, dtype=torch.float64, device=queries_nD.device)]
    for low in range(0, len(queries_nD), _ROWS):
        similarity = queries_nD[low : low + _ROWS] @ candidates_ND.t()
        own = similarity.diagonal(low + offset)
        if bias is None:
            losses.append(((scale * similarity).logsumexp(1) - scale * own).double())
        else:
            each = F.softplus((scale * similarity + bias).double())
            losses.append(each.sum(1) - (scale * own + bias).double())
    return torch.cat(losses)
