"""Work on many items in several processes, or in this one; results come in the order of the items."""

from __future__ import annotations

import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import Any, TypeVar

from megatron_lcl.errors import UserError
from megatron_lcl.interrupts import end_with_command, holding_interrupts
from megatron_lcl.processes import NEVER_BEGAN, importing_first

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
_RETRIES = 2
logger = logging.getLogger(__name__)


def in_order(
    function: Callable[[Shared, Item], Result],
    shared: Shared,
    items: Sequence[Item],
    workers: int,
    ahead: int | None = None,
) -> Generator[Result, None, None]:
    """function(shared, item) of every item, in order, from `workers` processes; from this one where one is enough.

    The function can be imported by its name; every process gets its own copy of `shared` once. ahead: results that may
    wait for their turn, or None for any number. Where a process dies, what had no result yet is done again, in new
    processes; UserError where that happens a third time, or before any has begun.
    """
    if workers <= 1 or len(items) <= 1:
        for item in items:
            yield function(shared, item)
        return
    done = deaths = 0
    while done < len(items):
        with closing(_from_processes(function, shared, items[done:], workers, ahead)) as results:
            try:
                for result in results:
                    done += 1
                    yield result
            except BrokenProcessPool:
                deaths += 1
                if deaths > _RETRIES:
                    raise UserError(
                        f"a worker process died, {deaths} times now, perhaps out of memory; run the same command again",
                        {"--workers": ", with a smaller --workers"},
                    ) from None
                logger.warning("a worker process died, perhaps out of memory; its work is done again")


def _from_processes(
    function: Callable[[Shared, Item], Result],
    shared: Shared,
    items: Sequence[Item],
    workers: int,
    ahead: int | None,
) -> Generator[Result, None, None]:
    """BrokenProcessPool where one dies."""
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Result]] = deque()
    begun = context.Value("b", lock=False)
    start = importing_first(_start, begun, function, shared)
    with ProcessPoolExecutor(min(workers, len(items)), context, *start) as pool:
        try:
            for item in items:
                with holding_interrupts():
                    waiting.append(pool.submit(_call, item))
                if ahead is not None and len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            if not begun.value:
                raise UserError(NEVER_BEGAN) from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_work_of_this_process: list[tuple[Callable[..., Any], Any]] = []


def _start(begun: Any, function: Callable[..., Any], shared: Any) -> None:
    begun.value = 1
    end_with_command()
    _work_of_this_process[:] = [(function, shared)]


def _call(item: Any) -> Any:
    ((function, shared),) = _work_of_this_process
    return function(shared, item)
