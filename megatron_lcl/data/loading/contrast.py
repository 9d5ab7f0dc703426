"""Do a run's corpora give it anything to contrast? Found out before it starts, from as few documents as it takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.document import Kind
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.loading.rules import Rules, Sequences
from megatron_lcl.data.loading.sequence import measure
from megatron_lcl.data.loading.source import pieces_of, rules_of_kinds
from megatron_lcl.errors import UserError

_FIRST = 1024
"""documents of a shard that are looked at before all"""


def corpora_without_pairs(
    data: Data, num_patches: int, context_length: int, sequences: Sequences, objective: str
) -> tuple[str, ...]:
    """Paths of the corpora of `data` no image of which can be contrasted: no text precedes it, or selection drops it.

    sequences: those that the run's objective reads, `objective` its name. None of them where nothing is contrasted.
    UserError where none of the corpora gives a pair.
    """
    if not sequences.contrast:
        return ()
    rules = rules_of_kinds(data, num_patches, context_length, 1, sequences)
    leading = data.contrast_leading_images
    paths = tuple(c.path for c in data.corpora if not _gives_pairs(open_corpus(c.path, data.cache), rules, leading))
    if len(paths) == len(data.corpora):
        none = "no image has a text before it" if sequences.interleaved else "no image has a text"
        raise UserError(
            f"objective.name = {objective} compares images with texts, but in {', '.join(paths)} {none} after "
            "selection. If they are image-text pairs as JSON lines, preprocess them with --option kind=pairs; else "
            "lower data.min_similarity, set data.contrast_leading_images, or train with --objective.name generation"
        )
    return paths


def _gives_pairs(corpus: Corpus, rules: Mapping[Kind, Rules], leading: bool) -> bool:
    for k, counts in enumerate(corpus.manifest["shards"]):
        if not counts["placements"]:
            continue
        shard = corpus.open_shard(k)
        for num in (min(_FIRST, shard.num_documents), shard.num_documents):
            tokens, images, placements = np.empty(num, np.int32), np.empty(num, np.int32), np.empty(num, np.int64)
            pairs = measure(*pieces_of(shard), rules[corpus.kinds[k]], tokens, images, placements)  # type: ignore[call-arg]
            if images.any() if leading else pairs:
                return True
    return False
