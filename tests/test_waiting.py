"""Waiting for an event, whatever becomes of the clock."""

from __future__ import annotations

import threading
import time

import pytest
from clocks import set_back

from megatron_lcl.waiting import wait_for


def test_a_wait_ends_though_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    set_back(monkeypatch)
    began = time.monotonic()
    assert not wait_for(threading.Event(), 0.02)
    assert time.monotonic() - began >= 0.02


def test_a_wait_ends_with_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    event, slept = threading.Event(), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            event.set()

    monkeypatch.setattr(time, "sleep", sleep)
    assert wait_for(event, 60.0)
    assert slept == [0.2] * 3
    assert wait_for(event, 60.0)
    assert len(slept) == 3, "it is set"
