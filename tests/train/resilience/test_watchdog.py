"""The watchdog of one process: its limits, what it asks the store, whom it names; with other processes:
test_lost_processes.py."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from clocks import set_back
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl.data.corpus.files import sync
from megatron_lcl.parallel.mesh import Axis, Pending
from megatron_lcl.train.launch import WATCHED
from megatron_lcl.train.launch_store import exchange_in_store
from megatron_lcl.train.resilience import watchdog as watchdogs
from megatron_lcl.train.resilience.lock import SEEN_SECONDS
from megatron_lcl.train.resilience.watchdog import Watchdog, suspects


@pytest.mark.parametrize("size", [2, 64, 256, 4096])
@pytest.mark.parametrize("timeout", [10.0, 28.0, 600.0])
def test_at_any_size_a_step_may_take_half_the_timeout(size: int, timeout: float) -> None:
    watchdog = Watchdog(Axis(size=size), timeout, 10.0)
    assert timeout / 2 <= watchdog.limit <= watchdog.long_limit < timeout
    assert watchdog.limit + 7 * watchdog.publish_period == pytest.approx(timeout)


class CountingStore:
    """A store in which all have published but those of `missing`; every question takes a second of `now`."""

    def __init__(self, missing: set[int]) -> None:
        self.missing, self.now, self.questions, self.read = missing, 1000.0, 0, 0
        self.contacts: list[float] = []

    def check(self, keys: list[str]) -> bool:
        self.now += 1.0
        self.questions += 1
        return not self.missing & {int(key.rpartition("/")[2]) for key in keys}

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.now += 1.0
        self.read = len(keys)
        return [b'{"num_published": 1}'] * len(keys)

    def set(self, key: str, value: str) -> None:
        pass


def test_many_processes_ask_the_store_few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all others; where one of them has published nothing, two for each halving; none for what is known."""
    store = CountingStore({1234})
    watchdog = Watchdog(Axis(rank=7, size=4096), 600.0, 600.0, store=store)  # type: ignore[arg-type]
    monkeypatch.setattr(watchdogs.time, "monotonic", lambda: store.now)

    def turn() -> tuple[int, int]:
        store.questions = 0
        with patch.object(watchdogs, "wait_for", side_effect=[False, True]):
            watchdog._publish_and_read()
        return store.questions, store.read

    questions, read = turn()
    assert questions <= 1 + 2 * 12, "log2 of 4,096 halvings"
    assert read == 4094, "all but itself and the one that is missing"
    assert turn() == (1, 4094)
    store.missing.clear()
    assert turn() == (1, 4095)
    assert turn() == (0, 4095)
    all_there = Watchdog(Axis(rank=7, size=4096), 600.0, 600.0, store=store)  # type: ignore[arg-type]
    with patch.object(watchdogs, "wait_for", side_effect=[False, True]):
        all_there._publish_and_read()
    assert store.questions == 1


def test_a_store_that_answers_slowly_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is a sign of life of the server, though the others' states are not there yet."""
    store = CountingStore(set(range(0, 4096, 2)))
    watchdog = Watchdog(Axis(rank=7, size=4096), 600.0, 600.0, store=store)  # type: ignore[arg-type]
    monkeypatch.setattr(watchdogs.time, "monotonic", lambda: store.now)
    watchdog._last_contact = watchdog._last_read = store.now
    watchdog._since = store.now, 1e9
    watchdog._others[1] = watchdogs.State(), store.now
    faults, check = [], store.check

    def look(keys: list[str]) -> bool:
        faults.append(watchdog._fault())
        return check(keys)

    with patch.object(store, "check", look), patch.object(watchdogs, "wait_for", side_effect=[False, True]):
        watchdog._publish_and_read()
    assert len(faults) > 2 * watchdog.limit, "seconds"
    assert set(faults) == {None}


def test_who_waits_in_a_collective_waits_for_others() -> None:
    """Also where torch waits in code that has no frame of its own."""
    found = []

    class Work:
        def wait(self) -> None:
            asking = threading.Thread(target=lambda: found.append(watchdogs._location()))
            asking.start()
            asking.join()

    Pending(torch.ones(1), Work()).wait()
    ((location, with_others),) = found
    assert re.fullmatch(r"mesh\.py:\d+ in wait", location)
    assert with_others


def asks_where_it_joins(
    there: threading.Event, go_on: threading.Event, found: list[tuple[str, bool]]
) -> threading.Thread:
    """A thread that, once `there` is set and the main thread joins another one, adds the place where that is said to
    be, and sets `go_on`."""

    def ask() -> None:
        there.wait(60.0)
        main = threading.main_thread().ident or 0
        while "join" not in [frame.name for frame in traceback.extract_stack(sys._current_frames()[main])]:
            time.sleep(0.001)
        found.append(watchdogs._location())
        go_on.set()

    asking = threading.Thread(target=ask)
    asking.start()
    return asking


@pytest.mark.parametrize("with_others", [False, True])
def test_who_waits_for_a_thread_is_where_that_is(
    with_others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a save in the background that takes long is told from one that waits for another process's."""
    there, found, go_on = threading.Event(), list[tuple[str, bool]](), threading.Event()

    def slow(_file: int = 0) -> None:
        there.set()
        assert go_on.wait(60.0)

    monkeypatch.setattr(os, "fsync", slow)
    pending = Pending(torch.ones(1), SimpleNamespace(wait=slow))
    asking = asks_where_it_joins(there, go_on, found)
    writing = threading.Thread(target=pending.wait if with_others else partial(sync, tmp_path))
    writing.start()
    writing.join()
    asking.join()
    ((location, waits),) = found
    assert re.fullmatch(r"mesh\.py:\d+ in wait" if with_others else r"files\.py:\d+ in sync", location)
    assert waits is with_others


def test_a_place_is_the_innermost_function_of_the_package() -> None:
    """That of the main thread, where the one for which it waits there is in none."""
    there, go_on, found = threading.Event(), threading.Event(), list[tuple[str, bool]]()
    idle = threading.Thread(target=go_on.wait, args=(60.0,))

    def check(_keys: list[str]) -> bool:
        idle.start()
        there.set()
        idle.join()
        return True

    def wait(*_: object) -> None:
        raise dist.DistStoreError

    store: Any = SimpleNamespace(set=lambda *_: None, wait=wait, check=check, multi_get=lambda keys: [b""] * len(keys))
    asking = asks_where_it_joins(there, go_on, found)
    exchange_in_store(store, "key", 0, range(2), "", 9.0)
    asking.join()
    ((location, with_others),) = found
    assert re.fullmatch(r"launch_store\.py:\d+ in keys_set", location)
    assert not with_others


@pytest.mark.parametrize(("depth", "waits"), [(0, True), (9, False)])
def test_who_was_called_by_torch_long_before_does_not_wait_in_it(depth: int, waits: bool) -> None:
    torchs: dict[str, Callable[..., Any]] = {}
    exec(compile("def call(function, *given): return function(*given)", "/torch/distributed/of.py", "exec"), torchs)

    def deeper(left: int) -> tuple[str, bool]:
        return deeper(left - 1) if left else watchdogs._location()

    assert torchs["call"](deeper, depth)[1] is waits


def test_the_launcher_hears_that_a_run_of_one_process_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """It killed it at a signal, and nothing was saved."""
    heard, say = os.pipe()
    os.set_blocking(heard, False)
    monkeypatch.setenv(WATCHED, str(say))
    with Watchdog(Axis(size=1), 60.0, 60.0):
        assert os.read(heard, 99) == b"60.0 "
    os.close(heard)
    os.close(say)


def test_who_is_waited_for() -> None:
    assert suspects({0: {"world": 7}, 1: {"world": 6}, 2: {"world": 7}}) == [1]
    assert suspects({0: {"world": 7}, 1: {"world": 7}}) == []
    # 3 waits for 2 in their stage, 2 for 1 in theirs: 1 is the cause
    chain = {0: {"a": 4, "x": 9}, 1: {"a": 3, "y": 5}, 2: {"b": 3, "y": 6}, 3: {"b": 4, "x": 9}}
    assert suspects(chain) == [1]


@given(st.integers(2, 9), st.integers(0, 8), st.integers(1, 99))
def test_whoever_stops_first_is_named(size: int, faulty: int, count: int) -> None:
    """The others each stop at the next collective of a ring of groups that ends at the faulty one."""
    order = [(faulty + i) % size for i in range(size)]
    groups: dict[int, dict[str, int]] = {rank: {} for rank in order}
    for before, after in itertools.pairwise(order):
        groups[before][f"{before}-{after}"], groups[after][f"{before}-{after}"] = count, count + 1
    assert suspects(groups) == [order[0]]


@pytest.mark.parametrize(
    ("silent", "said"),
    [
        (4.0, "process 1 died or its machine did: silent for 4 s"),
        (2.0, " s in 1 process, and none is behind the others"),
    ],
)
def test_of_two_that_wait_the_silent_one_is_named(monkeypatch: pytest.MonkeyPatch, silent: float, said: str) -> None:
    """It was stopped in a collective soon after that began: nobody is behind, and the other is late before it."""
    now = 1000.0
    monkeypatch.setattr(watchdogs.time, "monotonic", lambda: now)
    watchdog = Watchdog(Axis(rank=0, size=2), 60.0, 60.0)
    waiting = {"doing": "computing", "location": "step.py:1 in run", "with_others": True, "sequences": {"world": 7}}
    watchdog._state = watchdogs.State(host="gpu7", waiting=watchdog.limit + 0.5, limit=watchdog.limit, **waiting)
    other = watchdogs.State(host="gpu8", waiting=watchdog.limit - silent, limit=watchdog.limit, **waiting)
    watchdog._others[1] = other, now - silent
    fault = watchdog._fault()
    assert fault is not None
    assert said in fault.message
    assert fault.nodes == (["gpu8"] if silent > 3 else [])


@pytest.mark.parametrize("with_others", [False, True])
@pytest.mark.parametrize(
    ("phase", "settings", "named"),
    [
        ("saving", {}, "(guard.long_timeout = 90 s; raise it if this is only slow)"),
        ("computing", {}, "(guard.timeout = 60 s; raise it if this is only slow)"),
        ("saving", {"long_timeout": 30.0}, "(guard.timeout = 60 s; raise it if this is only slow)"),
        ("saving", {"settings": ("--timeout", "--wait")}, "(--wait = 90 s; raise it if this is only slow)"),
    ],
)
def test_a_hang_says_which_setting_is_its_limit(
    phase: str, settings: dict[str, Any], named: str, with_others: bool
) -> None:
    """What is only slow looks the same. with_others: both wait, else one for a file."""
    watchdog = Watchdog(Axis(rank=0, size=2), **{"timeout": 60.0, "long_timeout": 90.0, **settings})
    limit = watchdog.long_limit if phase == "saving" else watchdog.limit
    own = {"doing": phase, "location": "mesh.py:1 in wait", "with_others": True, "waiting": limit + 1.0, "limit": limit}
    watchdog._state = watchdogs.State(**own)
    other = watchdogs.State(**{**own, "with_others": with_others})
    now = watchdog._now()
    fault = watchdog._hang({1: (other, now)}, now)
    assert fault is not None
    assert fault.message.endswith(named)
    assert ("process 1 hangs" in fault.message) is not with_others


class Process:
    """One process of three, the last, whose watchdog watches and reads by a clock of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.gone, self.silent, self.late = 1000.0, False, False, 0
        monkeypatch.setattr(watchdogs.time, "monotonic", lambda: self.now)
        self.watchdog = Watchdog(Axis(rank=2, size=3), 12.0, 60.0, store=self)  # type: ignore[arg-type]
        self.watchdog.heartbeat(0, "starting")
        self.watchdog.heartbeat(1, "computing")
        self.states = {rank: watchdogs.State(host=f"gpu{rank}", limit=self.watchdog.limit) for rank in (0, 1)}
        self.published: dict[str, Any] = {}

    def check(self, keys: list[str]) -> bool:
        return True

    def multi_get(self, keys: list[str]) -> list[str]:
        if self.late:
            self.late -= 1
            raise dist.DistStoreError("wait timeout after 600000ms")
        for state in self.states.values():
            state.num_published += not self.silent
        return [json.dumps(vars(self.states[int(key.rpartition("/")[2])])) for key in keys]

    def set(self, key: str, value: str) -> None:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        self.published = json.loads(value)

    def run(self, seconds: float, stop: Callable[[], bool] = lambda: True) -> watchdogs.Fault | None:
        """The first fault that it sees in so many seconds. stop: called after the first turn of the thread that reads;
        whether the other thread is the next to run."""
        end, faults, turns = self.now + seconds, [], 0

        def wait(_closing: object = None, _seconds: float = 0.0) -> bool:
            nonlocal turns
            turns += 1
            if turns == 2 and not stop():
                return False
            faults.append(self.watchdog._fault())
            self.now += self.watchdog.period
            faults.append(self.watchdog._fault())
            return any(faults) or self.now >= end

        with patch.object(watchdogs, "wait_for", wait):
            self.watchdog._publish_and_read()
            while not wait():
                pass
        return next(filter(None, faults), None)


@pytest.mark.parametrize(("long_timeout", "room"), [(90.0, True), (30.0, False)])
def test_time_that_is_left_to_wait(monkeypatch: pytest.MonkeyPatch, long_timeout: float, room: bool) -> None:
    """At the start, where there is room, as long as another machine may not see a new lock file; then no hang is seen,
    and not much later one is."""
    process = Process(monkeypatch)
    process.watchdog = watchdog = Watchdog(Axis(rank=2, size=3), 30.0, long_timeout, store=process)  # type: ignore[arg-type]
    assert (watchdog.left() > SEEN_SECONDS) is room
    assert process.run(5.0) is None
    assert process.run(watchdog.left()) is None
    assert -watchdog.period <= watchdog.left() <= 0
    assert process.run(10 * watchdog.period) is not None


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("waiting", "stopped", "nodes", "said"),
    [
        (6.8, 3.2, ["gpu1"], "process 1 hangs while reading data at loader.py:1 in batches"),
        (6.8, 30.0, ["gpu1"], "process 1 hangs while reading data at loader.py:1 in batches"),
        (1.0, 3.2, ["gpu0"], "process 0 or the launcher, which serve the store, are gone"),
        (1.0, 30.0, [], "process 0 or the launcher, which serve the store, are gone"),
    ],
)
def test_who_was_stopped_while_the_others_ended(
    waiting: float, stopped: float, nodes: list[str], said: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names who hung by the states that it read last; process 0 where nobody did, but no node where the others may
    have ended for its own silence. fails: its collective, too, as with gloo."""
    process = Process(monkeypatch)
    long = waiting > process.watchdog.limit / 2
    for rank, state in process.states.items():
        state.waiting, state.with_others = waiting, long and rank == 0
        state.doing, where = (
            ("computing", "mesh.py:1 in wait") if rank == 0 else ("reading data", "loader.py:1 in batches")
        )
        state.location = where if long else ""

    def stop() -> bool:
        process.gone = True
        process.now += stopped
        if fails:
            process.watchdog._suspicious = True
            process.watchdog._set_phase("computing; a collective has failed", math.inf)
        return True

    fault = process.run(stopped + process.watchdog.limit + 2 * process.watchdog.publish_period, stop)
    assert fault is not None
    assert said in fault.message
    assert fault.nodes == nodes


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("watches_first", [False, True])
def test_a_job_that_was_stopped_as_a_whole_goes_on(
    watches_first: bool, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time in which a process was stopped counts nowhere, and the others may go on later than it does; also the one
    that serves the store, whose limit is by the clock of the system."""
    process = Process(monkeypatch)

    def stop() -> bool:
        process.now += 600.0
        process.silent, process.late = True, late
        return watches_first

    assert process.run(600.0 + 4.2, stop) is None
    assert not process.watchdog._unread, "it takes the store for gone"
    assert process.published["waiting"] < process.watchdog.limit
    process.silent = False
    process.watchdog.heartbeat(2, "computing")
    assert process.run(6.0) is None
    process.silent = True  # from now on they are dead
    with process.watchdog.long_phase(2, "saving"):
        fault = process.run(process.watchdog.limit + 2 * process.watchdog.publish_period)
    assert fault is not None
    assert "process 0 died or its machine did: silent for 8 s" in fault.message


@pytest.mark.timeout(60)
def test_it_watches_on_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    set_back(monkeypatch)
    looked, published = threading.Semaphore(0), threading.Semaphore(0)
    store: Any = SimpleNamespace(
        set=lambda *_: published.release(), check=lambda _: False, multi_get=lambda _: [], clone=lambda: store
    )
    watchdog = Watchdog(Axis(rank=0, size=2), 60.0, 60.0, store=store)
    watchdog.period = watchdog.publish_period = 0.001
    monkeypatch.setattr(watchdog, "_fault", lambda: looked.release())
    with watchdog:
        for _ in range(3):
            looked.acquire()
            published.acquire()


@pytest.mark.timeout(60)
def test_a_collective_that_failed_is_waited_for_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    set_back(monkeypatch)
    watchdog = Watchdog(Axis(rank=0, size=2), 60.0, 60.0, store=SimpleNamespace(set=lambda *_: None))  # type: ignore[arg-type]
    watchdog.limit = watchdog.publish_period = 0.001
    watchdog.__exit__(dist.DistBackendError, dist.DistBackendError("a peer is gone"), None)
    assert watchdog._suspicious


def test_a_clock_that_is_looked_at_in_time_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(watchdogs.time, "monotonic", lambda: now)
    clock = watchdogs.RunningTime(2.0)
    begin = clock()
    for step in (0.5, 2.0, 1.0, 0.0):
        now += step
        assert clock() - begin == pytest.approx(now - 1000.0)
    now += 600.0
    assert clock() - begin == pytest.approx(3.5 + 2.0)
