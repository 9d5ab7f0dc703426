"""Whether a shard's arrays go together: then whoever reads by them stays inside of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_lcl.data.corpus.indexed import IMAGE, TEXT, Indexed
from megatron_lcl.data.corpus.shard import Shard

_BLOCK = 1 << 16
"""sequences that are looked at together: what is computed of so many stays in a core's cache"""


def structure_faults(shard: Shard) -> Iterator[str]:
    """What is wrong with the lengths, pointers, documents and modes of a shard, a line each.

    Reads its indices, a few ms for a million pieces, and no tokens or images.
    """
    for kind, container in (("tokens", shard.tokens), ("images", shard.images)):
        num, documents, modes = len(container.lengths), container.documents, container.modes.view(np.uint8)
        if num and container.lengths.min() < 1:
            yield f"{kind}: sequence {int(np.argmax(container.lengths < 1))} is empty"
        if not _has_pointers_of_lengths(container):
            yield f"{kind}: pointers do not follow from the lengths"
        if not len(documents) or documents[0] != 0 or documents[-1] != num or (np.diff(documents) < 1).any():
            yield f"{kind}: document offsets are not ascending from 0 to {num}"
        if num and not (TEXT if kind == "tokens" else IMAGE) <= modes.min() <= modes.max() <= IMAGE:
            yield f"{kind}: a mode that does not exist"
    num_placements = int(np.count_nonzero(shard.modes == IMAGE))
    if not num_placements == len(shard.similarity) == len(shard.matched_text):
        yield f"arrow: {len(shard.similarity)} placements, {num_placements} image pieces"
    if not shard.num_images == len(shard.image_width) == len(shard.image_height) == len(shard.image_xxh3):
        yield f"arrow: {len(shard.image_width)} images, {shard.num_images} stored"


def _has_pointers_of_lengths(container: Indexed) -> bool:
    """Whether each sequence begins where the one before ends; that the last one ends with the data, `read_indexed`
    checks."""
    lengths, pointers = container.lengths, container.pointers
    if len(pointers) and pointers[0] != 0:
        return False
    for start in range(0, len(lengths), _BLOCK):
        stop = min(start + _BLOCK, len(lengths) - 1)
        begins = pointers[start : stop + 1].copy()  # aligned, which the file's are not: faster
        ends = lengths[start:stop].astype(np.int64)
        ends *= container.dtype.itemsize
        ends += begins[:-1]
        if not np.array_equal(ends, begins[1:]):
            return False
    return True
