"""Images that did not decode: each process collects its own, and all together write them at logged steps and saves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.telemetry.log import Telemetry

NAMED = 10
"""images that a line of metrics.jsonl names"""


class BadImageLog:
    """The bad images since the last line that says how many there were, and which. Every process has one."""

    def __init__(self, world: Axis, telemetry: Telemetry) -> None:
        self._world, self._telemetry = world, telemetry
        self._number = 0
        """of all processes"""
        self._reasons: list[str] = []
        """of this one, the first NAMED"""

    def add(self, number: int, batches: Iterable[PackedBatch]) -> None:
        """Those of a step. number: in the global batch; batches: what this process has read of it."""
        self._number += number
        reasons = (reason for batch in batches for _, reason in batch.bad_images)
        self._reasons += itertools.islice(reasons, NAMED - len(self._reasons))

    def write(self, step: int) -> None:
        """All up to step number `step`, if there are any; every process calls it there.

        Before a save at the latest: a run that goes on from it makes no earlier step again.
        """
        if self._number:  # the same on every process
            reasons = itertools.chain.from_iterable(self._world.gather_objects(self._reasons))
            self._telemetry.bad_images(step, self._number, list(itertools.islice(reasons, NAMED)))
        self._number, self._reasons = 0, []
