"""Some latents and contexts of a step's global batch, for a look at their health.

At most 256 pairs, drawn without replacement from all pairs of the global batch: each subset is as likely, whatever the
number of replicas. The first pairs of a replica would be no such sample: packing puts the largest sequence of a pack
first.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.hashes import shuffled
from megatron_lcl.data.loading.source import key
from megatron_lcl.model.activations import Outputs
from megatron_lcl.model.transfer import from_host
from megatron_lcl.objectives.base import GlobalCounts
from megatron_lcl.parallel.mesh import Axis

NUM_PAIRS = 256


class FeatureSample:
    """Taken where the head is, micro-batch by micro-batch."""

    def __init__(self, counts: GlobalCounts, data: Axis) -> None:
        """counts: from which every process draws the same: pairs are counted in the order of replicas, those of a
        replica in the order of its micro-batches. They differ from step to step, and so does the draw."""
        starts = np.cumsum([0, *counts.pairs])
        total = int(starts[-1])
        drawn = np.sort(shuffled(key(*counts.counts.values()), total, 0, min(NUM_PAIRS, total)))
        bounds = np.searchsorted(drawn, starts)
        self.sizes: list[int] = np.diff(bounds).tolist()
        """pairs that each replica gives"""
        self._data = data
        self._own = drawn[bounds[data.rank] : bounds[data.rank + 1]] - starts[data.rank]
        """of this replica's pairs those that are drawn, ascending"""
        self._passed = 0
        """pairs of the micro-batches so far"""
        self._rows: list[torch.Tensor] = []

    @torch.no_grad()
    def take(self, out: Outputs, batch: PackedBatch) -> None:
        """From a micro-batch, which comes in its turn, the pairs that are drawn."""
        start, stop = np.searchsorted(self._own, [self._passed, self._passed + batch.num_pairs])
        if start < stop:
            slots = torch.nonzero_static(batch.image_soi >= 0, size=batch.num_pairs)[:, 0]
            pairs = slots[from_host((self._own[start:stop] - self._passed).tolist(), slots.device)]
            self._rows.append(torch.cat([out.latents[pairs], out.contexts[pairs]], 1).detach().float())
        self._passed += batch.num_pairs

    def gather(self, width: int, device: torch.device) -> torch.Tensor:
        """Of all replicas, [n, 2 D]: latents and contexts, side by side. width: D."""
        own = torch.cat([torch.empty(0, 2 * width, device=device), *self._rows])
        return self._data.gather_ragged(own, self.sizes)
