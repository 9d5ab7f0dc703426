"""When a run stops because too many images no longer decode: many in a row, or a large share of the last ones."""

from __future__ import annotations

from collections import deque

import numpy as np

from megatron_lcl.config import Data
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.errors import UserError

WINDOW = 1000
"""images of which the share is taken"""
MIN_BAD = 20
"""so many at least make a share: the first image may be bad, and all of ten"""


class BadImages:
    """Counts what one process has read since it started."""

    def __init__(self, data: Data) -> None:
        self.max_consecutive, self.max_fraction = data.max_bad_images, data.max_bad_fraction
        self._consecutive = 0
        self._last: deque[bool] = deque(maxlen=WINDOW)
        self._num_bad = 0
        """of the last ones"""

    def count(self, batch: PackedBatch) -> None:
        """Look at the images of a batch, in their order. UserError where there are too many bad ones."""
        failed = dict(batch.bad_images)
        valid = np.flatnonzero(batch.image_valid.numpy()).tolist()
        for slot in sorted([*failed, *valid]):
            bad = slot in failed
            self._consecutive = self._consecutive + 1 if bad else 0
            self._num_bad += bad - (len(self._last) == WINDOW and self._last[0])
            self._last.append(bad)
            if self._consecutive > self.max_consecutive:
                self._stop(f"{self._consecutive} images in a row did not decode", failed[slot], "max_bad_images")
            if bad and self._num_bad >= MIN_BAD and self._num_bad / len(self._last) > self.max_fraction:
                share = f"{self._num_bad} of the last {len(self._last)} images did not decode"
                self._stop(share, failed[slot], "max_bad_fraction")

    def _stop(self, what: str, last: str, field: str) -> None:
        raise UserError(
            f"{what}, the last one {last}; check the corpus with `megatron-lcl verify`, or raise data.{field}"
        )
