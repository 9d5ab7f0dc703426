"""The packs of an evaluation: every document of one corpus, once."""

from __future__ import annotations

import numpy as np

from megatron_lcl.data.loading import packing
from megatron_lcl.data.loading.chunks import ENTRY, Pack
from megatron_lcl.data.loading.source import Source


class SequentialIndex:
    """Every document of one corpus that is not skipped, once and in order. Packs past the end are empty."""

    def __init__(self, source: Source, tokens_per_pack: int) -> None:
        self.images_per_pack = source.rules.max_images
        self.source = source
        sizes = source.sizes(np.arange(len(source.tokens)), 0)
        sizes = sizes[np.lexsort((sizes[:, 1], sizes[:, 0]))]
        self._entries = np.zeros(len(sizes), ENTRY)
        self._entries["document"], self._entries["part"] = sizes[:, 0], sizes[:, 1]
        self.num_documents = len(np.unique(sizes[:, 0]))
        rules = source.rules
        places = packing.max_sequences(tokens_per_pack, rules.caption_patches > 0 and not rules.captions_alone)
        self._offsets = packing.next_fit(sizes[:, 2], sizes[:, 3], tokens_per_pack, self.images_per_pack, places)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Pack:
        self.source.use.renew()
        bounds = self._offsets[number : number + 2] if number < len(self) else (0, 0)
        return Pack(number, [self.source], self._entries[bounds[0] : bounds[1]])

    def prepare(self, number: int) -> None:
        """Nothing is built later."""

    def close(self) -> None:
        """No files are open for long."""
