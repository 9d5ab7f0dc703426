"""Some latents and contexts of a step's global batch, for a look at their health.

Of each of R replicas the first pairs in order of its micro-batches: of the first 256 mod R replicas at most 256 / R
rounded up, of the others rounded down, so at most 256 in all. Packs are dealt out over replicas and drawn anew in each
step, so these are a random sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.layers import Outputs
from megatron_lcl.parallel.mesh import Axis

NUM_PAIRS = 256


class FeatureSample:
    """Taken where the head is, micro-batch by micro-batch."""

    def __init__(self, pairs: Sequence[int], data: Axis) -> None:
        """pairs: of each replica."""
        share, left = divmod(NUM_PAIRS, data.size)
        self.sizes = [min(count, share + (rank < left)) for rank, count in enumerate(pairs)]
        """pairs that each replica gives"""
        self._data = data
        self._left = self.sizes[data.rank]
        self._rows: list[torch.Tensor] = []

    @torch.no_grad()
    def take(self, out: Outputs, batch: PackedBatch) -> None:
        """From a micro-batch, what is still to be given."""
        number = min(self._left, batch.num_pairs)
        if number:
            pairs = torch.nonzero_static(batch.image_soi >= 0, size=batch.num_pairs)[:number, 0]
            self._rows.append(torch.cat([out.latents[pairs], out.contexts[pairs]], 1).detach().float())
            self._left -= number

    def gather(self, width: int, device: torch.device) -> torch.Tensor:
        """Of all replicas, [n, 2 D]: latents and contexts, side by side. width: D."""
        own = torch.cat([torch.empty(0, 2 * width, device=device), *self._rows])
        return self._data.gather_ragged(own, self.sizes)
