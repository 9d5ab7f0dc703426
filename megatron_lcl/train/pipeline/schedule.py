"""What each stage of a pipeline does in which order, and what that costs in idle time, graphs kept and bytes sent.

Two strategies serve a contrast over the global batch. `retain`: AllForward, the loss, AllBackward. `recompute`:
AllForward without graphs, the loss, then DeepSpeed's TrainSchedule (1F1B: Narayanan et al. 2021, PipeDream-Flush),
which is also what an objective without a contrast runs.

S stages, M micro-batches, F and B the time of one stage's forward and backward; what every stage does counts as
work, the rest of the time until the last stage is done as idle. M need not be a multiple of S and may be smaller.

                 time of a step             idle time of each stage
    1F1B         (M + S - 1)(F + B)         (S - 1)(F + B)
    retain       (M + S - 1)(F + B)         (S - 1)(F + B)
    recompute    M F + (M + S - 1)(F + B)   (S - 1)(F + B)

`recompute` has no second bubble: a stage goes on to its second forwards while later stages are still in their first.
A stage keeps the graphs of M micro-batches in `retain`, of at most min(S - stage, M) otherwise (stages count from 0).
Between two stages goes one tensor per micro-batch and forward, the hidden rows (see `partition.hidden_shape`), and
their gradient back: 2 M of them in a step, in `recompute` 3 M.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule


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
