"""Orders of a pipeline against closed forms, and that nobody waits forever."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe import schedule
from hypothesis import given
from hypothesis import strategies as st
from simulation import ORDERS, instructions, simulate

SIZES = {"order": st.sampled_from(list(ORDERS)), "stages": st.integers(1, 9), "micro_batches": st.integers(1, 14)}
SENDS = {schedule.SendActivation: (1, schedule.RecvActivation), schedule.SendGrad: (-1, schedule.RecvGrad)}


@given(**SIZES, forward=st.integers(1, 9), backward=st.integers(1, 9))
def test_time_and_idle_time(order: str, stages: int, micro_batches: int, forward: int, backward: int) -> None:
    end, idle = simulate(instructions(order, stages, micro_batches), forward, backward)
    first_pass = micro_batches * forward if order == "recompute" else 0
    assert end == first_pass + (micro_batches + stages - 1) * (forward + backward)
    assert idle == [(stages - 1) * (forward + backward)] * stages


@given(**SIZES)
def test_every_stage_does_each_micro_batch_in_order(order: str, stages: int, micro_batches: int) -> None:
    for stage, todo in enumerate(instructions(order, stages, micro_batches)):
        passes = 2 if order == "recompute" else 1
        counts = {kind: sum(type(x) is kind for x in todo) for kind in {type(x) for x in todo}}
        assert counts[schedule.ForwardPass] == passes * micro_batches
        assert counts[schedule.BackwardPass] == micro_batches
        assert counts.get(schedule.SendActivation, 0) == passes * micro_batches * (stage < stages - 1)
        assert counts.get(schedule.SendGrad, 0) == micro_batches * (stage > 0)
        assert counts[schedule.OptimizerStep] == 1
        assert type(todo[-1]) is schedule.OptimizerStep


@given(**SIZES)
def test_messages_that_are_handed_over_in_person_block_nobody(order: str, stages: int, micro_batches: int) -> None:
    """As with NCCL for large tensors: a send ends when the other side receives, and receives nothing else before."""
    left = [
        [x for x in todo if type(x) in SENDS or type(x) in (schedule.RecvActivation, schedule.RecvGrad)]
        for todo in instructions(order, stages, micro_batches)
    ]
    moved = True
    while moved:
        moved = False
        for stage, todo in enumerate(left):
            if todo and type(todo[0]) in SENDS:
                step, kind = SENDS[type(todo[0])]
                other = left[stage + step]
                if other and type(other[0]) is kind:
                    del todo[0], other[0]
                    moved = True
    assert not any(left)


def test_stages_that_wait_for_each_other_are_seen() -> None:
    waits = [schedule.RecvGrad(0), schedule.SendActivation(0)], [schedule.RecvActivation(0), schedule.SendGrad(0)]
    with pytest.raises(AssertionError, match="wait for each other"):
        simulate(waits, 1, 1)
