"""`contrast.strategy: auto`: `retain` where a step of it fits into the memory there is, else `recompute`.

Chosen before a run starts, by its first process for all. The run's config, and that of its checkpoints, has what was
chosen; `progress.json` has the numbers. A run that goes on at the same layout, with the same settings, keeps what it
had, for the two differ in rounding; at another one it is chosen anew.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.train.checkpoint.folder import Layout, Progress
from megatron_lcl.train.fits import ROOM, predicted
from megatron_lcl.train.layout import check_layout
from megatron_lcl.train.memory import Memory, Slots, largest_estimate
from megatron_lcl.train.precision import resolve_dtype
from megatron_lcl.units import in_gb

AMPLE = 10
"""times its lower bound a step surely has room, and is not simulated: at most 3.5 times that has been measured"""


@dataclass(frozen=True)
class Choice:
    """What `auto` came to."""

    strategy: Literal["retain", "recompute"]
    bound: float
    """bytes that a process holds at least with `retain`; 0: it does not go with the layout, or needs no more"""
    needs: float = 0.0
    """the same, simulated; 0: that was not needed"""

    @property
    def is_simulated(self) -> bool:
        """Whether a step of it has been simulated, and fits."""
        return self.strategy == "retain" and self.needs > 0

    def __str__(self) -> str:
        """Nothing of the machine's, which may have a little more or less than the next one."""
        if not self.bound:
            why = "under ZeRO-3 there is no other" if self.strategy == "recompute" else "the objective has one pass"
            return f"{self.strategy} (auto): {why}"
        needs = f"about {in_gb(self.needs)} GB" if self.needs else f"at least {in_gb(self.bound)} GB"
        if self.strategy == "retain":
            return f"retain (auto): {needs} a process"
        return f"recompute (auto): retain would need {needs} a process"


def choose_strategy(
    config: Config,
    processes: int,
    has: Memory,
    images_per_pack: Slots = None,
    previous: Progress | None = None,
) -> Choice | None:
    """What `contrast.strategy: auto` comes to; None where the config names a strategy. UserError as `check_layout`.

    previous: of the checkpoint that the run goes on from.
    """
    if config.contrast.strategy != "auto":
        return None
    data = check_layout(config, processes)
    retain = configs.replace(config, contrast__strategy="retain")
    if not objectives.create(retain).keeps_graphs:
        return Choice("retain", 0.0)
    if config.zero.stage == 3:
        return Choice("recompute", 0.0)
    bound = largest_estimate(retain, processes, images_per_pack, has.on_gpu).total
    ample = AMPLE * config.parallel.pipeline * bound  # one stage may hold most of it
    before = Choice(**previous.contrast) if previous and previous.contrast else None
    fits = before and (before.strategy == "recompute" or (before.needs or ample) <= has.size)
    if previous and before and fits and before.bound == bound and _same(previous.layout, config, data):
        return before
    if ample <= has.size:
        return Choice("retain", bound)
    if bound > ROOM * has.size:
        return Choice("recompute", bound)
    needs = predicted(retain, processes, images_per_pack, has.on_gpu)
    return Choice("retain" if needs <= ROOM * has.size else "recompute", bound, needs)


def with_choice(config: Config, progress: Progress, choice: Choice | None) -> tuple[Config, Progress]:
    """Both as they are once `auto` is chosen."""
    if choice is None:
        return config, replace(progress, contrast={})
    return configs.replace(config, contrast__strategy=choice.strategy), replace(progress, contrast=asdict(choice))


def _same(layout: Layout, config: Config, data: int) -> bool:
    """Whether a checkpoint's layout is that of a run."""
    parallel = config.parallel
    now = (parallel.tensor, parallel.pipeline, data, config.zero.stage, resolve_dtype(config))
    return now == (layout.tensor, layout.pipeline, layout.data, layout.zero_stage, layout.dtype)
