"""All layouts of a run on so many processes: which are refused, which cannot fit, and the rest by predicted step time.

A layout is legal where `train.layout.check_layout` says so, what `deepspeed:` sets goes with it, and blocks can be
compiled if they are to be. Of the legal ones the bound of train/memory.py discards what certainly does not fit. The
steps of those that would be fastest are simulated (`simulate.usages_of`), until one fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.loading.packing import choose_images_per_pack
from megatron_lcl.errors import UserError
from megatron_lcl.plan.devices import Rates
from megatron_lcl.plan.memory import simulate_shallow
from megatron_lcl.plan.predict import Prediction, predict
from megatron_lcl.train.kernels import check_compile
from megatron_lcl.train.layout import check_layout
from megatron_lcl.train.memory import Estimate, estimate
from megatron_lcl.train.settings import check_zero, offloaded
from megatron_lcl.train.simulate import Simulate, Usage, placeholders_of_image, simulate, usages_of

TENSOR, PIPELINE, MICRO_BATCH = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)
CHECKPOINTING: tuple[Any, ...] = ("none", "attention", "full")
MAX_SIMULATED = 4
"""layouts whose steps are simulated until one fits"""


@dataclass(frozen=True)
class Target:
    """On what it is to run."""

    processes: int
    node_size: int
    """processes of a node"""
    rates: Rates
    room: float
    """bytes that a process may take"""
    text_per_image: float
    """tokens of a pack for each image, beside its placeholders: the corpora's, in all phases"""
    on_host: bool
    """what is offloaded lies in other memory than the rest: false on a CPU"""

    def predict(self, config: Config) -> Prediction:
        """A step of a phase's config. UserError where the layout does not divide."""
        return predict(config, self.processes, self.node_size, self.rates, slots(config, self.text_per_image))


@dataclass(frozen=True)
class Layout:
    """One way to run it, and what is known of that."""

    config: Config
    refused: str = ""
    """why it is not legal"""
    needs: float = 0.0
    """bytes: the bound, where it was simulated the simulation"""
    gradients: float = 0.0
    """bytes of them once they are summed and split over replicas, by the bound's formula"""
    offloaded: float = 0.0
    """bytes in the host's memory: by the bound's formula, or as simulated, with buffers for what is moved"""
    prediction: Prediction | None = None
    """of the phase that needs most; None where it does not fit"""
    usages: Sequence[Usage] = ()
    """of the first process of each stage, where it was simulated"""

    @property
    def seconds(self) -> float:
        assert self.prediction is not None
        return self.prediction.seconds

    @property
    def name(self) -> str:
        return name_of(self.config)


def name_of(config: Config) -> str:
    """A layout in one line."""
    train, parallel = config.train, config.parallel
    parts = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}", f"ZeRO-{config.zero.stage}"]
    if objectives.create(config).all_features_first:
        parts.append(config.contrast.strategy)
    parts.append(f"micro-batch {train.micro_batch}")
    if train.activation_checkpointing != "none":
        every = train.activation_checkpointing_every
        parts.append(
            f"checkpointing {train.activation_checkpointing}" + (f" of one in {every} blocks" if every > 1 else "")
        )
    return ", ".join(parts)


def layouts(config: Config, node_size: int) -> Iterator[Config]:
    """The config in every layout that is tried, its own among them."""
    strategies: tuple[Any, ...] = ("retain", "recompute")
    if not objectives.create(config).all_features_first:
        strategies = (config.contrast.strategy,)
    tensors = [t for t in TENSOR if t <= node_size]
    ways = itertools.product(tensors, PIPELINE, (1, 2, 3), strategies, MICRO_BATCH, CHECKPOINTING)
    tried = {key_of(config): config} if config.contrast.strategy in strategies else {}
    for tensor, pipeline, stage, strategy, micro_batch, checkpointing in ways:
        found = replace(
            config,
            parallel=replace(config.parallel, tensor=tensor, pipeline=pipeline),
            zero=replace(config.zero, stage=stage),
            contrast=replace(config.contrast, strategy=strategy),
            train=replace(config.train, micro_batch=micro_batch, activation_checkpointing=checkpointing),
        )
        tried.setdefault(key_of(found), found)
    return iter(tried.values())


def key_of(config: Config) -> tuple[object, ...]:
    """What tells two layouts apart; in the order in which the simpler one of two equals is taken."""
    parallel, train = config.parallel, config.train
    checkpointing = CHECKPOINTING.index(train.activation_checkpointing)
    return (
        parallel.pipeline,
        parallel.tensor,
        config.zero.stage,
        checkpointing,
        train.micro_batch,
        config.contrast.strategy,
    )


def survey(config: Config, target: Target) -> tuple[list[Layout], list[Layout], list[Layout]]:
    """The layouts that the bound lets pass, fastest first; those that need too much, least first; those refused."""
    passed, too_large, refused = [], [], []
    for tried in layouts(config, target.node_size):
        try:
            phases = phases_of(tried)
            for phase in phases:
                with phase.naming_fields():
                    check_zero(phase.config, check_layout(phase.config, target.processes))
            check_compile(tried, elsewhere=True)
        except UserError as error:
            refused.append(Layout(tried, refused=str(error)))
            continue
        least = max((bound(phase.config, target) for phase in phases), key=lambda of: of.needs)
        if least.needs > target.room:
            too_large.append(replace(least, config=tried))
            continue
        slowest = max((target.predict(phase.config) for phase in phases), key=lambda of: of.seconds)
        passed.append(replace(least, config=tried, prediction=slowest))
    passed.sort(key=lambda layout: (round(layout.seconds, 9), key_of(layout.config)))
    too_large.sort(key=lambda layout: layout.needs)
    return passed, too_large, refused


def slots(config: Config, text_per_image: float) -> int:
    """Image slots of a pack in a phase: as its config says, or as a run chooses them from such corpora.

    text_per_image: tokens of a pack for each image, beside its placeholders.
    """
    sequences, per_token = objectives.create(config).sequences, 1 / (placeholders_of_image(config) + text_per_image)
    return config.data.images_per_pack or choose_images_per_pack(
        per_token,
        config.data.tokens_per_pack,
        0.0 if sequences.interleaved else per_token,
        captions=sequences.doubled,
    )


def bound(config: Config, target: Target) -> Layout:
    """What is certain of a config's memory; what is offloaded to the host is not needed where that is other memory."""
    images = slots(config, target.text_per_image)
    least = estimate(config, target.processes, images, on_gpu=False)  # with what is offloaded
    on_host = _on_host(config, target, least)
    return Layout(config, needs=least.total - on_host, gradients=least.gradients, offloaded=on_host)


def _on_host(config: Config, target: Target, of: Estimate | Usage) -> float:
    """What of the bytes lies in the host's memory."""
    moved = offloaded(config) if target.on_host else frozenset[str]()
    return ("optimizer" in moved) * of.optimizer + ("param" in moved) * of.parameters


def confirm(
    passed: Sequence[Layout],
    target: Target,
    say: Callable[[str], None],
    simulated: Simulate = simulate,
) -> tuple[list[Layout], list[Layout]]:
    """Those that are left, fastest first, and those whose simulated step needs too much.

    A step of the fastest is simulated, of the next one where it does not fit, and so on; behind the first that fits, or
    behind `MAX_SIMULATED`, stand those of which only the bound is known.
    """
    left, failed = list(passed), list[Layout]()
    while left and len(failed) < MAX_SIMULATED:
        layout = left[0]
        say(f"simulating a step: {layout.name}")
        config = max((phase.config for phase in phases_of(layout.config)), key=lambda phase: bound(phase, target).needs)
        images, shallow = slots(config, target.text_per_image), partial(simulate_shallow, simulated=simulated)
        usages = usages_of(config, target.processes, images, target.on_host, shallow)
        # which of DeepSpeed's buffers for what it moves are the host's, a simulation does not see: only states come off
        certain = bound(config, target).offloaded
        needs = max(u.peak if target.on_host else u.process for u in usages) - certain
        on_host = max(_on_host(config, target, u) for u in usages)
        checked = replace(layout, needs=needs, offloaded=on_host, usages=usages)
        if needs <= target.room:
            return [checked, *left[1:]], failed
        failed.append(checked)
        del left[0]
        # a layout like it in all but what costs no memory would need as much
        left = [other for other in left if not _needs_as_much(other, checked)]
    return left, failed


def _needs_as_much(other: Layout, failed: Layout) -> bool:
    """By the bound, whose distance from the simulation is alike for layouts of one split of the model."""
    a, b = other.config, failed.config
    same = (a.parallel, a.zero, a.contrast.strategy) == (b.parallel, b.zero, b.contrast.strategy)
    return (
        same
        and a.train.micro_batch >= b.train.micro_batch
        and (
            CHECKPOINTING.index(a.train.activation_checkpointing)
            <= CHECKPOINTING.index(b.train.activation_checkpointing)
        )
    )
