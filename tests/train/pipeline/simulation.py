"""A step of a pipeline simulated: when each stage works, waits and is done, from its instructions alone."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from megatron_lcl.train.pipeline.schedule import AllBackward, AllForward

ORDERS: dict[str, tuple[type[PipeSchedule], ...]] = {
    "1F1B": (schedule.TrainSchedule,),
    "retain": (AllForward, AllBackward),
    "recompute": (AllForward, schedule.TrainSchedule),
}


def instructions(order: str, stages: int, micro_batches: int) -> list[list[PipeInstruction]]:
    """What each stage does in a step, flat."""
    return [
        [
            instruction
            for kind in ORDERS[order]
            for step in kind(micro_batches, stages, stage).steps()
            for instruction in step
        ]
        for stage in range(stages)
    ]


def simulate(
    of_stage: Sequence[Sequence[PipeInstruction]], forward: float, backward: float
) -> tuple[float, list[float]]:
    """When the last stage is done, and how long each was idle, if nothing but the order holds anybody up.

    of_stage: as `instructions` gives them. A message arrives at once and may wait. AssertionError for an order in which
    stages wait for each other forever.
    """
    takes = {schedule.ForwardPass: forward, schedule.BackwardPass: backward}
    sent: dict[tuple[int, type], list[float]] = {}
    """times at which messages left, by (stage they go to, what that stage waits with)"""
    clock, place, worked = [0.0] * len(of_stage), [0] * len(of_stage), [0.0] * len(of_stage)
    received = {key: 0 for stage in range(len(of_stage)) for key in _inboxes(stage)}
    moved = True
    while moved:
        moved = False
        for stage, todo in enumerate(of_stage):
            while place[stage] < len(todo):
                kind = type(todo[place[stage]])
                if kind in (schedule.RecvActivation, schedule.RecvGrad):
                    inbox = sent.get((stage, kind), [])
                    if received[stage, kind] == len(inbox):
                        break
                    clock[stage] = max(clock[stage], inbox[received[stage, kind]])
                    received[stage, kind] += 1
                elif kind is schedule.SendActivation:
                    sent.setdefault((stage + 1, schedule.RecvActivation), []).append(clock[stage])
                elif kind is schedule.SendGrad:
                    sent.setdefault((stage - 1, schedule.RecvGrad), []).append(clock[stage])
                clock[stage] += takes.get(kind, 0.0)
                worked[stage] += takes.get(kind, 0.0)
                place[stage] += 1
                moved = True
    assert all(p == len(todo) for p, todo in zip(place, of_stage, strict=True)), "the stages wait for each other"
    end = max(clock)
    return end, [end - w for w in worked]


def _inboxes(stage: int) -> list[tuple[int, type]]:
    return [(stage, schedule.RecvActivation), (stage, schedule.RecvGrad)]
