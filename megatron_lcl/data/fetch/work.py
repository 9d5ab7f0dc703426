"""What one process does: it opens parts of the plan, fetches their URLs and accounts for each, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, MutableSequence
from pathlib import Path

from megatron_lcl.data.corpus.scratch import unless_others
from megatron_lcl.data.fetch.client import MAX_CLOCK_ERROR, MAX_WAIT, Client, Outcome, Retry
from megatron_lcl.data.fetch.plan import Plan, host_of
from megatron_lcl.data.fetch.schedule import MAX_OPEN_PARTS, MAX_OPEN_URLS, Job, Schedule, pause_before
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.data.fetch.store import PartStore, Row, kept_urls
from megatron_lcl.data.prepare.importers.urls import url_key
from megatron_lcl.errors import UserError

COUNTED = ("kept", "dead", "refused", "bytes", "before")
"""what `Worker` counts; before: URLs that an incomplete shard accounted for already"""
GIVE_UP = 10
"""URLs of a host in a row for which it is not reached, after which its others are not tried"""
OUTAGE_HOSTS, OUTAGE_SECONDS = 50, 60.0
"""so many hosts in a row not reached, and none for so long: the network may be to blame, not the hosts"""
NEVER_REACHED_HOSTS = 2
"""likewise so many at the end, where none was reached at all"""
_POLL_SECONDS = 1.0
"""between attempts at parts that other processes have open"""
_WITNESSES = 3
"""hosts that gave an image, which are asked for it again to see whether the network is there"""
logger = logging.getLogger(__name__)


class OpenPart:
    """A part whose URLs are being fetched. It is this process's alone while it is open."""

    def __init__(self, output: Path, plan: Plan, number: int, settings: Settings, lock: contextlib.ExitStack) -> None:
        """lock: closed when the part is."""
        self._lock = lock
        self._store = PartStore(output, number, settings.shard_urls, settings.store)
        self.urls = [url for url in plan.urls(number) if url_key(url) not in self._store.done]
        self.left, self.held = len(self.urls), 0
        """URLs that are not accounted for, and those of them that are held"""
        self.had_its_turn = False
        """no URL is left but held ones"""
        self.resumed, self.kept = self._store.resumed, self._store.kept

    def add(self, row: Row, data: bytes) -> None:
        """Account for one of the URLs."""
        self._store.add(row, data)
        self.left -= 1

    def finish(self) -> None:
        """All are accounted for."""
        assert not self.left
        self._store.finish()
        self._lock.close()

    def abandon(self) -> None:
        """Leave it to whoever goes on."""
        self._store.close()
        self._lock.close()


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
        self._schedule = Schedule[OpenPart](settings, self._open_next, self._attempt, self._all_held, max_open_parts)
        self._open: set[OpenPart] = set()
        self._busy: list[int] = []
        """parts that another process has open: one whose parent was killed a moment ago, or that works on a machine
        that counted as lost"""
        self._held: list[tuple[Job[OpenPart], str]] = []
        """URLs whose host was not reached since any was, with the reason: dead, or tried again, once any is, or at the
        end"""
        self._held_hosts: set[str] = set()
        self._bad_certificates = False
        """whether any was found not to be valid"""
        self._reached_at = 0.0
        """event loop's time when a host was reached last, or the beginning"""
        self._witnesses: dict[str, str] = {}
        """an image's URL of each of the last hosts that gave one, also in earlier runs"""
        self._asking = False
        self._reached_any = False

    async def run(self) -> None:
        """Until no part is left. UserError where nothing is reached any more, or a proxy refuses."""
        self._reached_at = asyncio.get_running_loop().time()
        try:
            async with Client(self._settings) as self._client:
                await self._do_parts(self._next_part)
                if self._busy:
                    logger.warning("parts %s: another process is at work; waiting for it", sorted(self._busy))
                while self._busy:  # with none open: no process waits for another that waits for it
                    await asyncio.sleep(_POLL_SECONDS)
                    busy, self._busy = iter(self._busy), []
                    await self._do_parts(lambda busy=busy: next(busy, None))  # type: ignore[misc]
        finally:
            for part in self._open:
                part.abandon()

    async def _do_parts(self, next_part: Callable[[], int | None]) -> None:
        """Those of them that no other process has open."""
        self._next_part = next_part
        while True:
            await self._schedule.run()
            self._check_clock()
            await self._check_network(at_once=True)
            self._release()
            if not self._open:
                break  # else URLs are tried again, each once at most

    def _open_next(self) -> bool:
        """Open the next part that no other process has; whether there was one."""
        while (number := self._next_part()) is not None:
            lock = contextlib.ExitStack()
            if lock.enter_context(unless_others(self._plan.lock(number))):
                break
            lock.close()  # a wait here would hold up the requests under way
            self._busy.append(number)
        else:
            return False
        part = OpenPart(self._output, self._plan, number, self._settings, lock)
        self._open.add(part)
        self._schedule.open_parts += 1
        self._counts[COUNTED.index("before")] += part.resumed
        if part.kept:
            self._witness(host_of(part.kept), part.kept)
        for url in part.urls:
            self._schedule.add(Job(url, part), host_of(url))
        part.urls.clear()
        self._settle(part)
        return True

    async def _attempt(self, job: Job[OpenPart]) -> float | None:
        """Fetch a URL and account for it; the seconds to wait where it is to be tried again."""
        host = job.host
        try:
            if host.failures >= GIVE_UP:
                self._unreached(job, "host does not answer")
                await self._check_network()
                return None
            if host.left:
                self._account(job.part, Row(job.url, "dead", host.left))
                return None
            outcome = await self._client.fetch(job.url)
        except Retry as retry:
            if retry.wait:
                self._schedule.postpone(host, retry.wait)
            if job.tries < self._settings.retries and not self._keep_crawl_delay(job):
                return pause_before(job.tries + 1, self._settings)
            outcome = Outcome(Row(job.url, "dead", retry.reason), reached=retry.reached)
        leave = self._keep_crawl_delay(job)
        if outcome.leave:
            leave = outcome.row.reason
        if outcome.reached is False:
            host.failures += not outcome.alone
            self._bad_certificates |= outcome.alone
            self._unreached(job, outcome.row.reason)
            if host.failures >= GIVE_UP:
                for other in self._schedule.give_up(host):
                    self._unreached(other, "host does not answer")
            await self._check_network()
            return None
        if outcome.reached:
            self._reached_any = True
            host.failures = 0
            if outcome.row.status == "kept":
                self._witness(host.name, job.url)
            self._release()
        if leave:
            host.left = leave
            for other in self._schedule.give_up(host):
                self._account(other.part, Row(other.url, "dead", host.left))
        self._account(job.part, outcome.row, outcome.data)
        return None

    def _keep_crawl_delay(self, job: Job[OpenPart]) -> str:
        """Wait between requests as long as the host's robots.txt asks; why it is to be left, where that is too long."""
        if (delay := self._client.crawl_delay(job.url)) > job.host.delay:
            if delay > MAX_WAIT:
                return "robots.txt asks for a long wait"
            job.host.delay = delay
            self._schedule.postpone(job.host, delay)
        return ""

    def _unreached(self, job: Job[OpenPart], reason: str) -> None:
        """The host may be dead, or the network away."""
        self._held.append((job, reason))
        self._held_hosts.add(job.host.name)
        self._schedule.held += 1
        job.part.held += 1
        self._settle(job.part)

    def _witness(self, host: str, url: str) -> None:
        self._witnesses.pop(host, None)
        self._witnesses[host] = url
        if len(self._witnesses) > _WITNESSES:
            del self._witnesses[next(iter(self._witnesses))]

    async def _all_held(self) -> None:
        """All that was tried is held. Another part may have a host that answers, so one is opened.

        Not where so many URLs are held of so many hosts: without a network, all of the plan would be in memory before
        the time has passed after which that is said. Fewer hosts are in few parts, as no two parts share one.
        """
        if len(self._held) < MAX_OPEN_URLS:
            return
        self._check_clock()
        if len(self._held_hosts) >= OUTAGE_HOSTS:
            if not self._witnesses:
                await asyncio.sleep(self._reached_at + OUTAGE_SECONDS - asyncio.get_running_loop().time())
            await self._check_network(at_once=True)

    async def _check_network(self, at_once: bool = False) -> None:
        """Where so many hosts were not reached for so long: UserError, unless one that gave an image answers again.

        At the end of a list only dead hosts may be left, whose timeouts take longer than that; were they not told from
        a network that is away, the command would never come to its end. at_once: however short the time is, where there
        are hosts to ask, and however few hosts there are, where this process has reached none.
        """
        asked_at = asyncio.get_running_loop().time()
        silent = asked_at - self._reached_at
        never = at_once and not self._reached_any
        doubtful = never or silent >= OUTAGE_SECONDS or (at_once and bool(self._witnesses))
        if self._asking or len(self._held_hosts) < (NEVER_REACHED_HOSTS if never else OUTAGE_HOSTS) or not doubtful:
            return
        if never and not self._witnesses:
            for kept in kept_urls(self._output):  # by another process
                self._witness(host_of(kept), kept)
                if len(self._witnesses) == _WITNESSES:
                    break
        self._asking = True
        try:
            for url in list(self._witnesses.values()):
                try:
                    reached = (await self._client.fetch(url)).reached
                except Retry as retry:  # a server that is busy, or breaks off, is reached as well
                    reached = retry.reached
                if reached:
                    self._release()
                    return
        finally:
            self._asking = False
        if self._reached_at <= asked_at:
            raise UserError(
                f"no host was reached for {silent:.0f} s, of {len(self._held_hosts)}: is there a network, is a "
                "--proxy needed, or are the clock or the certificates of this machine wrong? None of their URLs is "
                "marked as dead, and the same command goes on"
            )

    def _clock_error(self) -> float:
        """Seconds by which our clock is ahead, where that may be why certificates are not valid, though hosts by plain
        http answer; else 0."""
        error = self._client.clock_error or 0.0
        return error if self._bad_certificates and abs(error) > MAX_CLOCK_ERROR else 0.0

    def _check_clock(self) -> None:
        """UserError where it is to blame for what is held."""
        if self._held and (error := self._clock_error()):
            raise UserError(
                f"certificates are not valid, and the clock of this machine is {abs(error) / 3600:,.0f} h "
                f"{'ahead of' if error > 0 else 'behind'} those of the hosts that answer: set it. None of these URLs "
                "is marked as dead, and the same command goes on"
            )

    def _release(self) -> None:
        """The network is there: hosts that were not reached are dead.

        Where they are as many as in an outage, it may have been away for a while: their URLs are tried once more. Where
        the clock is wrong, all stay held.
        """
        self._reached_at = asyncio.get_running_loop().time()
        if self._clock_error():
            return
        was_away = len(self._held_hosts) >= OUTAGE_HOSTS
        self._held_hosts.clear()
        held, self._held, self._schedule.held = self._held, [], 0
        for job, reason in held:
            job.part.held -= 1
            if was_away and not job.again:
                self._try_again(job)
            else:
                self._account(job.part, Row(job.url, "dead", reason))

    def _try_again(self, job: Job[OpenPart]) -> None:
        """Put a held URL back, as if it had not been tried."""
        job.tries, job.again = 0, True
        self._schedule.add(job, job.host.name)
        job.host.failures = 0
        if job.part.had_its_turn:
            job.part.had_its_turn = False
            self._schedule.open_parts += 1

    def _account(self, part: OpenPart, row: Row, data: bytes = b"") -> None:
        part.add(row, data)
        self._counts[COUNTED.index(row.status)] += 1
        self._counts[COUNTED.index("bytes")] += row.size
        self._told()
        self._settle(part)

    def _settle(self, part: OpenPart) -> None:
        """Close a part that is at its end; one with only held URLs left leaves its place to another."""
        if part.left == part.held and not part.had_its_turn:
            part.had_its_turn = True
            self._schedule.open_parts -= 1
        if not part.left:
            part.finish()
            self._open.remove(part)
