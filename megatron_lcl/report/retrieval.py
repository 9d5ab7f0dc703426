"""Examples of a held-out evaluation with their images, which are taken from the corpus that was evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_lcl.data.corpus.indexed import IMAGE, TEXT
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.loading.images import thumbnail
from megatron_lcl.errors import UserError

MAX_THUMBNAIL = 320
"""pixels of an example image's longer side"""


def with_images(
    examples: list[dict[str, Any]] | None, evaluation: Mapping[str, Any] | None, cache: str | None
) -> tuple[list[dict[str, Any]], bool]:
    """The examples, each with `src`, its image as a data: URL; None where the corpus that was evaluated is no longer
    where it was. And whether another one is there now."""
    examples, is_other = examples or [], False
    images: list[str | None] = [None] * len(examples)
    try:
        if evaluation and examples:
            corpus = open_corpus(evaluation["corpus"], cache)
            pairs = [example["pair"] for example in examples]
            recorded = evaluation.get("fingerprint")
            is_other = recorded != corpus.fingerprint if recorded else not all(_holds(corpus, pair) for pair in pairs)
            if not is_other:
                images = [thumbnail(corpus.shard(p["shard"]).image(p["image"]), MAX_THUMBNAIL) for p in pairs]
    except (UserError, OSError):
        pass
    return [{**example, "src": src} for example, src in zip(examples, images, strict=True)], is_other


def _holds(corpus: Corpus, pair: Mapping[str, Any]) -> bool:
    """Whether a corpus has a pair's image in its document, and what was read before it: all that can be checked where
    the corpus's fingerprint was not recorded.

    Its context is of text between images, cut at the beginning, perhaps inside of a character; decoders put spaces
    where texts begin.
    """
    if not 0 <= pair["document"] < len(corpus):
        return False
    number, local = corpus.locate(pair["document"])
    shard = corpus.shard(number)
    pieces = range(*shard.bounds(local))
    is_there = any(shard.modes[k] == IMAGE and shard.piece(k) == pair["image"] for k in pieces)
    ids = [shard.piece(k) for k in pieces if shard.modes[k] == TEXT]
    text = "".join(corpus.tokenizer.decode(np.concatenate(ids)).split()) if ids else ""
    parts = ["".join(line.split()) for line in pair["context"].lstrip("\ufffd").splitlines()]
    return number == pair["shard"] and is_there and any(parts) and all(part in text for part in parts)
