"""Clocks that are set while something waits."""

from __future__ import annotations

import threading

import pytest


def set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what waits for so many seconds for a thread waits for a minute more, as in a Python without
    `sem_clockwait` when the clock is set back by a minute."""
    wait = threading.Condition.wait

    def longer(self: threading.Condition, timeout: float | None = None) -> bool:
        return wait(self, None if timeout is None else timeout + 60)

    monkeypatch.setattr(threading.Condition, "wait", longer)
