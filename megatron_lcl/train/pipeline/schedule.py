"""What each part of a pipeline does in which order, and what that costs in idle time, graphs kept and bytes sent.

Two orders serve a contrast over the global batch. `retain`: AllForward, the loss, AllBackward. `recompute`: AllForward
without graphs, the loss, then DeepSpeed's TrainSchedule (1F1B: Narayanan et al. 2021, PipeDream-Flush), which is also
what an objective without a contrast runs.

S parts, M micro-batches, F and B the time of one part's forward and backward; what every part does counts as work,
the rest of the time until the last part is done as idle. M need not be a multiple of S and may be smaller.

                 time of a step             idle time of each part
    1F1B         (M + S - 1)(F + B)         (S - 1)(F + B)
    retain       (M + S - 1)(F + B)         (S - 1)(F + B)
    recompute    M F + (M + S - 1)(F + B)   (S - 1)(F + B)

`recompute` has no second bubble: a part goes on to its second forwards while later parts are still in their first.
A part keeps the graphs of M micro-batches in `retain`, of at most min(S - part, M) otherwise (parts count from 0).
Over every cut goes one tensor per micro-batch and forward, the hidden rows (see `cuts.hidden_shape`), and their
gradient back: 2 M of them in a step, in `recompute` 3 M.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from megatron_lcl.config import Config


class AllForward(PipeSchedule):
    """Every micro-batch's forward, in order; its result stays in a buffer of its own."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for m in range(self.micro_batches):
            receive = [] if self.is_first_stage else [schedule.RecvActivation(m)]
            send = [] if self.is_last_stage else [schedule.SendActivation(m)]
            yield [*receive, schedule.ForwardPass(m), *send]


class AllBackward(PipeSchedule):
    """After AllForward: every micro-batch's backward, in the same order, and the optimizer step."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for m in range(self.micro_batches):
            receive = [] if self.is_last_stage else [schedule.RecvGrad(m)]
            send = [] if self.is_first_stage else [schedule.SendGrad(m)]
            yield [*receive, schedule.BackwardPass(m), *send]
        yield [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]


ORDERS: dict[str, tuple[type[PipeSchedule], ...]] = {
    "1F1B": (schedule.TrainSchedule,),
    "retain": (AllForward, AllBackward),
    "recompute": (AllForward, schedule.TrainSchedule),
}


def instructions(order: str, parts: int, micro_batches: int) -> list[list[PipeInstruction]]:
    """What each part does in a step, flat."""
    return [
        [
            instruction
            for kind in ORDERS[order]
            for step in kind(micro_batches, parts, part).steps()
            for instruction in step
        ]
        for part in range(parts)
    ]


def order_of(config: Config) -> str:
    """The order that a config asks for."""
    return config.contrast.strategy if config.objective.name != "generation" else "1F1B"


def simulate(
    of_part: Sequence[Sequence[PipeInstruction]], forward: float, backward: float
) -> tuple[float, list[float]]:
    """When the last part is done, and how long each was idle, if nothing but the order holds anybody up.

    of_part: as `instructions` gives them. A message arrives at once and may wait. AssertionError for an order in which
    parts wait for each other forever.
    """
    takes = {schedule.ForwardPass: forward, schedule.BackwardPass: backward}
    sent: dict[tuple[int, type], list[float]] = {}
    """times at which messages left, by (part they go to, what that part waits with)"""
    clock, place, worked = [0.0] * len(of_part), [0] * len(of_part), [0.0] * len(of_part)
    received = {key: 0 for part in range(len(of_part)) for key in _inboxes(part)}
    moved = True
    while moved:
        moved = False
        for part, todo in enumerate(of_part):
            while place[part] < len(todo):
                kind = type(todo[place[part]])
                if kind in (schedule.RecvActivation, schedule.RecvGrad):
                    inbox = sent.get((part, kind), [])
                    if received[part, kind] == len(inbox):
                        break
                    clock[part] = max(clock[part], inbox[received[part, kind]])
                    received[part, kind] += 1
                elif kind is schedule.SendActivation:
                    sent.setdefault((part + 1, schedule.RecvActivation), []).append(clock[part])
                elif kind is schedule.SendGrad:
                    sent.setdefault((part - 1, schedule.RecvGrad), []).append(clock[part])
                clock[part] += takes.get(kind, 0.0)
                worked[part] += takes.get(kind, 0.0)
                place[part] += 1
                moved = True
    assert all(p == len(todo) for p, todo in zip(place, of_part, strict=True)), "the parts wait for each other"
    end = max(clock)
    return end, [end - w for w in worked]


def _inboxes(part: int) -> list[tuple[int, type]]:
    return [(part, schedule.RecvActivation), (part, schedule.RecvGrad)]
