"""Every process watches every other: one that dies or hangs ends the run with a message that names it.

Each process writes its state into the store of torch.distributed, over a connection of its own, and reads
those of all others. Threads do both, so a main thread that waits in a collective forever is no obstacle.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_lcl.config import Guard
from megatron_lcl.errors import RunError
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.launch import say_watched
from megatron_lcl.train.launch_store import keys_set
from megatron_lcl.train.resilience.faults import code_of, is_distributed, is_local, name_nodes, node
from megatron_lcl.train.resilience.signals import Stopped, leave
from megatron_lcl.train.resilience.start import LOST
from megatron_lcl.units import counted
from megatron_lcl.waiting import wait_for

PERIOD_SECONDS = 1.0
SUSPICION_SECONDS = 8.0
"""a process that is silent for so long is dead, once a collective has failed here"""
_WAITING = ("/torch/distributed/", f"{os.sep}megatron_lcl{os.sep}parallel{os.sep}mesh.py")
"""code in which a process waits for others"""


@dataclass
class State:
    """What a process says about itself."""

    host: str = ""
    """its name, or that of the node in Slurm"""
    step: int = 0
    """steps done"""
    doing: str = "starting"
    waiting: float = 0.0
    """seconds since the last heartbeat of its main thread, by `RunningTime`"""
    limit: float = math.inf
    """how many of them are no hang, in what it does"""
    sequences: dict[str, int] = field(default_factory=dict)
    """collectives begun in each process group in which its main thread may wait"""
    location: str = ""
    """file, line and function that the main thread is in, once it waits"""
    with_others: bool = False
    """whether it waits there for other processes"""
    num_published: int = 0
    """how often it has published this"""
    ended: bool = False
    error: str = ""
    """what went wrong here and not everywhere, before the end or with it"""
    code: int = LOST
    """exit code of the others where something went wrong"""
    broken: bool = False
    """whether this machine is to blame for it"""

    def at(self) -> str:
        """Where the process was, for a message."""
        location = f" at {self.location}" if self.location else ""
        return f"{self.doing}{location} (host {self.host}, last step done: {self.step})"


class Fault(NamedTuple):
    """What has gone wrong in a run, as one process sees it."""

    message: str
    nodes: list[str]
    """where, as far as that can be told"""
    code: int = LOST
    """exit code of those who see it"""


def timeout_of(guard: Guard) -> float:
    """Seconds after which a collective may fail by itself: when a watchdog has long ended what hangs.

    DEEPSPEED_TIMEOUT (minutes) is the user's: under the watchdog's, torch is the first to end it, and keeps a record.
    """
    minutes = os.environ.get("DEEPSPEED_TIMEOUT")
    return 60.0 * float(minutes) if minutes else guard.timeout + guard.long_timeout


class RunningTime:
    """Seconds, of which not more than `most` pass between two looks: a thread looks more often while the process runs.

    What stops a process (SIGSTOP, a freezer, `scontrol suspend`) also stops what it would hear and say. A job that is
    stopped as a whole has nobody to blame for that time.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._looked = self._seconds = time.monotonic()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._looked, self._most)
            self._looked = now
            return self._seconds


class Watchdog:
    """Publishes this process's state and reads those of the others.

    timeout: seconds from a fault to the end of the other processes.
    long_timeout: the same (but not below it) for a hang before the first step, in it, or inside `long_phase`. A process
    that dies there is noticed within `timeout` all the same.
    """

    def __init__(
        self,
        world: Axis,
        timeout: float,
        long_timeout: float,
        store: dist.Store | None = None,
        settings: tuple[str, str] = ("guard.timeout", "guard.long_timeout"),
    ) -> None:
        """store: in place of that of the process group, which may then still have to be made. settings: that the two
        timeouts are set by, for messages."""
        self.rank = world.rank
        self.size = world.size
        self._store: Any = store
        self.timeout = timeout
        self._settings = f"{settings[0]} = {timeout:g} s", f"{settings[1]} = {long_timeout:g} s"
        self.period = min(PERIOD_SECONDS, timeout / 20)
        # one server answers them all; but seeing a fault, everywhere, may take half of the time at most
        self.publish_period = min(self.period * max(1.0, self.size / 64), timeout / 14)
        self.limit = timeout - 7 * self.publish_period
        self.long_limit = max(timeout, long_timeout) - 7 * self.publish_period
        self._state = State(host=node())
        self._first: int | None = None
        self._now = RunningTime(2 * self.publish_period)
        self._since = self._now(), self.long_limit
        """when the last heartbeat was, and how many seconds from then on are no hang"""
        self._others: dict[int, tuple[State, float]] = {}
        self._last_contact = self._last_read = self._now()
        """when the store last answered, and when it last gave what the others had published"""
        self._unread = 0.0
        """seconds from the last read until the store was found to be gone, whether this process ran or not"""
        self._suspicious = False
        self._error: BaseException | None = None
        """with which this process ends"""
        self._closing = threading.Event()
        self._left_out: Callable[[], dist.ProcessGroup | None] = lambda: None

    # --- the main thread's side ---

    def heartbeat(self, step: int, doing: str) -> None:
        """The main thread works: so many steps are done, and this is what it does next.

        The first step may take long, for what is compiled or cached in it.
        """
        self._first = step if self._first is None else self._first
        self._state.step = step
        self._set_phase(doing, self.limit if step != self._first else self.long_limit)

    @contextlib.contextmanager
    def long_phase(self, step: int, doing: str) -> Iterator[None]:
        """Work that may take long, until the next `heartbeat`: saving, evaluating. step: as there."""
        self._state.step = step
        self._set_phase(doing, self.long_limit)
        yield

    def leave_out(self, group: Callable[[], dist.ProcessGroup | None]) -> None:
        """Do not count the collectives of the group that this gives at a time, if any: another thread begins them, and
        the main thread does not wait for them. Who is behind in them holds up nobody."""
        self._left_out = group

    def left(self) -> float:
        """Seconds that the main thread may still wait in what it does, and have the others hear of it in time."""
        since, limit = self._since
        return limit - (self._now() - since) - 3 * self.publish_period

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """The others know of an error inside at once, and wait: what this process then leaves may take long, above all
        a save in the background, which all of them finish, and its copy."""
        try:
            yield
        except BaseException as error:
            self._set_phase(self._state.doing, self.long_limit)
            if not is_distributed(error):  # which has its cause in another process
                self._ends_with(error)
            raise

    def _ends_with(self, error: BaseException | None) -> None:
        self._error = error
        together = error is None or isinstance(error, RunError | Stopped)
        self._state.code, self._state.broken = code_of(error), is_local(error)
        self._state.error = "" if together else f"{type(error).__name__}: {error}"

    def _set_phase(self, doing: str, limit: float) -> None:
        self._state.doing = doing
        self._since = self._now(), limit

    def __enter__(self) -> Watchdog:
        if self.size > 1:
            store: Any = self._store or dist.distributed_c10d._get_default_store()
            self._store = store.clone()
            self._publish()  # at once: the others know nothing of one that stops before its first turn
            for loop in (self._publish_and_read, self._end_on_fault):
                threading.Thread(target=loop, daemon=True).start()
        say_watched(self.timeout)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.size == 1:
            return
        if is_distributed(error):  # `_end_on_fault` names the cause and ends this process
            self._set_phase(f"{self._state.doing}; a collective has failed", math.inf)
            self._suspicious = True
            time.sleep(self.limit)
        self._closing.set()
        self._ends_with(error)
        self._state.ended = True
        with contextlib.suppress(RuntimeError):
            self._publish()
        if self._state.error:
            time.sleep(3 * self.publish_period)  # this may be the process that serves the store

    # --- the threads ---

    def _publish_and_read(self) -> None:
        read = time.monotonic()
        while not wait_for(self._closing, self.publish_period):
            try:
                self._publish()
                unseen = {_key(r): r for r in range(self.size) if r != self.rank and r not in self._others}
                others = [*self._others, *(unseen[key] for key in keys_set(self._check, list(unseen)))]
                lines = self._store.multi_get([_key(r) for r in others]) if others else []
            except dist.DistStoreError:  # no answer in the store's own time, which passes while a job is suspended
                continue
            except RuntimeError:  # the store is gone, and with it process 0 or the launcher: see `_fault`
                self._unread = time.monotonic() - read
                for state, _ in self._others.values():
                    # it has waited for long: process 0 may have ended for that, when this one could not look
                    state.waiting += self._unread if state.location else 0.0
                return
            read = time.monotonic()
            self._last_contact = self._last_read = now = self._now()
            for rank, line in zip(others, lines, strict=True):
                state = State(**json.loads(line))
                before = self._others.get(rank)
                if before is None or before[0].num_published != state.num_published:
                    self._others[rank] = state, now

    def _check(self, keys: list[str]) -> bool:
        all_set: bool = self._store.check(keys)
        self._last_contact = self._now()
        return all_set

    def _publish(self) -> None:
        state = self._state
        state.num_published += 1
        since, limit = self._since
        state.waiting = self._now() - since  # set before the limit: the other thread reads both
        state.limit = limit
        state.sequences = _sequences(self._left_out())
        state.location, state.with_others = _location() if state.waiting > state.limit / 2 else ("", False)
        self._store.set(_key(self.rank), json.dumps(state.__dict__))

    def _end_on_fault(self) -> None:
        while not wait_for(self._closing, self.period):
            fault = self._fault()
            if fault and not wait_for(self._closing, 3 * self.publish_period):  # until the others have seen it too
                name_nodes(fault.nodes, self.rank)
                message = f"{fault.message}. Ending process {self.rank} at step {self._state.step}"
                if self._error is not None and self._state.error:  # else nobody would see it
                    message += "\n" + "".join(traceback.format_exception(self._error))
                leave(fault.code, message)

    def _fault(self) -> Fault | None:
        now, others, silence = self._now(), dict(self._others), self.limit
        if self._suspicious:
            silence = min(self.limit, max(SUSPICION_SECONDS, 5 * self.publish_period))
        own = self._state
        if self._error is not None and own.waiting > own.limit:
            said = f"process {self.rank} does not end while {own.at()}" + (", after an error" if own.error else "")
            return Fault(said, [own.host] if own.broken else [], own.code)
        for rank, (state, _) in others.items() if self._error is None else ():
            if state.error and (state.ended or state.waiting > state.limit):
                nodes = [state.host] if state.broken else []
                return Fault(f"process {rank} failed while {state.at()}: {state.error}", nodes, state.code)
        if dead := self._silent(others, now, silence):
            return dead
        if hang := self._hang(others, now):
            return hang
        if now - self._last_contact <= silence:
            return None
        said = "process 0 or the launcher, which serve the store, are gone or out of reach; process 0: "
        said += others[0][0].at() if 0 in others else "unknown"
        if self._unread > self.limit:  # they may have ended because this process was silent
            return Fault(f"{said}. This process was itself stopped for {self._unread:.0f} s", [])
        return Fault(said, [others[0][0].host] if 0 in others else [])

    def _hang(self, others: dict[int, tuple[State, float]], now: float) -> Fault | None:
        states = {self.rank: self._state, **{rank: state for rank, (state, _) in others.items()}}
        states = {rank: state for rank, state in states.items() if not state.ended}
        if any(state.error for state in states.values()):
            return None  # it is yet to end, and nobody can go on until then
        late = {rank: state for rank, state in states.items() if state.waiting > state.limit}
        if not late:
            return None
        seconds = max(state.waiting for state in late.values())
        is_long = min(state.limit for state in late.values()) > self.limit
        remedy = f"({self._settings[is_long]}; raise it if this is only slow)"
        # the process that is the cause may not be late yet by the state that was last read of it
        causes = [rank for rank, state in states.items() if state.location and not state.with_others]
        if not causes or len(causes) == len(states):  # all wait, or wait for their devices
            causes = suspects({rank: state.sequences for rank, state in states.items()})
        if causes and len(causes) < len(states):
            names = "; ".join(f"process {rank} hangs while {states[rank].at()}" for rank in causes)
            said = f"{names}. The others have waited for {seconds:.0f} s {remedy}"
            return Fault(said, [states[rank].host for rank in causes])
        if dead := self._silent(others, now):  # it waited with the others when it was last heard of
            return dead
        rank, state = next(iter(late.items()))
        return Fault(
            f"no progress for {seconds:.0f} s in {counted(len(late), 'process')}, and none is behind the others: is "
            f"the network or the storage down? Process {rank} is {state.at()} {remedy}",
            [],
        )

    def _silent(self, others: dict[int, tuple[State, float]], now: float, seconds: float = 0.0) -> Fault | None:
        """Of a process of which nothing came for so long, and for three turns in which others were heard of."""
        for rank, (state, when) in others.items():
            heard = self._last_read - when > 3 * self.publish_period
            if not state.ended and now - when > seconds and heard:
                silent = f"silent for {now - when:.0f} s, while {state.at()}"
                return Fault(f"process {rank} died or its machine did: {silent}", [state.host])
        return None


def suspects(sequences: dict[int, dict[str, int]]) -> list[int]:
    """Processes that wait for no other, by the collectives that each has begun in each of its groups.

    A process that has begun more collectives in a group than another member waits for that member. One that waits for
    no other, but is waited for, is the cause.
    """
    waiting: set[int] = set()
    awaited: set[int] = set()
    for name in {name for own in sequences.values() for name in own}:
        counts = {rank: own[name] for rank, own in sequences.items() if name in own}
        waiting |= {rank for rank, count in counts.items() if count > min(counts.values())}
        awaited |= {rank for rank, count in counts.items() if count < max(counts.values())}
    return sorted(awaited - waiting)


def _key(rank: int) -> str:
    return f"megatron_lcl/watch/{rank}"


def _sequences(left_out: dist.ProcessGroup | None) -> dict[str, int]:
    """Collectives begun by this process, by group, but for one: torch counts them for its own flight recorder."""
    groups: Any = dist.distributed_c10d._world.pg_names
    counted = [(group, name) for group, name in list(groups.items()) if group is not left_out]
    return {name: group._get_sequence_number_for_group() for group, name in counted}


def _location() -> tuple[str, bool]:
    """Where the main thread is, or the thread for which it waits there, by the innermost function of this package, and
    whether that waits for other processes."""
    stacks = sys._current_frames()
    frames = list(traceback.walk_stack(stacks.get(threading.main_thread().ident or 0)))
    joins = (frame.f_locals["self"] for frame, _ in frames if frame.f_code is threading.Thread.join.__code__)
    if (thread := next(joins, None)) is not None and thread.ident in stacks:  # it writes a checkpoint, say
        frames = [*traceback.walk_stack(stacks[thread.ident]), *frames]
    # what has been started is waited for in torch's own code, without a frame, and in ours where collectives are
    waits = any(name in frame.f_code.co_filename for frame, _ in frames[:8] for name in _WAITING)
    ours = [(f, line) for f, line in frames if f"{os.sep}megatron_lcl{os.sep}" in f.f_code.co_filename]
    frame, line = (ours or frames)[0]
    return f"{os.path.basename(frame.f_code.co_filename)}:{line} in {frame.f_code.co_name}", waits
