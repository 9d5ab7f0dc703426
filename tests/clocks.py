"""Clocks that are set while something waits."""

from __future__ import annotations

import threading

import pytest


def set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what waits for so many seconds for a thread waits on and on, as in a Python without `sem_clockwait`
    when the clock is set back."""
    wait = threading.Condition.wait
    monkeypatch.setattr(threading.Condition, "wait", lambda self, timeout=None: wait(self))
