"""What `plan` says of a run's own layout, from what the run's folder says of it, to show beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lcl.config import Config
from megatron_lcl.config.phases import phase_at
from megatron_lcl.errors import UserError
from megatron_lcl.plan import describe, devices, run
from megatron_lcl.report.series import Metrics


@dataclass(frozen=True)
class Asked:
    """What is planned; two that are equal have the same plan."""

    config: Config
    """of the phase in which the run is"""
    device: str
    processes: int
    nodes: int
    images: int | None
    """slots of a pack; None: the run has not said"""

    @classmethod
    def of(cls, config: Config, metrics: Metrics) -> Asked | None:
        """Of a run; None where `plan` has no data sheet of its device (a CPU would have to be measured, which only its
        own machine can do), or an earlier version wrote its metrics."""
        device = devices.name_of(str(metrics.hardware.get("device")))
        processes, nodes = metrics.hardware.get("processes"), metrics.hardware.get("nodes")
        if device is None or not isinstance(processes, int) or not isinstance(nodes, int):
            return None
        slots = metrics.series.get("images_per_pack")
        images = int(slots.last) if slots is not None and slots.last else None
        return cls(phase_at(config, max(metrics.last_step - 1, 0)).config, device, processes, nodes, images)

    def numbers(self) -> Mapping[str, Any]:
        """As `plan --json` writes them, with the bound of the memory; empty where the layout does not divide."""
        try:
            layout = run.own_layout(self.config, self.device, self.processes, self.nodes, self.images)
        except UserError:
            return {}
        return describe.numbers_of(layout, self.device, self.processes)
