"""Hosts that are not reached, in several parts: all parts are done, or the command says that there is no network."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import fcntl
import hashlib
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from data.fetch.faulty_server import serving
from data.fetch.stores import read_rows
from data.fetch.test_fetch import FLAGS
from data.fetch.test_fetch_schedule import Clock

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from megatron_lcl.cli import main
from megatron_lcl.data.fetch import run, schedule, work
from megatron_lcl.data.fetch.client import Outcome, Retry
from megatron_lcl.data.fetch.plan import Plan, make_plan, open_plan
from megatron_lcl.data.fetch.schedule import MAX_OPEN_PARTS
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.data.fetch.store import PartStore, Row
from megatron_lcl.errors import UserError

SETTINGS = Settings(shard_urls=1, retries=2, delay=0.0)


def image_of(url: str) -> tuple[Row, bytes]:
    return Row(url, "kept", "", hashlib.sha256(b"image").hexdigest(), 5, 1, 1, "PNG"), b"image"


class Web:
    """Stands in for the client. Hosts named "dead…" are not reached, after ten seconds; others answer, after one, those
    named "busy…" that they have no time."""

    down = False
    """whether no host is reached, at once"""
    ahead = 0.0
    """seconds by which this machine's clock is; by a wrong one no certificate is valid, those of "bad…" are by none"""
    clock_error: float | None = None

    def __init__(self, settings: Settings) -> None:
        self.asked = Counter[str]()

    async def __aenter__(self) -> Web:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        pass

    async def fetch(self, url: str) -> Outcome:
        self.asked[url] += 1
        if self.down:
            raise Retry("name not resolved", reached=False)
        if "//dead" in url:
            await asyncio.sleep(10)
            raise Retry("no connection", reached=False)
        await asyncio.sleep(1)
        if url.startswith("https:") and (abs(self.ahead) > 3600 or "//bad" in url):
            return Outcome(Row(url, "dead", "certificate not valid"), reached=False, alone=True)
        self.clock_error = self.ahead
        if "//busy" in url:
            raise Retry("status 503")
        return Outcome(*image_of(url))

    def crawl_delay(self, url: str) -> float:
        return 0.0


def planned(folder: Path, urls: list[str], settings: Settings = SETTINGS) -> Plan:
    make_plan(folder, iter([urls]), {}, "", settings)
    plan = open_plan(folder, "", settings)
    assert plan is not None
    return plan


def work_on(folder: Path, plan: Plan, max_open_parts: int, settings: Settings = SETTINGS) -> float:
    """The seconds that a process takes for a plan."""
    parts, counts = iter(range(len(plan.parts))), [0] * len(work.COUNTED)
    worker = work.Worker(folder, plan, settings, lambda: next(parts, None), counts, max_open_parts=max_open_parts)
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=Clock) as runner:
        patch.setattr(work, "Client", Web)
        runner.run(worker.run())
        return runner.get_loop().time()


@pytest.mark.timeout(60)
def test_a_part_that_cannot_be_completed_is_not_held_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process may go on with it, before Python's collector has come."""
    plan, finish = planned(tmp_path, ["http://live.example/a"]), PartStore.finish

    def fail(part: PartStore) -> None:
        monkeypatch.setattr(PartStore, "finish", finish)
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(PartStore, "finish", fail)
    with pytest.raises(OSError, match="no space") as caught:
        work_on(tmp_path, plan, 1)
    work_on(tmp_path, plan, 1)
    assert reasons(tmp_path) == {"kept": 1}
    del caught


def reasons(folder: Path) -> Counter[str]:
    return Counter(str(row["reason"] or row["status"]) for row in read_rows(folder))


@pytest.mark.parametrize(("max_open_parts", "max_open_urls"), [(1, 200_000), (16, 200_000), (16, 3)])
@pytest.mark.parametrize("hosts", ["{}.example", "dead{}.example"])
def test_every_part_is_opened(
    tmp_path: Path, max_open_parts: int, max_open_urls: int, hosts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts whose last URLs are held do not end the others, nor do parts of dead hosts alone."""
    for module in (work, schedule):
        monkeypatch.setattr(module, "MAX_OPEN_URLS", max_open_urls)
    urls = [f"http://dead{k}.example/a" for k in range(20)] + [f"http://{hosts.format(k)}/b" for k in range(20)]
    urls.append("http://live.example/a")  # else the network would be to blame
    plan = planned(tmp_path, urls)
    assert len(plan.parts) > max_open_parts + 1
    seconds = work_on(tmp_path, plan, max_open_parts)
    if max_open_urls > len(urls) and max_open_parts > 1:  # the timeouts are waited for at once
        assert seconds < 3 * (3 * 10 + 6)
    live = 20 if "dead" not in hosts else 0
    assert reasons(tmp_path) == {"no connection": 40 - live, "kept": live + 1}


def test_a_crawl_delay_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first answer on, before which it is not known."""
    starts: list[float] = []
    fetch = Web.fetch

    async def noted(self: Web, url: str) -> Outcome:
        starts.append(asyncio.get_running_loop().time())
        return await fetch(self, url)

    monkeypatch.setattr(Web, "fetch", noted)
    monkeypatch.setattr(Web, "crawl_delay", lambda *_: 7.0)
    work_on(tmp_path, planned(tmp_path, [f"http://live.example/{k}" for k in range(5)]), 16)
    assert starts == [0, 8, 15, 22, 29]


@pytest.mark.timeout(60)
def test_a_part_that_another_process_has_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that counts as lost may still work; whoever waited for it would let all requests run out of time."""
    plan = planned(tmp_path, [f"http://{k}.example/a" for k in range(6)])
    theirs, ours = plan.urls(0), [url for part in range(1, len(plan.parts)) for url in plan.urls(part)]
    assert theirs
    assert ours
    asked: list[str] = []
    fetch = Web.fetch
    with open(plan.lock(0), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        async def until_all_are_asked(self: Web, url: str) -> Outcome:
            asked.append(url)
            if len(asked) == len(ours):
                fcntl.flock(lock, fcntl.LOCK_UN)
            return await fetch(self, url)

        monkeypatch.setattr(Web, "fetch", until_all_are_asked)
        work_on(tmp_path, plan, MAX_OPEN_PARTS)
    assert sorted(asked[: len(ours)]) == sorted(ours)
    assert asked[len(ours) :] == theirs
    assert reasons(tmp_path) == {"kept": 6}


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("hosts", [["live"], ["busy"], ["dead8", "dead9", "live"]])
def test_a_process_with_dead_hosts_alone_asks_hosts_of_another(
    tmp_path: Path, hosts: list[str], is_complete: bool
) -> None:
    """By the other's images in the store: were there none, the network might be to blame."""
    plan = planned(tmp_path, [f"http://dead{k}.example/a" for k in range(3)])
    with pytest.raises(UserError, match=r"no host was reached for \d+ s, of 3: is there a network"):
        work_on(tmp_path, plan, 16)
    other = PartStore(tmp_path, len(plan.parts), 8)
    for host in hosts:
        for page in "ab":
            other.add(*image_of(f"http://{host}.example/{page}"))
    other.finish() if is_complete else other.close()
    work_on(tmp_path, plan, 16)
    found = reasons(tmp_path)
    assert found["no connection"] == 3


def test_no_network_and_more_urls_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more parts are opened, and after a minute nothing is dead; then the network is there."""
    for module in (work, schedule):
        monkeypatch.setattr(module, "MAX_OPEN_URLS", 100)
    monkeypatch.setattr(Web, "down", True)
    settings = dataclasses.replace(SETTINGS, shard_urls=20)
    plan = planned(tmp_path, [f"http://{host}.example/{k}" for host in range(200) for k in range(2)], settings)
    opened: list[int] = []
    of_one = Plan.urls
    monkeypatch.setattr(Plan, "urls", lambda plan, part: opened.append(part) or of_one(plan, part))
    with pytest.raises(UserError, match="no host was reached for"):
        work_on(tmp_path, plan, 16, settings)
    assert 100 <= sum(plan.parts[part] for part in opened) < 200
    assert not [*tmp_path.glob("*.parquet")]
    assert not any(log.read_bytes() for log in tmp_path.glob("*.log"))
    monkeypatch.setattr(Web, "down", False)
    work_on(tmp_path, plan, 16, settings)
    assert reasons(tmp_path) == {"kept": 400}


@pytest.mark.parametrize("shard_urls", [100, 10_000])
def test_dead_hosts_are_left_at_the_end(tmp_path: Path, shard_urls: int) -> None:
    """Their timeouts take longer than a minute; a host that gave an image does so again, in a later run too."""
    settings = dataclasses.replace(SETTINGS, shard_urls=shard_urls)
    urls = [f"http://dead{host}.example/{k}" for host in range(60) for k in range(12)]
    plan = planned(tmp_path, [*urls, "http://live.example/a"], settings)
    if len(plan.parts) == 1:  # the live host's image is in the store already, and that was all
        part = PartStore(tmp_path, 0, shard_urls)
        part.add(*image_of("http://live.example/a"))
        part.close()
    taken = work_on(tmp_path, plan, 16, settings)
    assert taken > work.OUTAGE_SECONDS
    assert sum(reasons(tmp_path).values()) == len(urls) + 1
    assert reasons(tmp_path)["kept"] == 1


def test_network_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the list and within a minute: no host answers, those neither that gave images, so none is dead."""
    settings = dataclasses.replace(SETTINGS, shard_urls=20)
    plan = planned(tmp_path, [f"http://{host}.example/{k}" for host in range(80) for k in range(3)], settings)
    ask = Web.fetch

    async def fetch(self: Web, url: str) -> Outcome:
        if self.asked.total() == 100:
            monkeypatch.setattr(Web, "down", True)
        return await ask(self, url)

    monkeypatch.setattr(Web, "fetch", fetch)
    with pytest.raises(UserError, match="is there a network"):
        work_on(tmp_path, plan, 16, settings)
    assert set(reasons(tmp_path)) <= {"kept"}
    monkeypatch.undo()
    work_on(tmp_path, plan, 16, settings)
    assert reasons(tmp_path) == {"kept": 240}


@pytest.mark.parametrize(
    ("hosts", "max_open_urls", "shard_urls"),
    [(200, 200_000, 20), (80, 200_000, 20), (80, 200_000, 10_000), (200, 700, 20)],
    ids=["amid the list", "until all is held", "one part", "until no more may be held"],
)
def test_network_is_away_for_less_than_a_minute(
    tmp_path: Path, hosts: int, max_open_urls: int, shard_urls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was tried meanwhile is tried once more, and hosts that are dead are so in the end. The network is back after
    50 seconds, or when a host that gave an image is asked for it again."""
    for module in (work, schedule):
        monkeypatch.setattr(module, "MAX_OPEN_URLS", max_open_urls)
    settings = dataclasses.replace(SETTINGS, shard_urls=shard_urls)
    urls = [f"http://{host}.example/{k}" for host in range(hosts) for k in range(13)]
    dead = [f"http://dead{host}.example/a" for host in range(60)]
    plan = planned(tmp_path, [*urls, *dead], settings)
    ask, asked, back = Web.fetch, Counter[str](), 50.0
    given: set[str] = set()

    async def fetch(self: Web, url: str) -> Outcome:
        nonlocal back
        asked[url] += 1
        now = asyncio.get_running_loop().time()
        if url in given:
            back = min(now, back)
        monkeypatch.setattr(Web, "down", 3 <= now < back)
        outcome = await ask(self, url)
        given.add(url)
        return outcome

    monkeypatch.setattr(Web, "fetch", fetch)
    work_on(tmp_path, plan, 16, settings)
    assert reasons(tmp_path) == {"kept": len(urls), "no connection": len(dead)}
    assert max(asked[url] for url in dead) <= 2 * (1 + settings.retries)


@pytest.mark.timeout(20)
def test_a_host_by_plain_http_does_not_make_up_for_a_wrong_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer says that the clock is, and nothing is dead; or that it is not, but the certificates are."""
    urls = [f"{host}.example/{k}" for host in ("https://a", "http://b", "https://bad") for k in range(2)]
    plan = planned(tmp_path, urls, settings := dataclasses.replace(SETTINGS, shard_urls=9))
    monkeypatch.setattr(Web, "ahead", -1e6)
    (tmp_path / "dead").mkdir()
    dead = planned(tmp_path / "dead", ["http://b.example/0", "http://dead.example/1"])
    work_on(tmp_path / "dead", dead, 16)
    assert reasons(tmp_path / "dead") == {"kept": 1, "no connection": 1}, "no certificate says otherwise"
    with pytest.raises(UserError, match="valid, and the clock of this machine is 278 h behind those of the hosts"):
        work_on(tmp_path, plan, 16, settings)
    monkeypatch.setattr(Web, "ahead", -60.0)
    work_on(tmp_path, plan, 16, settings)
    assert reasons(tmp_path) == {"kept": 4, "certificate not valid": 2}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("at_most", [10, 1000])
def test_a_wrong_clock_is_said_before_all_is_held(
    at_most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not taken for a network that is away, where a host gave an image while the clock was right."""
    for module in (work, schedule):
        monkeypatch.setattr(module, "MAX_OPEN_URLS", at_most)
    monkeypatch.setattr(Web, "ahead", 1e6)
    held: list[str] = []
    unreached, initialize = work.Worker._unreached, work.Worker.__init__

    def begin(self: work.Worker, *arguments: Any, **options: Any) -> None:
        initialize(self, *arguments, **options)
        self._witness("old.example", "https://old.example/kept")

    monkeypatch.setattr(work.Worker, "__init__", begin)
    monkeypatch.setattr(work.Worker, "_unreached", lambda self, job, why: held.append(why) or unreached(self, job, why))
    urls = [f"http://busy{k}.example/0" for k in range(30)] + [
        f"https://a{k}.example/{j}" for k in range(60) for j in "ab"
    ]
    plan = planned(tmp_path, urls, settings := dataclasses.replace(SETTINGS, shard_urls=5))
    with pytest.raises(UserError, match="the clock of this machine is 278 h ahead of"):
        work_on(tmp_path, plan, 16, settings)
    assert len(held) < 60 if at_most == 10 else len(held) == 120


def test_parts_that_are_not_at_their_end_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "urls.txt").write_text("http://127.0.0.1:9/a")
    monkeypatch.setattr(run, "_do", lambda *_: None)
    with pytest.raises(AssertionError, match=r"parts \[0\] are not at their end"):
        run.fetch(tmp_path / "urls.txt", tmp_path / "store")


@pytest.mark.parametrize(
    ("shard_urls", "workers"), [("1", 1), pytest.param("10", 3, marks=pytest.mark.slow)], ids=["one", "three"]
)
def test_the_command_does_all_parts(
    tmp_path: Path, shard_urls: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """In more parts than may be open; with processes, of which each may have one, the dead hosts are known last."""
    listed, store = tmp_path / "urls.txt", tmp_path / "store"
    dead = [f"http://127.0.1.{k}:9/gone/{k}" for k in range(1, 41)]
    with serving(tmp_path, addresses=8) as (addresses, port):
        live = [f"http://{address}:{port}/ok/{k}" for k, address in enumerate(addresses)]
        listed.write_text("\n".join([*dead, *live]))
        words = ["fetch", str(listed), "--output", str(store), *FLAGS, "--shard-urls", shard_urls]
        assert main([*words, "--backoff", "1", "--workers", str(workers)]) == 0
    parts = len(list(store.glob("plan/*.parquet")))
    assert parts > MAX_OPEN_PARTS if workers == 1 else parts // workers == 1
    assert "48 URLs: 8 kept" in capsys.readouterr().out
    assert Counter(row["url"] for row in read_rows(store)) == Counter([*dead, *live])
    assert reasons(store) == {"kept": 8, "no connection": 40}
