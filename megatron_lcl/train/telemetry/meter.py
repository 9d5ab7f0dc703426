"""What every process notes of its own steps, and what all tell each other of it when a step is logged.

Between two lines nothing is exchanged and no device is waited for. For a line, one gather of a few numbers among hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model import flops
from megatron_lcl.objectives.base import GlobalCounts, Objective
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.parts import frozen_parameters
from megatron_lcl.train.precision import resolve_dtype
from megatron_lcl.train.resilience.faults import node
from megatron_lcl.train.result import Measured, StepResult
from megatron_lcl.train.telemetry import health
from megatron_lcl.train.telemetry.clock import PHASES, STEP, WORK, Clock
from megatron_lcl.train.telemetry.devices import hardware, own_peak
from megatron_lcl.train.telemetry.log import Telemetry
from megatron_lcl.train.telemetry.stragglers import Place, Stragglers, of_each

FLOPS = tuple(f.name for f in dataclasses.fields(flops.Flops))


class StepMeter:
    """One a process; all are asked for the same lines."""

    def __init__(self, config: Config, mesh: Mesh, clock: Clock, telemetry: Telemetry) -> None:
        self._config, self._mesh, self._clock, self._telemetry = config, mesh, clock, telemetry
        self._peak = config.train.peak_flops or own_peak(resolve_dtype(config))
        self._stragglers = Stragglers(mesh.world.gather_objects(Place(node(), mesh.model_parallel.rank)))
        self._health = health.HealthWatch()
        self._slots: list[int] = []
        """of the last step, over all processes: of tokens, of images"""
        self._own: tuple[Sequence[PackedBatch] | None, Config, Objective] | None = None
        self._waited = 0.0
        self._start()
        clock.start()

    def _start(self) -> None:
        self._flops = flops.Flops(0, 0, 0, 0, 0)
        self._images, self._tokens, self._steps, self._seconds = 0, 0, 0, 0.0

    def reset(self) -> None:
        """The run has gone back: of the steps since the last line nothing stays but what was waited for checkpoints."""
        self._clock.take()
        self._start()

    def read(self, batches: Sequence[PackedBatch] | None, config: Config, objective: Objective) -> None:
        """The micro-batches of a step, as this process has read them: on the host, before they are handed on. None
        where another process of the replica reads. config: of the phase; objective: of the step."""
        self._clock.enter("exchange")
        self._own = batches, config, objective

    def step(self, batches: Sequence[PackedBatch], counts: GlobalCounts, seconds: float) -> None:
        """A step is done. batches: as `read`, on this process's device; seconds: that it took."""
        slots = [(len(batch.tokens), len(batch.image_soi)) for batch in batches]
        self._slots = [self._mesh.data.size * sum(numbers) for numbers in zip(*slots, strict=True)]
        self._images += counts.counts["num_images"]
        self._tokens += counts.counts["num_tokens"]
        self._steps += 1
        self._seconds += seconds
        assert self._own is not None
        (own, config, objective), self._own = self._own, None
        if own is not None:
            pairs, contrast = counts.counts["num_pairs"], objective.all_features_first
            sizes, frozen = flops.Sizes.of(own), frozen_parameters(config)
            self._flops += flops.of_step(config.model, sizes, pairs, contrast=contrast, frozen=frozen)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Steps wait for a checkpoint meanwhile."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - since

    def line(self, step: int, result: StepResult, lr: float) -> dict[str, Any]:
        """What is to stand in the line of a step beside its result, on the first process. All call it."""
        times = self._clock.take()
        own = [*(times[phase] for phase in PHASES), *dataclasses.astuple(self._flops), memory_peak(), self._waited]
        table = self._mesh.world.all_gather(torch.tensor(own, dtype=torch.float64)).tolist()
        steps, seconds = max(self._steps, 1), max(self._seconds, 1e-9)
        rates = {
            "images_per_second": self._images / seconds,
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": seconds / steps,
        }
        self._start()
        self._waited = 0.0
        if not self._mesh.is_first:
            return {}
        spent = [dict(zip(PHASES, row[: len(PHASES)], strict=True)) for row in table]  # apart: FLOPs have a `loss` too
        of_ranks = [dict(zip((*FLOPS, "memory", "waited"), row[len(PHASES) :], strict=True)) for row in table]
        total = sum(row[part] for row in of_ranks for part in FLOPS)
        numbers: dict[str, Any] = {
            **rates,
            **self._counts(result),
            **rates_by_part(self._config, lr),
            "flops_per_second": total / seconds,
            "memory_peak_bytes": int(max(row["memory"] for row in of_ranks)),
            "checkpoint_wait_seconds": max(row["waited"] for row in of_ranks),
        }
        places = self._stragglers.places
        data = [row["data"] for row, place in zip(spent, places, strict=True) if place.loads_data]
        numbers["data_wait"] = sum(data) / len(data) / seconds
        if len(data) > 1:
            numbers["data_wait_max"] = max(data) / seconds
        if self._peak:
            numbers["mfu"] = total / seconds / (self._peak * self._mesh.world.size)
        if self._mesh.world.size > 1:
            each: list[dict[str, float]] = [{phase: row[phase] / steps for phase in PHASES} for row in spent]
            slowest, said = self._stragglers.add(each, seconds / steps)
            numbers |= {"slowest_rank": slowest.rank, "slowest_lag_seconds": slowest.lag}
            numbers["slowest_phase"] = slowest.phase
            numbers |= {"rank_step_seconds": of_each(each, STEP), "rank_work_seconds": of_each(each, WORK)}
            if said:
                self._telemetry.say(said)
        if result.measured is not None:
            numbers |= self._measured(step, result.measured)
        return numbers

    def hardware(self) -> dict[str, str | int]:
        """On what the run computes, for its metrics."""
        return hardware([place.node for place in self._stragglers.places])

    def finish(self) -> None:
        """The last line is written: how long the saves since then were waited for, on this process alone, since others
        may have failed; and who was last how often, where there are several processes."""
        waited = round(self._waited, 3)  # nothing, where a run that was done is started again
        if waited and self._mesh.is_first:
            self._telemetry.write({"step": self._telemetry.last_step, "checkpoint_wait_seconds": waited})
        report = self._stragglers.report()
        if report and self._mesh.is_first:
            nodes = ", ".join(f"{name} {number}" for name, number in list(self._stragglers.by_node().items())[:5])
            first = report[0]
            self._telemetry.say(
                f"slowest process: {first['rank']} (node {first['node']}) in {first['last']} of {first['of']} lines, "
                f"by {first['lag_seconds']:.3g} s a step, mostly in {first['phase']}; by node: {nodes}"
            )
            self._telemetry.write({"step": self._telemetry.last_step, "stragglers": report})

    def _counts(self, result: StepResult) -> dict[str, int]:
        tokens, images = self._slots
        counts = {
            "token_slots_padded": tokens - result.num_tokens,
            "image_slots_padded": images - result.num_images,
        }
        if "image_accuracy" in result.metrics and result.num_pairs:
            counts["negatives_per_anchor"] = result.num_pairs - 1
        return counts

    def _measured(self, step: int, measured: Measured) -> dict[str, float]:
        kinds = {
            "grad_norm": measured.grad_norms,
            "update_norm": measured.update_norms,
            "max_attention_logit": measured.attention_logits,
        }
        numbers = {
            f"{name}/{part}": value
            for name, parts in kinds.items()
            for part, value in parts.items()
            if not math.isnan(value)  # not known at this layout, or there is none
        }
        numbers |= health.measure(measured.latents, measured.contexts)
        if step > self._config.optimizer.warmup:
            for name, line in self._health.look(numbers, len(measured.latents)):
                self._telemetry.say(f"step {step}: {line}")
                self._telemetry.write({"step": step, "health": {"metric": name, "says": line}})
        return numbers


def rates_by_part(config: Config, lr: float) -> dict[str, float]:
    """The learning rates of a step by part, where they differ; those before layer-wise decay."""
    parts = {f.name: getattr(config.optimizer.parts, f.name).lr for f in dataclasses.fields(config.optimizer.parts)}
    return {f"lr/{part}": lr * rate for part, rate in parts.items()} if len(set(parts.values())) > 1 else {}


def memory_peak() -> int:
    """Bytes that this process has had at most: on its device, as torch allocated them; on a CPU resident ones."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
