"""Features of images by an encoder, what a linear head makes of them, and images that have nearly the same.

Near-duplicates by features: Abbas et al., "SemDeDup", 2023; here exactly, every image with every other, in blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_lcl.compiled import compiled
from megatron_lcl.curate.documents import NOTHING, Gone, Range
from megatron_lcl.curate.duplicates.clusters import MEMORY, find, unite
from megatron_lcl.curate.duplicates.facts import Facts, shown_images
from megatron_lcl.curate.duplicates.join import Places, Removals, gather, removals_of, rows_shown, same_content
from megatron_lcl.curate.models.encoder import load
from megatron_lcl.curate.models.settings import FeatureDuplicates, HeadScore
from megatron_lcl.curate.threads import one_thread
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.errors import UserError

_BATCH = 32
_BLOCK = 2048
_ROUNDING = 1e-4
"""by which a product of float32 may differ from the cosine, and more: it differs by 1e-6 or so"""


@one_thread()
def feature_facts(
    corpus: Corpus, task: Range, encoder: str, tokenizer: str | None = None, gone: Gone = NOTHING
) -> Facts:
    """Of the K places of images in the documents of a range, which show M images, without the items that are gone:

    document int64 [K], number in the corpus; item int32 [K], index of the piece in the document; image int32 [K], which
    of the M; digest uint32 [M, 4], XXH3-128 of its bytes; feature float32 [M, D], the pooled feature with unit norm, 0
    for an image that does not decode. encoder: as `evaluate` names it; UserError where it does not load.
    """
    import torch

    model, width = load(encoder, tokenizer)
    part = corpus.shard(task.shard)
    images, facts = shown_images(corpus, task, gone)
    features = np.zeros((len(images), width), np.float32)
    for start in range(0, len(images), _BATCH):
        prepared = {}
        for k in range(start, min(len(images), start + _BATCH)):
            with contextlib.suppress(BadImage):
                prepared[k] = model.prepare(bytes(part.image(int(images[k]))))
        if prepared:
            pooled = model.encode(torch.stack(list(prepared.values()))).pooled
            features[list(prepared)] = torch.nn.functional.normalize(pooled).numpy()
    return {**facts, "feature": features}


def join_scores(files: Sequence[Path], settings: HeadScore) -> Removals:
    """Places of images that the head scores too low or too high, from files of `feature_facts` in the corpus's order.

    value: the score, weight · feature + bias. An image that does not decode has none, and stays. UserError where the
    head is not one, or of another width than the features.
    """
    weight, bias = read_head(settings.head)
    low = -np.inf if settings.min_score is None else settings.min_score
    high = np.inf if settings.max_score is None else settings.max_score
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for file in files:
        with np.load(file) as facts:
            feature, image = facts["feature"], facts["image"]
            check_width(settings.head, weight, feature.shape[1])
            # not by BLAS, whose number of threads changes the last bits of such a product
            score = (np.einsum("md,d->m", feature, weight) + bias)[image]
            out = feature.any(1)[image] & ((score < low) | (score > high))
            found.append((facts["document"][out], facts["item"][out], score[out].astype(np.float32)))
    document, item, value = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return Removals(document, item, value, [str(settings.head)] * len(value))


def join_features(
    files: Sequence[Path],
    settings: FeatureDuplicates,
    scratch: Path,
    against: Sequence[Path] = (),
    memory: int = MEMORY,
) -> Iterator[Removals]:
    """Places, part after part, of images whose features are those of an image before, or in the corpora `against`.

    files, against: of `feature_facts` of one encoder, in their corpora's order. scratch: an empty folder; 4 · D + 41
    bytes an image and 24 a place, and 16 more an image where sorting takes more than `memory`. value: the cosine
    similarity to the image that is named, 1 for the same bytes. All pairs are compared: N² · D multiplications.
    """
    everything = [*against, *files]
    rows, first_image = gather(everything, ("digest", "feature"), scratch)
    placed, starts = gather(everything, ("document", "item", "image"), scratch)
    digest, feature = rows["digest"], rows["feature"]
    parent, _ = same_content(digest, scratch, memory)
    for start in range(0, len(feature), _BLOCK):
        block = feature[start : start + _BLOCK]
        for other in range(0, start + 1, _BLOCK):
            near = np.nonzero(block @ feature[other : other + _BLOCK].T >= settings.min_cosine - _ROUNDING)
            _unite_pairs(parent, feature, start + near[0], other + near[1], settings.min_cosine)

    def value(one: int, other: int) -> float:
        same = (digest[one] == digest[other]).all()
        return 1.0 if same else _cosine(feature[one], feature[other])

    shown = rows_shown(placed["image"], first_image, starts, scratch)
    spots = Places(everything, len(against), starts, placed["document"], placed["item"], shown)
    yield from removals_of(spots, parent, settings.action, value, scratch)


def check_width(head: str | None, weight: np.ndarray, width: int) -> None:
    """UserError where a head's weight [D] is not for features of this width."""
    if len(weight) != width:
        raise UserError(
            f"the head {head} has {len(weight)} weights, the encoder {width} features; give the head of this encoder"
        )


def read_head(head: str | None) -> tuple[np.ndarray, float]:
    """Weight float32 [D] and bias of a linear head in a .npz or .safetensors file. UserError where it is none."""
    assert head is not None  # a rule without one is off
    file = Path(head)
    try:
        if file.suffix == ".safetensors":
            from safetensors.numpy import load_file

            arrays = load_file(file)
        else:
            with np.load(file) as opened:
                arrays = dict(opened)
        weight = np.asarray(arrays["weight"], np.float32).reshape(-1)
        bias = float(np.asarray(arrays.get("bias", 0.0)).reshape(()))
    except FileNotFoundError:
        raise UserError(f"there is no {file}; give the file of a linear head") from None
    except Exception as error:  # noqa: BLE001 - whatever these libraries raise for damaged files
        raise UserError(
            f"{file} is no linear head ({type(error).__name__}: {error}); give a .npz or .safetensors file with a "
            "`weight` for each feature and, if there is one, a `bias`"
        ) from None
    return weight, bias


@compiled
def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of two features, added in their order: BLAS adds in one that follows from its threads and the blocks' sizes."""
    total = 0.0
    for k in range(len(one)):
        total += np.float64(one[k]) * np.float64(other[k])
    return total


@compiled
def _unite_pairs(
    parent: np.ndarray, feature: np.ndarray, rows: np.ndarray, others: np.ndarray, min_cosine: float
) -> None:
    for row, other in zip(rows, others):  # noqa: B905 - numba knows no `strict`
        if find(parent, row) != find(parent, other) and _cosine(feature[row], feature[other]) >= min_cosine:
            unite(parent, row, other)
