"""Whether a run fits into the memory there is, and if not, the nearest that does.

A run is refused for its lower bound (`memory.estimate`), which takes no time, whenever it is started. Before its first
step it is refused for a simulated step (`simulate`) as well, where the bound leaves it in doubt: that takes seconds, of
a deep model on many replicas half a minute, for each stage of a pipeline that is simulated. What is named in its place
has been simulated, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.loading.batch import batch_bytes
from megatron_lcl.data.loading.shared_memory import PREFETCH, check_shared_memory
from megatron_lcl.errors import UserError, complain
from megatron_lcl.evaluate.rules import heldout_data
from megatron_lcl.train.kernels import check_compile
from megatron_lcl.train.layout import check_layout, num_micro_batches
from megatron_lcl.train.memory import (
    Memory,
    Slots,
    estimate,
    largest_estimate,
    run_slots,
    slots_of_phases,
)
from megatron_lcl.train.settings import check_zero
from megatron_lcl.units import counted, in_gb

ROOM = 0.9
"""the share of the memory that a simulated step may take: such have been within 10 % of what was measured, and have
nothing of the allocator's fragments, the device's context and the network library"""

DOUBT = 4
"""times its lower bound a step surely needs no more, for each stage of a pipeline: at most 3.5 has been measured"""

SAVINGS: tuple[tuple[str, Any], ...] = (
    ("contrast.strategy", "recompute"),
    ("train.micro_batch", 1),
    ("train.activation_checkpointing", "full"),
    ("zero.stage", 2),
    ("zero.stage", 3),
    ("parallel.tensor", 2),
    ("parallel.tensor", 4),
    ("parallel.tensor", 8),
)
"""settings that need less, the cheapest first"""
_TRIES = 3
"""simulations of a search, at most"""


def predicted(config: Config, processes: int, images_per_pack: Slots = None, on_gpu: bool = False) -> float:
    """Bytes that the process which has most holds in a step of the run's largest phase, simulated."""
    from megatron_lcl.train import simulate as simulation  # the whole of it, for which most starts have no use here

    complain(f"megatron-lcl: simulating a step of {counted(processes, 'process')}, which may take minutes")
    largest, images = _largest(config, processes, images_per_pack, on_gpu)
    found = simulation.usages_of(largest, processes, images, on_gpu, simulation.simulate)
    return max(usage.peak if on_gpu else usage.process for usage in found)


def _largest(config: Config, processes: int, images_per_pack: Slots, on_gpu: bool) -> tuple[Config, int]:
    """The config of the phase whose lower bound is largest, and the image slots of its packs."""
    phases, slots = [phase.config for phase in phases_of(config)], slots_of_phases(config, images_per_pack)
    pairs = zip(phases, slots, strict=True)
    largest, images = max(pairs, key=lambda pair: estimate(pair[0], processes, pair[1], on_gpu).total)
    return largest, images or largest.data.images_per_pack or 1


def check_memory(config: Config, processes: int, has: Memory, images_per_pack: Slots = None) -> None:
    """UserError where what a process needs at least is not there, with its parts and the nearest that fits, or where
    shared memory has no room for the micro-batches of loader processes.

    has: what a process has.
    """
    _check_batches(config, processes, has, images_per_pack)
    needs = largest_estimate(config, processes, images_per_pack, has.on_gpu)
    if needs.total > has.size:
        raise UserError(
            f"a step needs at least {needs.describe()} a process, and {has.where}; "
            + remedy(config, processes, has, images_per_pack)
        )


def _check_batches(config: Config, processes: int, has: Memory, images_per_pack: Slots) -> None:
    split = config.parallel.tensor * config.parallel.pipeline  # one process of so many reads
    ahead = PREFETCH * config.data.workers
    for phase, images in zip(phases_of(config), slots_of_phases(config, images_per_pack), strict=True):
        data, train = phase.config.data, phase.config.train
        slots, size = images or data.images_per_pack or 1, phase.config.model.vision.image_size
        batch = batch_bytes(train.micro_batch, data.tokens_per_pack, slots, size)
        # for a GPU they are copied from there at once, else a step's stay where they are
        kept = 0 if has.on_gpu else num_micro_batches(phase.config, check_layout(phase.config, processes))
        needs = (ahead + kept) * batch + ahead * _heldout_batch(config)
        check_shared_memory(needs, config.data.workers, max(1, has.local // split), has.shared)


def _heldout_batch(config: Config) -> int:
    """Bytes of a micro-batch of evaluations during the run, whose loader processes come beside those of training."""
    if not config.train.evaluate_every or config.evaluate.corpus is None:
        return 0
    data, tokens = heldout_data(config, config.evaluate.corpus), config.train.micro_batch * config.data.tokens_per_pack
    packs, slots = max(1, tokens // data.tokens_per_pack), data.images_per_pack or 1
    return batch_bytes(packs, data.tokens_per_pack, slots, config.model.vision.image_size)


def check_step(config: Config, processes: int, has: Memory, images_per_pack: Slots = None) -> bool:
    """UserError where a step of a run whose bound passes needs more than a process has, with the nearest that fits.

    Where the bound is far below that, nothing is simulated. On a GPU all tensors of a step and the batches of the next
    are counted, and they are what is compared; what a process on a CPU has is predicted within a tenth, so that much
    more is let pass. Returns whether it was simulated.
    """
    bound = largest_estimate(config, processes, images_per_pack, has.on_gpu).total
    if DOUBT * config.parallel.pipeline * bound <= has.size:
        return False
    needs = predicted(config, processes, images_per_pack, has.on_gpu)
    if needs > (has.size if has.on_gpu else has.size / ROOM):
        raise UserError(
            f"a step needs about {in_gb(needs)} GB a process, as simulated, and {has.where}; "
            + remedy(config, processes, has, images_per_pack)
        )
    return True


def remedy(config: Config, processes: int, has: Memory, images_per_pack: Slots = None) -> str:
    """What to do so that a step fits into what a process has: the fewest flags, and how many GPUs do without them, or
    how many processes of the one machine whose memory they share."""
    if config.contrast.strategy == "auto":  # it has come down to that
        config = configs.replace(config, contrast__strategy="recompute")
    slots, note = _known_slots(config, images_per_pack)
    others = list(_other_numbers(processes, has))
    fewest = ((changed, processes, has, f"add {_typed(settings)}") for changed, settings in _changed(config))
    taken = ((config, n, each, f"take {counted(n, 'process')} in place of {processes:,}") for n, each in others)
    found = [_first(tried, slots, note) for tried in (fewest, taken)]
    if not any(found):
        smallest = (min(_changed(config), key=lambda pair: _bound(pair[0], n, slots, has.on_gpu)) for n, _ in others)
        both = (
            (changed, n, each, f"add {_typed(settings)} and take {counted(n, 'process')}")
            for (n, each), (changed, settings) in zip(others, smallest, strict=True)
        )
        found = [_first(both, slots, note)]
    return ", or ".join(filter(None, found)) or (
        "nothing that was tried fits: make packs smaller (--data.tokens_per_pack), or the model"
    )


def _other_numbers(processes: int, has: Memory) -> Iterator[tuple[int, Memory]]:
    """Numbers of processes with which each may need less or has more, and what each then has: of GPUs twice as many,
    four times …; on one machine's CPU half as many, a quarter …, as they share its memory."""
    if has.on_gpu:
        yield from ((processes << n, has) for n in range(1, 13))
    elif processes == has.local:
        for n in range(1, processes.bit_length()):
            fewer = processes >> n
            yield fewer, replace(has, size=has.size * processes / fewer, local=fewer)


def _known_slots(config: Config, images_per_pack: Slots) -> tuple[Slots, str]:
    """Image slots of a pack in each phase: as the run will have them, or, without its corpora, as many as have room."""
    if images_per_pack is not None or config.data.images_per_pack:
        return images_per_pack, ""
    try:
        return run_slots(config), ""
    except (UserError, OSError):
        phases = [phase.config for phase in phases_of(config)]
        places = [(phase.data.tokens_per_pack, phase.model.vision.num_placeholders + 2) for phase in phases]
        return [max(1, tokens // of_image) for tokens, of_image in places], ", with packs full of images"


def _first(candidates: Iterable[tuple[Config, int, Memory, str]], images_per_pack: Slots, note: str) -> str | None:
    """What is said of the first config and number of processes with which a simulated step fits into what each has;
    None: of none."""
    within = (
        (config, processes, has, said)
        for config, processes, has, said in candidates
        if _bound(config, processes, images_per_pack, has.on_gpu) <= ROOM * has.size
    )
    for config, processes, has, said in itertools.islice(within, _TRIES):
        needs = predicted(config, processes, images_per_pack, has.on_gpu)
        if needs <= ROOM * has.size:
            return f"{said} (then about {in_gb(needs)} GB{note})"
    return None


def _changed(config: Config) -> Iterator[tuple[Config, dict[str, Any]]]:
    """The config with one setting of SAVINGS, then with two, then with three, and these settings."""
    for number in (1, 2, 3):
        for settings in itertools.combinations(SAVINGS, number):
            chosen = dict(settings)
            if len(chosen) == number and all(_get(config, field) != value for field, value in settings):
                yield configs.replace(config, **{f.replace(".", "__"): v for f, v in settings}), chosen


def _get(config: Config, field: str) -> Any:
    section, name = field.split(".")
    return getattr(getattr(config, section), name)


def _bound(config: Config, processes: int, images_per_pack: Slots, on_gpu: bool) -> float:
    """The lower bound; infinite where the layout does not go, by itself or with the rest of the config."""
    try:
        check_zero(config, check_layout(config, processes))
        check_compile(config, elsewhere=True)  # whether it can be here does not depend on the layout
        return largest_estimate(config, processes, images_per_pack, on_gpu).total
    except UserError:
        return math.inf


def _typed(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--{field} {value}" for field, value in settings.items())
