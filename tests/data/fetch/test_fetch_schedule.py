"""Whose turn it is, without a network: how many at a time of a host, and how long between."""

from __future__ import annotations

import asyncio
import itertools
import random
import selectors
from collections import Counter

import pytest

from megatron_lcl.data.fetch.schedule import Host, Job, Schedule, pause_before
from megatron_lcl.data.fetch.settings import Settings


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while it waits, and then at once: starts are compared to the last digit."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(selectors.SelectSelector())
        self._wait, self._selector.select = self._selector.select, self.select  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return self._wait(0 if timeout is not None else None)


async def nothing() -> None:
    pass


def run(
    settings: Settings, parts: list[dict[str, int]], seconds: float = 0.01
) -> tuple[list[tuple[str, float]], Counter]:
    """(host, start) of every attempt, and the most at a time by host ("": of all). parts: URLs of each host."""
    starts: list[tuple[str, float]] = []
    active: Counter[str] = Counter()
    most: Counter[str] = Counter()
    waiting = iter(parts)
    ended: Counter[int] = Counter()

    def open_part() -> bool:
        part = next(waiting, None)
        if part is None:
            return False
        number = parts.index(part)
        ended[number] = sum(part.values())
        schedule.open_parts += 1
        for host, count in part.items():
            for k in range(count):
                schedule.add(Job(f"{host}/{k}", number), host)
        return True

    async def attempt(job: Job[int]) -> float | None:
        for name in (job.host.name, ""):
            active[name] += 1
            most[name] = max(most[name], active[name])
        starts.append((job.host.name, asyncio.get_running_loop().time()))
        await asyncio.sleep(seconds)
        for name in (job.host.name, ""):
            active[name] -= 1
        if job.url.endswith("/1") and not job.tries:
            return 0.01
        ended[job.part] -= 1
        if not ended[job.part]:
            schedule.open_parts -= 1
        return None

    schedule = Schedule[int](settings, open_part, attempt, nothing)
    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(schedule.run())
    assert not any(ended.values())
    assert not schedule._hosts
    assert not schedule._pending
    return starts, most


def test_requests_at_a_time() -> None:
    settings = Settings(concurrency=10, per_host=3, delay=0.0)
    starts, most = run(settings, [{"a": 30, "b": 30}, {"c": 30, "d": 30, "e": 1}])
    assert len(starts) == 121 + 4
    assert most == {"a": 3, "b": 3, "c": 3, "d": 3, "e": 1, "": 10}


def test_delay() -> None:
    starts, most = run(Settings(concurrency=10, per_host=3, delay=0.05), [{"a": 6, "b": 6}], seconds=0.12)
    for host in "ab":
        times = [start for name, start in starts if name == host]
        assert len(times) == 7
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert min(gaps) >= 0.05 - 1e-9
        assert gaps[0] >= 0.12 - 1e-9  # nothing is known of a host before its first answer
    assert most[""] >= 3


def test_slow_host_holds_up_nothing() -> None:
    """One part's host may have one request at a time: the next parts are opened meanwhile."""
    starts, _ = run(Settings(concurrency=8, per_host=1, delay=0.05), [{"slow": 8}, {"b": 1}, {"c": 1}])
    assert [host for host, _ in starts[:3]] == ["slow", "b", "c"]


def test_parts_are_opened_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lcl.data.fetch.schedule.MAX_OPEN_URLS", 3)
    starts, most = run(Settings(concurrency=8, per_host=1, delay=0.0), [{"a": 5}, {"b": 1}, {"c": 1}])
    assert [host for host, _ in starts[:2]] == ["a", "a"]
    assert most[""] <= 3


def test_the_longest_wait_that_is_asked_for_is_kept() -> None:
    async def next_start() -> float:
        schedule, host = Schedule[int](Settings(), lambda: False, lambda _: nothing(), nothing), Host[int]("a", 0.0)
        for seconds in (5.0, 100.0, 1.0):
            schedule.postpone(host, seconds)
        return host.next_start

    with asyncio.Runner(loop_factory=Clock) as runner:
        assert runner.run(next_start()) == 100


def test_pauses_are_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 1.0)
    assert [pause_before(tries, Settings(backoff=3.0)) for tries in (1, 2, 3)] == [3, 6, 12]


def test_an_error_ends_all() -> None:
    async def attempt(job: Job[int]) -> float | None:
        if job.url == "a/3":
            raise ZeroDivisionError
        await asyncio.sleep(60)
        return None

    schedule = Schedule[int](Settings(delay=0), lambda: False, attempt, nothing)

    async def all() -> None:
        for k in range(5):
            schedule.add(Job(f"a/{k}", 0), f"a{k}")
        await schedule.run()

    try:
        asyncio.run(asyncio.wait_for(all(), 20))
    except ZeroDivisionError:
        assert not schedule._tasks
    else:
        raise AssertionError


def test_parts_that_wait_for_others() -> None:
    """Each part's last URL is held until the last part's is had: they are opened one by one, however many are open."""
    order: list[str] = []
    parts = iter(range(5))

    def open_part() -> bool:
        if (part := next(parts, None)) is None:
            return False
        order.append(f"part {part}")
        schedule.open_parts += 1
        schedule.add(Job(f"{part}", part), f"{part}")
        return True

    async def attempt(job: Job[int]) -> float | None:
        await asyncio.sleep(1)
        if not job.tries:
            return 5.0  # asleep is not at an end
        order.append(job.url)
        schedule.held += 1
        if job.part == 4:
            schedule.open_parts = schedule.held = 0
        return None

    async def all_held() -> None:
        assert schedule.held == schedule.open_parts
        order.append("held")

    schedule = Schedule[int](Settings(delay=0.0), open_part, attempt, all_held, max_open_parts=2)
    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(schedule.run())
    first, *others = "part 0", "part 1", "0", "1", "held", "part 2", "2", "held", "part 3", "3", "held", "part 4", "4"
    assert order == [first, *others]
    assert not schedule.open_parts
