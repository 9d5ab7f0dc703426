"""Packs that make a step bad, planted in the processes of a run; and a run without them."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from megatron_lcl.train.checkpoint import folder as checkpoint


def saved_steps(run: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run)]


def poison(rank: int, packs: list[int], kind: str) -> None:
    """A process that reads one of these packs gets a loss that is not finite, or a thousand times what it should be."""
    from megatron_lcl.model.lcl import LayerList

    plain = LayerList.forward

    def forward(self, batch):  # type: ignore[no-untyped-def]
        out = plain(self, batch)
        if not set(batch.packs) & set(packs):
            return out
        return out._replace(generation=out.generation * (math.nan if kind == "nan" else 1000))

    LayerList.forward = forward  # type: ignore[method-assign]


def poison_and_stop(rank: int, packs: list[int], step: int | None, environment: Mapping[str, str]) -> None:
    """As `poison`; the process's `step`th step brings a signal."""
    from megatron_lcl.train.step import Stepper

    os.environ.update(environment)
    poison(rank, packs, "nan")
    plain, calls = Stepper.start, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        result = plain(self, *arguments)
        if len(calls) == step and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Stepper.start = run  # type: ignore[method-assign]


def without_packs(rank: int, consumed: int, count: int) -> None:
    """A run whose ledger skips packs from the beginning."""
    from megatron_lcl.train import resume_point

    plain = resume_point.open_run_ledger
    resume_point.open_run_ledger = lambda *a, **k: plain(*a, **k).skip(consumed, count)
