"""Of which processes a hang is said to be, by what they have published."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.resilience.watchdog import Fault, State, Watchdog

WATCHDOG = Watchdog(Axis(rank=0, size=2), 60.0, 90.0)
SHORT, LONG = WATCHDOG.limit, WATCHDOG.long_limit
LATE: dict[str, Any] = {
    "location": "mesh.py:1 in wait", "with_others": True, "waiting": LONG + 1.0, "limit": LONG, "num_published": 1,
}  # fmt: skip


def hang_of(first: dict[str, Any], second: dict[str, Any]) -> Fault | None:
    """Of two processes that differ so from `LATE`."""
    watchdog = Watchdog(Axis(rank=0, size=2), 60.0, 90.0)
    watchdog._state = State(**LATE | first)
    now = watchdog._now()
    return watchdog._hang({1: (State(**LATE | second), now)}, now)


@pytest.mark.parametrize(
    ("first", "second", "setting"),
    [
        ({}, {}, "guard.long_timeout = 90 s"),
        ({}, {"limit": SHORT}, "guard.timeout = 60 s"),
        ({"limit": SHORT}, {}, "guard.timeout = 60 s"),
        ({"limit": SHORT, "waiting": 1.0}, {}, "guard.long_timeout = 90 s"),
    ],
)
def test_the_setting_is_that_of_the_first_that_is_late(
    first: dict[str, Any], second: dict[str, Any], setting: str
) -> None:
    fault = hang_of(first, second)
    assert fault is not None
    assert f"({setting}; raise it" in fault.message


def test_of_two_that_are_in_their_own_code_the_one_behind_is_named() -> None:
    """By collectives, as where all wait for their devices."""
    own = {"with_others": False, "doing": "computing"}
    fault = hang_of({**own, "sequences": {"g": 3}}, {**own, "sequences": {"g": 2}, "host": "gpu7"})
    assert fault is not None
    assert fault.message.startswith("process 1 hangs while computing")
    assert fault.nodes == ["gpu7"]


@pytest.mark.parametrize("second", [{"error": "RuntimeError: x"}, {"ended": True}])
def test_who_ends_does_not_hang(second: dict[str, Any]) -> None:
    """Nor do the others, while they wait for one that has met an error to end."""
    assert hang_of({"waiting": 1.0}, second) is None
    assert (hang_of({}, second) is None) is ("error" in second)
