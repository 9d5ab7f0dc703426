"""`fetch`: the parts of a plan in several processes, each of which is one event loop; then the sum of the tables."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.scratch import check_locks, clear_dead, is_scratch, locked_in
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.engines import Engine, run_jobs
from megatron_lcl.data.engines.children import Children, Lost
from megatron_lcl.data.fetch.plan import Plan, host_of, make_plan, open_plan
from megatron_lcl.data.fetch.schedule import MAX_OPEN_PARTS
from megatron_lcl.data.fetch.settings import PROXY_LOGIN, STORES, Settings, proxy_parts
from megatron_lcl.data.fetch.store import num_done, tables
from megatron_lcl.data.fetch.urls import read_urls, url_files
from megatron_lcl.data.prepare.importers import files_signature
from megatron_lcl.data.storage.paths import path_of, reading
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError, describe_os_error, is_mendable
from megatron_lcl.filesystem import exists, is_dir
from megatron_lcl.processes import NEVER_BEGAN

_POLL_SECONDS = 0.5
_PROBES = 4
"""URLs with which a proxy is tried"""
_DIED = "a worker process ended with code {}, perhaps out of memory; the same command goes on"
_RETRIES = 2
"""times that a worker process may die"""
logger = logging.getLogger(__name__)


class _Died(UserError):
    """A worker process could not say why it ended."""


@reading()
def fetch(
    input: str | Path,
    output: str | Path,
    settings: Settings | None = None,
    *,
    url_column: str | None = None,
    workers: int = 1,
    job: tuple[int, int] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Fetch the images of all URLs in `input` into the store `output`; gone on with where it was stopped.

    input: also an object's URL, `s3://bucket/folder` or `http(s)://host/file`.
    job: (i, n) does every n-th part of the plan, the i-th of 0 … n-1, while other jobs do the others. Returns the
    store's `summary`, `dropped`: what of the input was no URL, by reason, and `todo`: how many URLs of these parts were
    in no complete shard when it began. UserError for input without URLs, a store of another input, a proxy that
    refuses, or where nothing is reached any more.
    """
    output, settings = Path(output), settings or Settings()
    with _planned(path_of(input), output, settings, url_column, workers) as (plan, plan_lock):
        index, num_jobs = job or (0, 1)
        mine = range(index, len(plan.parts), num_jobs)
        if job is not None:
            plan_lock.close()  # each part has a lock of its own
        total, done = sum(plan.parts[part] for part in mine), num_done(output, mine)
        num_todo = total - sum(done.values())
        with tqdm(total=total, initial=total - num_todo, unit="url", disable=not progress) as bar:
            for tries_left in reversed(range(_RETRIES + 1)):
                todo = [part for part in mine if done[part] < plan.parts[part]]
                try:
                    _do(output, plan, todo, settings, workers, bar)
                    break
                except _Died:
                    if not tries_left:
                        raise
                    logger.warning("a worker process died, perhaps out of memory; its parts are gone on with")
                    done = num_done(output, mine)
                    bar.n = sum(done.values())
        left = [part for part, number in num_done(output, todo).items() if number != plan.parts[part]]
        assert not left, f"parts {left} are not at their end"  # as a whole store is what is uploaded
        return {**summary(output), "dropped": plan.dropped, "todo": num_todo}


@reading()
def fetch_in_jobs(
    input: str | Path,
    output: str | Path,
    engine: Engine,
    settings: Settings | None = None,
    *,
    url_column: str | None = None,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """`fetch` in `engine.jobs` jobs on folders that all machines see; waits, and returns the same.

    workers: processes, and so CPUs, of a job. UserError as of `fetch`, before any job begins where input, settings or
    proxy are to blame, and of `engines.run_jobs`.
    """
    place, output, settings = path_of(input).resolve(), Path(output).resolve(), settings or Settings()
    with _planned(place, output, settings, url_column, workers) as (plan, _):
        num_todo = sum(plan.parts) - sum(num_done(output, range(len(plan.parts))).values())
    environment: dict[str, str] = {}
    if settings.proxy is not None:  # engines write arguments into files
        address, login = proxy_parts(settings.proxy)
        settings = replace(settings, proxy=f"http://{address}")
        if login:
            environment[PROXY_LOGIN] = login
    arguments: dict[str, Any] = {
        "input": str(place),
        "output": output,
        "settings": settings,
        "url_column": url_column,
        "workers": workers,
    }
    reads = [] if url_of(input) else [place]
    run_jobs(
        fetch, arguments, engine, output=output, reads=reads, cpus=workers, progress=progress, environment=environment
    )
    return {**fetch(**arguments), "todo": num_todo}  # finished: only reads the summary


@contextlib.contextmanager
def _planned(
    input: Path, output: Path, settings: Settings, url_column: str | None, workers: int
) -> Iterator[tuple[Plan, contextlib.ExitStack]]:
    """The plan of the store, made if need be, and its lock, which other processes wait for until it is closed."""
    from megatron_lcl.data.fetch import client  # says what is not installed, before anything is written

    _check(settings, workers)
    files = url_files(input)
    signature = f"{files_signature(files.read, files.root)} {url_column or ''}".strip()
    with _folder(output) as lock:
        clear_dead(output)
        if (plan := open_plan(output, signature, settings)) is None:
            if any(path.name != ".lock" and not is_scratch(path) for path in output.iterdir()):
                raise UserError(f"{output} is not empty and no image store: give a new folder")
            check_locks(output)  # before the input is read, which may take long
            drops = Drops()
            found = read_urls(files, url_column, drops)
            if settings.proxy:
                asyncio.run(_try_proxy(client.Client, settings, read_urls(files, url_column, Drops())))
            make_plan(output, found, drops.bad_counts, signature, settings)
            plan = open_plan(output, signature, settings)
        assert plan is not None
        yield plan, lock


def summary(output: str | Path) -> dict[str, Any]:
    """Of a store's complete shards: URLs `kept`, `dead`, `refused`, stored `bytes`, and the `reasons` of the others."""
    output = Path(output)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    size = 0
    for file in tables(output):
        table = read_table(file, columns=["status", "reason", "size"], use_threads=False)
        size += sum(table["size"].to_pylist())
        for status, reason in zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True):
            counts[status] += 1
            if reason:
                reasons[f"{status}: {reason}"] += 1
    return {
        **{status: counts[status] for status in ("kept", "dead", "refused")},
        "bytes": size,
        "reasons": dict(reasons.most_common()),
    }


@contextlib.contextmanager
def _folder(output: Path) -> Iterator[contextlib.ExitStack]:
    """A folder, which is gone again if nothing came into it, and its lock, which others wait for until it is closed."""
    if exists(output) and not is_dir(output):
        raise UserError(f"{output} is a file: give a folder")
    with contextlib.ExitStack() as lock:
        lock.enter_context(locked_in(output, ".lock"))
        try:
            yield lock
        finally:
            if {path.name for path in output.iterdir()} <= {".lock"}:
                with contextlib.suppress(OSError):
                    (output / ".lock").unlink(missing_ok=True)
                    output.rmdir()


def _check(settings: Settings, workers: int) -> None:
    for name, least in (
        ("max_image_side", 1), ("shard_urls", 1), ("max_bytes", 1), ("max_pixels", 1), ("retries", 0), ("backoff", 0),
        ("concurrency", 1), ("per_host", 1), ("delay", 0),
    ):  # fmt: skip
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if settings.store not in STORES:
        raise UserError(f"--store {settings.store}: give {' or '.join(STORES)}")
    if not settings.timeout > 0:
        raise UserError(f"--timeout {settings.timeout}: give seconds, more than 0")
    if workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more")
    if not settings.user_agent.partition("/")[0].strip() or not settings.user_agent.isprintable():
        raise UserError(f"--user-agent {settings.user_agent!r}: give a name, as in name/1.0 (+https://example.org/bot)")
    if settings.proxy is not None:
        proxy_parts(settings.proxy)  # which says what is wrong with it


async def _try_proxy(client: type, settings: Settings, found: Iterator[list[str]]) -> None:
    """ProxyError where a proxy refuses the first URL of each of several hosts."""
    hosts: dict[str, str] = {}
    for urls in found:
        for url in urls:
            hosts.setdefault(host_of(url), url)
        if len(hosts) >= _PROBES:
            break
    error: UserError | None = None
    async with client(settings) as asking:
        for url in list(hosts.values())[:_PROBES]:
            try:
                await asking.reach(url)
                return
            except UserError as refused:
                error = refused
    if error is not None:
        raise error


def _do(output: Path, plan: Plan, todo: list[int], settings: Settings, workers: int, bar: tqdm) -> None:
    """The parts `todo` in this process, or in several; the bar follows."""
    from megatron_lcl.data.fetch.work import COUNTED, Worker

    before = bar.n
    if workers == 1 or len(todo) <= 1:
        parts, counts = iter(todo), [0] * len(COUNTED)
        told = lambda: _show(bar, before, counts)  # noqa: E731
        asyncio.run(Worker(output, plan, settings, lambda: next(parts, None), counts, told).run())
        return
    context = multiprocessing.get_context("spawn")
    taken = context.Value("i", 0)
    shared = [context.Array("q", len(COUNTED), lock=False) for _ in range(min(workers, len(todo)))]
    children: Children[int, str | None] = Children()
    try:
        for number, counts in enumerate(shared):
            children.start(number, _process, output, plan, todo, settings, len(shared), taken, counts)
        while len(children):
            ended = children.ended(_POLL_SECONDS)
            _show(bar, before, [sum(counts[i] for counts in shared) for i in range(len(COUNTED))])
            for said in ended.values():
                if isinstance(said, Lost):
                    raise _Died(_DIED.format(said.exit_code)) if taken.get_obj().value else UserError(NEVER_BEGAN)
                if said is not None:
                    raise UserError(said)
    finally:
        children.end()


def _process(
    output: Path, plan: Plan, todo: list[int], settings: Settings, workers: int, taken: Any, counts: Any
) -> str | None:
    """One of several: takes the next part that none has taken, until there is none. Returns why it could not go on, if
    it could not."""
    from megatron_lcl.data.fetch.work import Worker

    def next_part() -> int | None:
        with taken.get_lock():
            taken.value += 1
            number = taken.value - 1
        return todo[number] if number < len(todo) else None

    fair = max(1, min(MAX_OPEN_PARTS, len(todo) // workers))  # else the first to start would take all
    try:
        asyncio.run(Worker(output, plan, settings, next_part, counts, max_open_parts=fair).run())
    except UserError as error:
        return str(error)
    except OSError as error:
        if error.filename is None and not is_mendable(error):
            raise
        return describe_os_error(error, output)
    return None


def _show(bar: tqdm, before: float, counts: Sequence[int]) -> None:
    kept, dead, refused, size, resumed = counts
    bar.set_postfix_str(f"{kept:,} kept, {dead:,} dead, {refused:,} refused, {size / 1e6:,.0f} MB", refresh=False)
    bar.update(before + kept + dead + refused + resumed - bar.n)
