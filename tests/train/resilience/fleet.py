"""The processes of a training run, as a launcher would start them; started fast, because they are forked from a server
that has imported everything. Faults are planted in them by a function of the test, before the command runs."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from ports import hold_port
from stacks import descendants, register, stacks_of

from megatron_lcl.train.forks import forkserver

START_SECONDS = 90.0
_POLLS = threading.Lock()
"""held where multiprocessing looks which processes have ended, as it also does where one starts: of two threads that do
so at once one finds no exit code"""


class Fleet:
    """`megatron-lcl train ARGUMENTS` in `size` processes; none is left when the `with` block ends.

    plant: called as plant(rank, *planted) in each process before the command; command: another one than `train`, with
    all its arguments.
    """

    def __init__(
        self,
        run: Path,
        *arguments: str,
        size: int = 2,
        plant: Callable[..., None] | None = None,
        planted: Any = (),
        command: Sequence[str] = (),
    ) -> None:
        context = forkserver()
        self._held = hold_port()
        self.port = self._held.getsockname()[1]
        run.parent.mkdir(parents=True, exist_ok=True)
        self.run, self.logs = run, [run.parent / f"{run.name}.{rank}.log" for rank in range(size)]
        words = list(command) or ["train", "--train.output", str(run), *arguments]
        self.processes = [
            context.Process(
                target=_work,
                args=(rank, size, self.port, words, str(self.logs[rank]), plant, planted),
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Fleet:
        for log in self.logs:
            log.write_text("")
        for process in self.processes:
            with _POLLS:
                process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is not None and self.is_alive():  # a process hangs, say
            logs = zip(self.processes, self.logs, strict=True)
            value.add_note(stacks_of({process.pid: log for process, log in logs if process.pid}))
        self.kill()
        self._held.close()
        if kind is not None:
            print(self.said())

    def kill(self) -> None:
        """SIGKILL to all, their loader processes included."""
        for process in self.processes:
            for pid in (process.pid, *descendants(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait(math.inf)

    def wait(self, timeout: float = 120.0, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Exit codes, by rank, once all (or those of `ranks`) have ended; None for one that has not, in time or yet."""
        deadline = time.monotonic() + timeout
        for process in self.processes if ranks is None else [self.processes[rank] for rank in ranks]:
            wait([process.sentinel], None if timeout == math.inf else max(0.0, deadline - time.monotonic()))
        with _POLLS:
            return [process.exitcode for process in self.processes]

    def is_alive(self) -> bool:
        """Whether any process is."""
        with _POLLS:
            return any(process.is_alive() for process in self.processes)

    def wait_for(self, done: Callable[[], bool], timeout: float = START_SECONDS) -> None:
        """Until something is seen; fails if all processes end before it, or after the timeout."""
        deadline = time.monotonic() + timeout
        while not done():
            assert self.is_alive(), f"all ended:\n{self.said()}"
            assert time.monotonic() < deadline, f"not seen after {timeout} s:\n{self.said()}"
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        """Until the metrics tell of a step."""
        self.wait_for(lambda: last_step(self.run) >= step)

    def said(self) -> str:
        """Output of all processes."""
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)

    def pid(self, rank: int) -> int:
        """A process's number."""
        pid = self.processes[rank].pid
        assert pid is not None
        return pid


def train(run: Path, *arguments: str, code: int = 0, timeout: float = 180.0, **options: Any) -> str:
    """A run to its end; what its processes said."""
    with Fleet(run, *arguments, **options) as fleet:
        codes = fleet.wait(timeout)
        assert codes == [code] * len(codes), f"{codes}\n{fleet.said()}"
        return fleet.said()


def _work(
    rank: int, size: int, port: int, words: Sequence[str], log: str, plant: Callable[..., None] | None, planted: Any
) -> None:
    register(Path(log))
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from megatron_lcl.cli import main

    if plant is not None:
        plant(rank, *planted)
    sys.exit(main(list(words)))


def line_of(said: str) -> str:
    """The one line of an error that both processes have. The first one may end before the second, to which torch then
    tells at length that the store is gone."""
    found = said.splitlines()
    if "sendBytes failed" in said:
        found = [line for line in found if line.startswith("megatron-lcl")]
    (line,) = found
    return line


def alive(pids: Sequence[int]) -> list[int]:
    """Those of them that still run. (A zombie whose parent has died is for process 1 to reap.)"""
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(pid)
    return found


def left(pids: Sequence[int], seconds: float = 15.0) -> list[int]:
    """Those of them that still run after that time; looks no longer once none does."""
    deadline = time.monotonic() + seconds
    while (found := alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def loaders_stay() -> None:
    """In a process of a fleet: its loader processes do not look every 5 seconds whether it is there, as torch's do, and
    then end by themselves: so who ends it has to end them, too."""
    from torch.utils.data._utils import worker

    worker.MP_STATUS_CHECK_INTERVAL = 60.0


def wait_while(mark: str) -> None:
    """In a process of a fleet: until the test has removed a file."""
    while Path(mark).exists():
        time.sleep(0.01)


def held_steps(rank: int, mark: str) -> None:
    """The eighth step begins when the test has removed the mark."""
    from megatron_lcl.train.step import Stepper

    plain, calls = Stepper.start, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 8:
            wait_while(mark)
        return plain(self, *arguments)

    Stepper.start = run  # type: ignore[method-assign]


def lines(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def last_step(run: Path) -> int:
    """The last step that the metrics tell of."""
    path = run / "metrics.jsonl"
    now = path.stat() if path.exists() else None
    return _last_step(run, now and (now.st_size, now.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _last_step(run: Path, _now: tuple[int, int] | None) -> int:
    return max((line["step"] for line in lines(run)), default=0)  # read where it has changed, however often asked for


def losses(run: Path) -> list[tuple[Any, ...]]:
    """What the steps gave, by step."""
    names = ("step", "loss", "contrastive", "log_scale", "grad_norm", "lr")
    return [tuple(line[name] for name in names) for line in lines(run) if "loss" in line]
