"""Whose turn it is: many hosts at once, few requests at one, and a delay between them. One event loop, no threads.

Parts of the plan are opened one after another, as soon as the requests that the open ones allow at this moment are
fewer than there may be: a host that is slow or large holds up nothing but itself. URLs may be held after their turn,
for what others show: where nothing else is left to do, one more part is opened, however many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from megatron_lcl.data.fetch.settings import Settings

MAX_OPEN_PARTS, MAX_OPEN_URLS = 16, 200_000
"""no further part is opened while there are as many, or parts with as many URLs: each takes 0.7 kB"""
Part = TypeVar("Part")


class Job(Generic[Part]):
    """A URL to fetch. `part`: whatever it belongs to; `again`: it was held, and has been added once more."""

    __slots__ = ("again", "host", "part", "tries", "url")

    def __init__(self, url: str, part: Part) -> None:
        self.url, self.part, self.tries, self.again = url, part, 0, False
        self.host: Host[Part]


class Host(Generic[Part]):
    """A host's URLs, and what of it is under way."""

    __slots__ = ("active", "delay", "failures", "left", "limit", "listed", "name", "next_start", "pending", "queue")

    def __init__(self, name: str, delay: float) -> None:
        self.name, self.delay = name, delay
        self.limit = 1
        """requests at a time: until the first has ended, nothing is known of the host, nor what its robots.txt says"""
        self.queue: deque[Job[Part]] = deque()
        self.active = 0
        self.pending = 0
        """URLs whose end is not known"""
        self.next_start = 0.0
        """event loop's time before which no request may begin"""
        self.listed = False
        """whether it is among those that are ready, or asleep until they are"""
        self.failures = 0
        """URLs in a row for which it was not reached"""
        self.left = ""
        """why it is not asked for anything any more"""


class Schedule(Generic[Part]):
    """Runs `attempt` on every job, as the settings allow, until no part is left.

    open_part: adds the next part's jobs (`add`) and says whether there was one.
    attempt: fetches a job's URL; None if that is its end, else the seconds after which to try again.
    all_held: called before a part is opened beyond the limits. It may wait, add jobs again, which are then done first,
    or raise where no part is to be opened.
    """

    def __init__(
        self,
        settings: Settings,
        open_part: Callable[[], bool],
        attempt: Callable[[Job[Part]], Awaitable[float | None]],
        all_held: Callable[[], Awaitable[None]],
        max_open_parts: int = MAX_OPEN_PARTS,
    ) -> None:
        self._settings, self._open_part, self._attempt, self._all_held = settings, open_part, attempt, all_held
        self._max_open_parts = max_open_parts
        self._hosts: dict[str, Host[Part]] = {}
        self._ready: deque[Host[Part]] = deque()
        self._asleep: list[tuple[float, int, Host[Part], Job[Part] | None]] = []
        """(when, a number, host, the URL to try again; None: the host may begin another)"""
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._counter = 0
        self._pending = 0
        """URLs whose end is not known"""
        self.open_parts = 0
        """parts with URLs whose turn is to come; counted down by whoever sees that there are none"""
        self.held = 0
        """URLs that have had their turn and are not given back; counted by whoever holds them"""

    def add(self, job: Job[Part], host: str) -> None:
        """Another job, of a host that no other process asks."""
        if (found := self._hosts.get(host)) is None:
            found = self._hosts[host] = Host(host, self._settings.delay)
        job.host = found
        found.queue.append(job)
        found.pending += 1
        self._pending += 1
        self._consider(found)

    def postpone(self, host: Host[Part], seconds: float) -> None:
        """No request to a host before this time has passed."""
        host.next_start = max(host.next_start, asyncio.get_running_loop().time() + seconds)

    def give_up(self, host: Host[Part]) -> list[Job[Part]]:
        """The jobs of a host that wait for their turn, which they will not have."""
        jobs = list(host.queue)
        host.queue.clear()
        host.pending -= len(jobs)
        self._pending -= len(jobs)
        return jobs

    async def run(self) -> None:
        """Until no part is left, and no turn. Raises what an attempt raised; then the others are canceled."""
        loop = asyncio.get_running_loop()
        parts_left = True
        try:
            while self._error is None:
                self._wake(loop.time())
                free = len(self._tasks) < self._settings.concurrency
                if free and self._start_next(loop.time()):
                    continue
                room = self.open_parts < self._max_open_parts and self._pending + self.held < MAX_OPEN_URLS
                if free and parts_left and room:
                    parts_left = self._open_part()
                    continue
                if not self._tasks and not self._asleep:
                    assert not self._pending
                    if not parts_left:
                        break
                    await self._all_held()
                    if not self._pending:
                        parts_left = self._open_part()
                    continue
                self._changed.clear()
                pause = max(0.0, self._asleep[0][0] - loop.time()) if self._asleep else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._changed.wait()
            if self._error is not None:
                raise self._error
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start_next(self, now: float) -> bool:
        """Begin a request, if any host may have one; whether something was done."""
        if not self._ready:
            return False
        host = self._ready.popleft()
        host.listed = False
        if host.queue and host.next_start <= now:
            job = host.queue.popleft()
            host.active += 1
            host.next_start = now + host.delay
            task = asyncio.get_running_loop().create_task(self._run(job))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        self._consider(host)
        return True

    async def _run(self, job: Job[Part]) -> None:
        host = job.host
        try:
            again = await self._attempt(job)
        finally:
            host.active -= 1
        host.limit = self._settings.per_host
        if again is None:
            host.pending -= 1
            self._pending -= 1
            if not host.pending:
                self._hosts.pop(host.name, None)
        else:
            job.tries += 1
            self._sleep(asyncio.get_running_loop().time() + again, host, job)
        self._consider(host)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
        self._changed.set()

    def _consider(self, host: Host[Part]) -> None:
        """List a host among those that are ready or asleep, if it may have another request by and by."""
        if host.listed or not host.queue or host.active >= host.limit:
            return
        host.listed = True
        if host.next_start > asyncio.get_running_loop().time():
            self._sleep(host.next_start, host, None)
        else:
            self._ready.append(host)

    def _sleep(self, when: float, host: Host[Part], job: Job[Part] | None) -> None:
        self._counter += 1
        heapq.heappush(self._asleep, (when, self._counter, host, job))

    def _wake(self, now: float) -> None:
        while self._asleep and self._asleep[0][0] <= now:
            _, _, host, job = heapq.heappop(self._asleep)
            if job is None:
                host.listed = False
            else:
                host.queue.append(job)
            self._consider(host)


def pause_before(tries: int, settings: Settings) -> float:
    """Seconds before trying again what was tried `tries` times."""
    return settings.backoff * 2.0 ** (tries - 1) * random.uniform(0.5, 1.5)
