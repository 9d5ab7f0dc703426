"""The kind of each shard's documents: as the manifest says, or, in corpora of earlier releases, as can be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from megatron_lcl.data.corpus.document import Kind
from megatron_lcl.data.corpus.shard import Shard

_PAIRS = "webdataset"
"""the one format that gave pairs when manifests did not say the kinds"""


def of_shards(manifest: Mapping[str, Any], shard: Callable[[int], Shard]) -> tuple[Kind, ...]:
    """The kind of each shard. shard: opens the one with this number, where the manifest does not say.

    Where the manifest does not say: pairs come from WebDataset; all else is matched if any of it has similarities. Of
    corpora of several formats that were merged each shard is judged alone, by its documents.
    """
    shards, formats = manifest["shards"], set(_formats(manifest["source"]))
    if all("kind" in entry for entry in shards):
        return tuple(entry["kind"] for entry in shards)
    numbers = range(len(shards))
    if len(formats) > 1:
        return tuple(_by_documents(shard(k), _PAIRS in formats) for k in numbers)
    kind: Kind = "pairs"
    if formats != {_PAIRS}:
        kind = "matched" if any(_has_similarities(shard(k)) for k in numbers) else "natural"
    return (kind,) * len(shards)


def were_lost(manifest: Mapping[str, Any]) -> bool:
    """Whether a merged corpus does not say the kinds of its shards, and they may be other than was assumed then."""
    if "merged" not in manifest["source"] or all("kind" in shard for shard in manifest["shards"]):
        return False
    formats = set(_formats(manifest["source"]))
    return len(formats) > 1 or _PAIRS in formats


def _formats(source: Mapping[str, Any]) -> Iterator[str]:
    if "merged" not in source:
        yield str(source.get("format"))
    for part in source.get("merged", ()):
        yield from _formats(part)


def _by_documents(shard: Shard, may_be_pairs: bool) -> Kind:
    """Matched if there are similarities; pairs if no document has two images or two texts, and some have one of both
    (a pair whose caption or image was unusable has one)."""
    if _has_similarities(shard):
        return "matched"
    num_pieces = np.diff(shard.document_offsets)
    num_images = np.add.reduceat(shard.modes, shard.document_offsets[:-1], dtype=np.int64)
    num_texts = num_pieces - num_images
    pairs = may_be_pairs and max(num_images.max(), num_texts.max()) == 1 and (num_pieces == 2).any()
    return "pairs" if pairs else "natural"


def _has_similarities(shard: Shard) -> bool:
    return not np.isnan(shard.similarity).all()  # of none: False
