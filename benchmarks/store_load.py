"""What the watchdogs of many processes take of the first process's store, which works in one thread.

    python benchmarks/store_load.py [--processes 64,512,2048,4096] [--turns 20]

A store of torch in a process of its own holds the states of so many processes; another reads them as a watchdog does.
All processes read all states in each period, so what one reading takes of the store's CPU time, times the processes, is
how long it is busy of each period: beyond that, reads come late. And once, until all have published: one question for
all keys, and, what a watchdog does not do, a question for each. No process but these two runs, so what is said of all
is computed from one.

Claim: with 512 processes the store is busy for half of a period at most; exit code 1 if that does not hold.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch.distributed as dist
from arguments import positive, positives
from claims import exit_unless, exit_with

from megatron_lcl.config import Guard
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.resilience.watchdog import State, Watchdog, _key

CLAIMED = 512
GROUPS = 8
"""process groups of a process"""


class Load(NamedTuple):
    """CPU seconds of the store for one process, and how long a period is."""

    reading: float
    asking: float
    """whether all have published"""
    asking_each: float
    """the same, with a question for each"""
    period: float


def _serve(asked: Connection) -> None:
    """A store; says the CPU time of this process, first its port."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    asked.send(store.port)
    with suppress(EOFError):  # nobody asks any more
        while asked.recv():
            asked.send(time.process_time())


@contextmanager
def served() -> Iterator[tuple[dist.Store, Callable[[], float]]]:
    """A connection to a store in a process of its own, and that process's CPU seconds."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of what can be read

    def seconds() -> float:
        here.send(True)
        found: float = here.recv()
        return found

    try:
        yield dist.TCPStore("127.0.0.1", here.recv(), is_master=False), seconds
    finally:
        here.close()
        process.join()


def period_of(processes: int) -> float:
    """Seconds between two readings of a watchdog, by a run's defaults."""
    guard = Guard()
    return Watchdog(Axis(size=processes), guard.timeout, guard.long_timeout).publish_period


def measured(processes: int, turns: int) -> Load:
    keys = [_key(rank) for rank in range(processes)]
    state = State(host="node-0000.cluster", step=10**5, doing="computing", num_published=10**5)
    state.sequences = {str(group): 10**6 for group in range(GROUPS)}
    line = json.dumps(vars(state))
    with served() as (store, seconds):
        for key in keys:
            store.set(key, line)
        found = []
        for turn in (
            lambda: store.multi_get(keys),
            lambda: store.check(keys),
            lambda: [store.check([k]) for k in keys],
        ):
            turn()
            began = seconds()
            for _ in range(turns):
                turn()
            found.append((seconds() - began) / turns)
    reading, asking, each = found
    return Load(reading, asking, each, period_of(processes))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=positives, default="64,512,2048,4096", help="(%(default)s)")
    parser.add_argument("--turns", type=positive, default=20, help="readings that are averaged (%(default)s)")
    options = parser.parse_args()
    print("CPU time of the store, of one process in ms, of all in s, and the period of reading, s")
    heads = ("processes", "states", "all of them", "period", "question", "all of them", "one each", "all of them")
    print("".join(f"{head:>13}" for head in heads))
    claims = {}
    for size in options.processes:
        load = measured(size, options.turns)
        reading, asking, each = (size * seconds for seconds in load[:3])
        print(
            f"{size:>13}{1e3 * load.reading:>13.2f}{reading:>13.2f}{load.period:>13.1f}{1e3 * load.asking:>13.2f}"
            f"{asking:>13.2f}{1e3 * load.asking_each:>13.2f}{each:>13.2f}", flush=True,
        )  # fmt: skip
        if size == CLAIMED:
            claims[f"busy for half of a period at most, with {size} processes"] = reading <= load.period / 2
    exit_unless(claims)


if __name__ == "__main__":
    exit_with(main)
