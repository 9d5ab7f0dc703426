"""What one process does: it opens parts of the plan, fetches their URLs and accounts for each, in one event loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, MutableSequence
from pathlib import Path

from megatron_lcl.data.fetch.client import Client, Outcome, Retry
from megatron_lcl.data.fetch.plan import Plan, host_of
from megatron_lcl.data.fetch.schedule import MAX_OPEN_PARTS, Job, Schedule, pause_before
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.data.fetch.store import PartStore, Row
from megatron_lcl.data.prepare.importers.urls import url_key
from megatron_lcl.data.prepare.scratch import waiting_for_others
from megatron_lcl.errors import UserError

COUNTED = ("kept", "dead", "refused", "bytes", "before")
"""what `Worker` counts; before: URLs that an incomplete shard accounted for already"""
GIVE_UP = 10
"""URLs of a host in a row for which it is not reached, after which its others are not tried"""
OUTAGE_HOSTS, OUTAGE_SECONDS = 50, 60.0
"""so many hosts in a row not reached, and none for so long: the network is to blame, not the hosts"""


class OpenPart:
    """A part whose URLs are being fetched. It is this process's alone while it is open."""

    def __init__(self, output: Path, plan: Plan, number: int, settings: Settings) -> None:
        self._opened = contextlib.ExitStack()
        # a process whose parent was killed may live for a moment longer
        self._opened.enter_context(waiting_for_others(plan.lock(number)))
        self._store = PartStore(output, number, settings.shard_urls, settings.store)
        self.urls = [url for url in plan.urls(number) if url_key(url) not in self._store.done]
        self.left = len(self.urls)
        self.resumed = self._store.resumed

    def add(self, row: Row, data: bytes) -> None:
        """Account for one of the URLs."""
        self._store.add(row, data)
        self.left -= 1

    def finish(self) -> None:
        """All are accounted for."""
        assert not self.left
        self._store.finish()
        self._opened.close()

    def abandon(self) -> None:
        """Leave it to whoever goes on."""
        self._store.close()
        self._opened.close()


class Worker:
    """Does the parts that `next_part` names, and counts in `counts` (`COUNTED`); told: called after each URL."""

    def __init__(
        self,
        output: Path,
        plan: Plan,
        settings: Settings,
        next_part: Callable[[], int | None],
        counts: MutableSequence[int],
        told: Callable[[], None] = lambda: None,
        max_open_parts: int = MAX_OPEN_PARTS,
    ) -> None:
        self._output, self._plan, self._settings = output, plan, settings
        self._next_part, self._counts, self._told = next_part, counts, told
        self._schedule = Schedule[OpenPart](settings, self._open_next, self._attempt, max_open_parts)
        self._open: set[OpenPart] = set()
        self._held: list[tuple[OpenPart, Row]] = []
        """URLs whose host was not reached since any was: written once any is again, or at the end"""
        self._held_hosts: set[str] = set()
        self._reached_at = time.monotonic()

    async def run(self) -> None:
        """Until no part is left. UserError where nothing is reached any more, or a proxy refuses."""
        try:
            async with Client(self._settings) as self._client:
                await self._schedule.run()
            self._release()
        finally:
            for part in self._open:
                part.abandon()

    def _open_next(self) -> bool:
        if (number := self._next_part()) is None:
            return False
        part = OpenPart(self._output, self._plan, number, self._settings)
        self._open.add(part)
        self._schedule.open_parts += 1
        self._counts[COUNTED.index("before")] += part.resumed
        for url in part.urls:
            self._schedule.add(Job(url, part), host_of(url))
        part.urls.clear()
        self._close_if_done(part)
        return True

    async def _attempt(self, job: Job[OpenPart]) -> float | None:
        """Fetch a URL and account for it; the seconds to wait where it is to be tried again."""
        host = job.host
        try:
            if host.failures >= GIVE_UP:
                self._unreached(job, "host does not answer")
                return None
            if host.left:
                self._account(job.part, Row(job.url, "dead", host.left))
                return None
            outcome = await self._client.fetch(job.url)
        except Retry as retry:
            if retry.wait:
                self._schedule.postpone(host, retry.wait)
            if job.tries < self._settings.retries:
                return pause_before(job.tries + 1, self._settings)
            outcome = Outcome(Row(job.url, "dead", retry.reason), reached=retry.reached)
        if (delay := self._client.crawl_delay(job.url)) > host.delay:
            host.delay = delay
            self._schedule.postpone(host, delay)
        if outcome.reached is False:
            host.failures += 1
            self._unreached(job, outcome.row.reason)
            if host.failures >= GIVE_UP:
                for other in self._schedule.give_up(host):
                    self._unreached(other, "host does not answer")
            return None
        if outcome.reached:
            host.failures = 0
            self._release()
        if outcome.leave:
            host.left = outcome.row.reason
            for other in self._schedule.give_up(host):
                self._account(other.part, Row(other.url, "dead", host.left))
        self._account(job.part, outcome.row, outcome.data)
        return None

    def _unreached(self, job: Job[OpenPart], reason: str) -> None:
        """The host may be dead, or the network away."""
        self._held.append((job.part, Row(job.url, "dead", reason)))
        self._held_hosts.add(job.host.name)
        silent = time.monotonic() - self._reached_at
        if len(self._held_hosts) >= OUTAGE_HOSTS and silent >= OUTAGE_SECONDS:
            raise UserError(
                f"no host was reached for {silent:.0f} s, of {len(self._held_hosts)}: is there a network, or is a "
                "--proxy needed? The same command goes on"
            )

    def _release(self) -> None:
        """The network is there: hosts that were not reached are dead."""
        self._reached_at = time.monotonic()
        self._held_hosts.clear()
        held, self._held = self._held, []
        for part, row in held:
            self._account(part, row)

    def _account(self, part: OpenPart, row: Row, data: bytes = b"") -> None:
        part.add(row, data)
        self._counts[COUNTED.index(row.status)] += 1
        self._counts[COUNTED.index("bytes")] += row.size
        self._told()
        self._close_if_done(part)

    def _close_if_done(self, part: OpenPart) -> None:
        if not part.left:
            self._open.remove(part)
            self._schedule.open_parts -= 1
            part.finish()
