"""Protects the number of threads that torch has after models of rules have computed."""

from __future__ import annotations

import threading

import torch

from megatron_lcl.curate.threads import one_thread


def test_calls_that_overlap_leave_the_number_of_threads() -> None:
    second_began, first_ended = threading.Event(), threading.Event()
    used: list[int] = []

    def first() -> None:
        with one_thread():
            other.start()
            second_began.wait(0.2)  # in vain, where the second waits for this one
            used.append(torch.get_num_threads())
        first_ended.set()

    def second() -> None:
        with one_thread():
            second_began.set()
            assert first_ended.wait(60)
            used.append(torch.get_num_threads())

    before, other = torch.get_num_threads(), threading.Thread(target=second)
    torch.set_num_threads(3)
    try:
        one = threading.Thread(target=first)
        one.start()
        one.join(60)
        other.join(60)
        afterwards = threading.Thread(target=lambda: used.append(torch.get_num_threads()))
        afterwards.start()
        afterwards.join(60)
    finally:
        torch.set_num_threads(before)
    assert used == [1, 1, 3]
