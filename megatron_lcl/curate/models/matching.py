"""Each image of a document matched to one of its texts, so that documents in reading order become matched ones.

As MMC4 does it (Zhu et al., "Multimodal C4", 2023, section 3): cosine similarities of an encoder's features of all
images and all texts of the document, and the bipartite assignment with the largest sum. No two images have one text,
but where there are more images than texts: those that the assignment leaves over get the text they are most similar to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_lcl.curate.documents import NOTHING, Gone, Range
from megatron_lcl.curate.duplicates.facts import Facts
from megatron_lcl.curate.models.encoder import load
from megatron_lcl.curate.threads import one_thread
from megatron_lcl.data.corpus.document import Image, Text
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.store import Corpus

if TYPE_CHECKING:
    from megatron_lcl.evaluate.encoders.encoder import Encoder

_BATCH = 32


def assign(similarity: np.ndarray) -> np.ndarray:
    """Of each image the text that it is matched to, int64 [images], -1 where there are no texts.

    The pairs with the largest sum of similarities, a text for each image; where there are more images than texts, those
    that are left over get the text that they are most similar to. As scripts/compute_assignments.py of allenai/mmc4.
    similarity: [images, texts], finite.
    """
    from scipy.optimize import linear_sum_assignment

    if not similarity.size:
        return np.full(len(similarity), -1)
    matched = similarity.argmax(1)
    images, texts = linear_sum_assignment(similarity, maximize=True)
    matched[images] = texts
    return matched


@one_thread()
def matching_facts(
    corpus: Corpus, task: Range, encoder: str, tokenizer: str | None = None, gone: Gone = NOTHING
) -> Facts:
    """Of the K images, in their places, of the documents of a range, without the items that are gone:

    document int64 [K], number in the corpus; item int32 [K], index of the piece in the document; matched_text int32
    [K], index among all of the document's texts, -1 where it has none; similarity float32 [K], cosine, NaN where it has
    none.
    An image that does not decode has none.

    encoder: as `evaluate` names it (`open_clip:NAME`, `hf:DIR`, an LCL checkpoint); tokenizer: of an LCL checkpoint.
    UserError where it has no text encoder.
    """
    model, _ = load(encoder, tokenizer)
    model.encode_texts(["a text"])  # which says where it encodes none
    found: dict[str, list[float]] = {"document": [], "item": [], "matched_text": [], "similarity": []}
    first = task.start(corpus)
    for document in range(first, first + task.last - task.first):
        items, left_out = corpus[document].items, gone.get(document, ())
        images = {k: item.data for k, item in enumerate(items) if isinstance(item, Image) and k not in left_out}
        texts = [(k, item.text) for k, item in enumerate(items) if isinstance(item, Text)]
        numbers = [number for number, (k, _) in enumerate(texts) if k not in left_out]
        similarity = similarities(model, list(images.values()), [texts[number][1] for number in numbers])
        usable = np.flatnonzero(~np.isnan(similarity).any(1))
        matched = np.full(len(images), -1)
        matched[usable] = assign(similarity[usable])
        found["document"] += [document] * len(images)
        found["item"] += images
        found["matched_text"] += [numbers[m] if m >= 0 else -1 for m in matched]
        found["similarity"] += [float(s[m]) if m >= 0 else np.nan for s, m in zip(similarity, matched, strict=True)]
    kinds = {"document": np.int64, "item": np.int32, "matched_text": np.int32, "similarity": np.float32}
    return {name: np.array(values, kinds[name]) for name, values in found.items()}


def similarities(encoder: Encoder, images: list[bytes], texts: list[str]) -> np.ndarray:
    """Cosine similarities of encoded images and texts, float32 [images, texts]; NaN where an image does not decode."""
    import torch
    from torch.nn.functional import normalize

    out = np.full((len(images), len(texts)), np.nan, np.float32)
    if not out.size:
        return out
    prepared = {}
    for k, data in enumerate(images):
        try:
            prepared[k] = encoder.prepare(data)
        except BadImage:
            continue
    if prepared:
        words = torch.cat([encoder.encode_texts(texts[at : at + _BATCH]) for at in range(0, len(texts), _BATCH)])
        batches = torch.stack(list(prepared.values())).split(_BATCH)
        pooled = torch.cat([encoder.encode(batch).pooled for batch in batches])
        out[list(prepared)] = (normalize(pooled) @ normalize(words).T).numpy()
    return out
