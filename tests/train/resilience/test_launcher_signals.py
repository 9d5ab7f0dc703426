"""What the launcher does with signals, by processes that note what they are sent."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lcl.train import launch


class Child:
    """A process that SIGTERM ends with 5, and SIGKILL."""

    def __init__(self, returncode: int | None = None) -> None:
        self.returncode, self.signals = returncode, list[int]()

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, signum: int) -> None:
        self.signals.append(signum)
        self.returncode = {signal.SIGTERM: 5, signal.SIGKILL: -signal.SIGKILL}.get(signum, self.returncode)  # type: ignore[call-overload]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The launcher's wait for children at a list of signals, which `watched` says whether they take themselves."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        assert clock[0] < 3600, "it waits for ever"

    monkeypatch.setattr(launch, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    reader, writer = os.pipe()
    monkeypatch.setenv(launch.WATCHED, str(writer))

    def begin(children: list[Any], came: list[int], watched: bool) -> int:
        if watched:
            launch.say_watched(9.0)
        return launch._wait("megatron-lcl train", children, launch._Heard(reader), came)

    yield begin
    os.close(reader)
    os.close(writer)


def test_who_watches_is_given_all_signals_in_order(
    wait: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    children = [Child(), Child(), Child(0)]
    assert wait(children, [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM], watched=True) == 5
    sent = [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM]
    assert [child.signals for child in children] == [sent, sent, []]
    assert capsys.readouterr().err == ""


def test_who_does_not_watch_is_ended_at_the_first_signal(
    wait: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is said, and not that they were killed for it."""
    children = [Child(), Child()]
    assert wait(children, [signal.SIGINT, signal.SIGHUP], watched=False) == 128 + signal.SIGINT
    assert [child.signals[0] for child in children] == [signal.SIGKILL] * 2
    assert capsys.readouterr().err == "megatron-lcl train: SIGINT: stopped; the same command goes on\n"


@pytest.mark.parametrize("watched", [False, True])
def test_a_signal_after_the_end_changes_nothing(
    wait: Callable[..., int], watched: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wait([Child(0), Child(0)], [signal.SIGTERM], watched) == 0
    assert capsys.readouterr().err == ""
