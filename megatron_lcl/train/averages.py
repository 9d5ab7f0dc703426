"""Averages of the weights over steps: exponential, and plain means over the end of the run.

Each process averages the float32 masters that it holds, as states of DeepSpeed's base optimizer beside Adam's moments.
So averages are sharded as these are, lie in the same files, and go on at any layout. Those of a parameter that is
frozen at a resume go on beside its value (train/checkpoint/frozen.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_lcl.config import Config
from megatron_lcl.errors import UserError
from megatron_lcl.model.transfer import from_host
from megatron_lcl.train.checkpoint.frozen import Averaged, forget_group_copies, frozen_averages, held_value
from megatron_lcl.train.checkpoint.state import is_average
from megatron_lcl.train.optimizers.pieces import flats_of

MOST = 16_384
"""weights that an average is of; of an exponential one those within 1 / (1 - d). In float32 the n-th changes nothing
where it differs from the average by less than n * 6e-8 of it: for so many 0.1 %; bfloat16 rounds by up to 0.4 %"""


def average_names(config: Config) -> dict[str, float]:
    """The run's averages by name, with the decay of each, or the fraction of the run: its six digits, or all of them
    where two have the same six."""
    own = config.average
    pairs = [("ema", decay) for decay in own.ema] + [("tail", fraction) for fraction in own.tail]
    short = [f"{kind}_{value:g}" for kind, value in pairs]
    return {
        name if short.count(name) == 1 else f"{kind}_{value!r}": value
        for name, (kind, value) in zip(short, pairs, strict=True)
    }


def check_averages(config: Config) -> None:
    """UserError where an average that is to be measured is none of the run's."""
    name, names = config.evaluate.average, average_names(config)
    if name is not None and name not in names:
        raise UserError(
            f"evaluate.average = {name} is no average of this run; "
            + (f"there are {', '.join(names)}" if names else "average.ema or average.tail make some")
        )


def weight_of_next(name: str, value: float, number: torch.Tensor) -> torch.Tensor:
    """The weight of the number-th weights (from 1; a float64 scalar) in an average of so many.

    ema: (1 - d) / (1 - d^n), which makes the average sum_i d^(n - i) w_i / sum_i d^(n - i); tail: 1 / n.
    """
    return (1 - value) / (1 - value**number) if name.startswith("ema_") else 1 / number


class Averages:
    """The averages of a run; every process has one, and all call it together.

    A step that is skipped on the device (train/skipping.py) is left out there, too: nothing is asked on the host.
    """

    def __init__(self, config: Config, engine: Any) -> None:
        self._config, self._engine = config, engine
        self._names = average_names(config)
        self._averaged: Mapping[str, int] = {}
        self._numbers: dict[str, torch.Tensor] = {}
        """over how many steps each is, where the masters lie"""
        self._frozen: Averaged = []
        """what was trained before and is not now"""
        self._said: dict[str, int] = {}
        """of how many steps each mean is, as was said last"""

    def begin(self, averaged: Mapping[str, int], steps: int) -> dict[str, int]:
        """Go on from a checkpoint that a run of `steps` steps wrote, with each average over so many steps
        (Progress.averaged); those averages with which the run goes on. Of the others nothing is kept.

        A mean of the last steps begins anew where these begin later than those of that run, as they do when a run is
        given more steps: it may have weights from before them.
        """
        self._averaged = {
            name: number
            for name, number in averaged.items()
            if name in self._names and not (name.startswith("tail_") and self._before(name, steps) < self._before(name))
        }
        self._numbers = {}
        for state in self._engine.optimizer.optimizer.state.values():
            for name in [key for key in state if is_average(key) and key not in self._averaged]:
                del state[name]
        self._frozen = frozen_averages(self._engine.module)
        for _, averages in self._frozen:
            for name in averages.keys() - self._averaged.keys():
                del averages[name]
        return dict(self._averaged)

    def short_tails(self, averaged: Mapping[str, int], step: int) -> Iterator[str]:
        """Lines that say which mean of the last steps will be of fewer than it is meant to be, as the run goes on after
        `step` steps with what `begin` gave; where another number was said before, as after a rewind, this one."""
        last = self._config.train.steps
        for name in self._names:
            if name.startswith("tail_") and step < last:
                before = self._before(name)
                meant = last - before
                number = min(averaged.get(name, 0) + last - step, meant) if before < step else meant
                if number == self._said.get(name, meant):
                    continue
                self._said[name] = number
                yield f"{name} is the mean of {number} steps" + (
                    f", not of the last {meant}: the weights of the others were not kept, or their steps were skipped"
                    if number < meant
                    else ", all that it is meant to be of"
                )

    @torch.no_grad()
    def update(self, step: int, skipped: torch.Tensor | bool) -> None:
        """Go on with the weights after step number `step` (from 1), if it was not skipped.

        skipped: a scalar, 1 or 0, where only the device knows it.
        """
        begun = {name: value for name, value in self._names.items() if self._has_begun(name, step)}
        if skipped is True or not begun:
            return
        states = list(self._states())
        for name, value in begun.items():
            weight = self._next_weight(name, value, states[0][0].device, skipped)
            for flat, state in states:
                if name not in state:
                    state[name] = flat.detach().clone()
                state[name].lerp_(flat.detach(), weight)  # with weight 1 it is these, with 0 what it was, by bits
            for average, weights in self._of_frozen(name):
                average.lerp_(weights.float(), weight.to(average.device))

    def count(self, step: int, averaged: Mapping[str, int]) -> dict[str, int]:
        """Over how many steps each average is with step number `step`, which was applied."""
        begun = {name: averaged.get(name, 0) + 1 for name in self._names if self._has_begun(name, step)}
        return dict(averaged) | begun

    def _has_begun(self, name: str, step: int) -> bool:
        return not name.startswith("tail_") or step > self._before(name)

    def _before(self, name: str, steps: int | None = None) -> int:
        """Steps before the last (at least one) that a tail is the mean of, in a run of so many steps; None: of this
        run's."""
        steps = steps or self._config.train.steps
        return steps - max(1, round(steps * self._names[name]))

    def _every(self, name: str) -> int:
        """How many steps come to one whose weights are taken in, so that those of up to MOST are."""
        steps, value = self._config.train.steps, self._names[name]
        spanned = steps - self._before(name) if name.startswith("tail_") else min(1 / (1 - value), steps)
        return math.ceil(spanned / MOST)

    def _next_weight(self, name: str, value: float, device: torch.device, skipped: torch.Tensor | bool) -> torch.Tensor:
        """Count the step, and the weight of what is taken in, float32; 0 where nothing is.

        Of every so many steps that were not skipped the first one's are, for all of them. As the steps are counted, not
        those taken in, it goes on rightly from a checkpoint that was written with another number.
        """
        if name not in self._numbers:
            self._numbers[name] = from_host([self._averaged.get(name, 0)], device, torch.float64)[0]
        number, every = self._numbers[name], self._every(name)
        before = number.add_(1 - skipped) - 1
        weight = weight_of_next(name, value**every, before / every + 1)
        return torch.where((before % every == 0) & (skipped == 0), weight, 0.0).float()

    @contextlib.contextmanager
    def evaluated(self, averaged: Mapping[str, int]) -> Iterator[str | None]:
        """Inside, the model has the weights of `evaluate.average`, whose name is given, if it has begun; afterwards its
        own, unless an error ends the run: then the other processes make no exchange with this one."""
        name = self._config.evaluate.average
        if name is None or not averaged.get(name):
            yield None
            return
        frozen = list(self._of_frozen(name))
        own = [value.clone() for _, value in frozen]  # its dtype may not hold the average, which is to stay as it is
        for average, value in frozen:
            value.copy_(average)
        self._exchange(name)
        yield name
        for (_, value), before in zip(frozen, own, strict=True):
            value.copy_(before)
        self._exchange(name)

    def _of_frozen(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each parameter that is frozen and keeps an average: it, and a view of the weights that this process holds.
        One that begins only now has no others than these."""
        for parameter, averages in self._frozen:
            if name in averages:
                yield averages[name], held_value(parameter, averages[name])

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        """Put the average where the masters are, and these where it was; and into the model what the masters are."""
        for flat, state in self._states():
            master = flat.detach().clone()
            flat.data.copy_(state[name])
            state[name].copy_(master)
        optimizer = self._engine.optimizer
        if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
            optimizer.update_lp_params()
            return
        forget_group_copies(self._engine.module)
        # ZeRO-3: as at the end of its step
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    def _states(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        base = self._engine.optimizer.optimizer
        for flat in flats_of(self._engine.optimizer):
            yield flat, base.state[flat]
