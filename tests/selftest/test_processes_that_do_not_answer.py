"""The selftest when a process, a host or a program does not answer: it is named, and nobody waits for ever."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from processes import run_processes

from megatron_lcl.errors import UserError
from megatron_lcl.parallel.mesh import Axis, Mesh, set_timeouts
from megatron_lcl.selftest import run, worker
from megatron_lcl.selftest.cases import Case
from megatron_lcl.selftest.run import selftest
from megatron_lcl.selftest.worker import GroupError, check_group
from megatron_lcl.train.launch_store import exchange_in_store

TENSOR = Case(tensor=2)


def run_where_one_lacks(rank: int, lacking: int) -> tuple[list[str], list[str]]:
    """The cases that a process of two starts, and what it says, where one machine has no compiler."""
    started, said = [], []

    def start(case: Any, *_: Any) -> tuple[None, list[str]]:
        started.append(case.name)
        return None, []

    lacks = "no compiler" if rank == lacking else None
    with patch.object(run, "_start", start), patch.object(run, "compile_fault", lambda _: lacks):
        selftest([Case(compiled=True), Case(), TENSOR], timeout=60, say=said.append)
    return started, said


@pytest.mark.parametrize("lacking", [0, 1])
def test_all_programs_run_the_same_cases(lacking: int) -> None:
    """Where one machine lacks what a case needs, and the other has it."""
    (first, said), (second, _) = run_processes(run_where_one_lacks, 2, lacking)
    assert first == second
    assert len(first) == (3 if lacking else 2)
    assert ("no compiler: its layouts are skipped" in said) == (lacking == 0)


def fall_silent(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def fall_silent_in_the_tensor_group(rank: int) -> None:
    check = worker.check_group

    def silent(axis: Any, name: str, *arguments: Any) -> None:
        if rank == 1 and name == "tensor":
            os.kill(os.getpid(), signal.SIGSTOP)
        check(axis, name, *arguments)

    worker.check_group = silent


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fall_silent, fall_silent_in_the_tensor_group])
def test_a_process_that_does_not_answer_is_named(fault: Callable[[int], None]) -> None:
    (verdict,) = selftest([Case(tensor=2)], prepare=fault, timeout=60, say=lambda _: None)
    assert "process 1 did not answer" in verdict.faults[0], verdict


def check_with_a_silent_host(rank: int) -> str:
    """Process 1 answers in every group, and then in that of its device alone; what is said of it."""
    dist.init_process_group("gloo")
    with patch.object(dist, "get_backend", lambda *_: "nccl"):  # as on GPUs; here both groups are gloo
        mesh = Mesh.of_lists({"tensor": [[0, 1]], "data": [[0], [1]]})
    store: Any = dist.distributed_c10d._get_default_store()
    for name in ("world", "tensor", "data"):
        check_group(getattr(mesh, name), name, store, 60)
    said, again = "", dist.PrefixStore("again", store)
    if rank == 1:
        check_group(dataclasses.replace(mesh.tensor, host_group=None), "tensor", again, 60)
        again.wait(["said"], timedelta(seconds=60))
        again.set("left", "")
    else:
        check_group(dataclasses.replace(mesh.tensor, host_group=None), "tensor", again, 60)
        with pytest.raises(GroupError) as error:
            check_group(dataclasses.replace(mesh.tensor, group=None), "tensor", again, 3)
        said = str(error.value)
        again.set("said", "yes")
        again.wait(["left"], timedelta(seconds=60))  # it serves the store
    dist.destroy_process_group()
    return said


def test_a_host_that_does_not_answer_is_named() -> None:
    """Where hosts have groups of their own, beside those of devices."""
    said = run_processes(check_with_a_silent_host, 2)[0]
    assert said.startswith("tensor host group [0, 1]: process 1 did not answer"), said


def check_with_failing(rank: int, failing: tuple[int, ...], takes_part: bool = True) -> str:
    """What is said where some get an error from a collective, in which they take part or not: then the others wait."""
    dist.init_process_group("gloo")
    dist.barrier()  # all begin together
    seconds = 60 if takes_part else 20
    set_timeouts(seconds)
    store: Any = dist.distributed_c10d._get_default_store()
    all_gather = dist.all_gather

    def broken(*arguments: Any, **named: Any) -> Any:
        if takes_part:
            all_gather(*arguments, **named).wait(timedelta(seconds=60))
        raise RuntimeError("the link is down")

    gather = patch.object(dist, "all_gather", broken if rank in failing else all_gather)
    with gather, pytest.raises(GroupError) as error:
        check_group(Axis.of_all(), "world", store, seconds)
    ends = [f"ended {r}" for r in range(dist.get_world_size())]
    store.set(ends[rank], "")
    store.wait(ends, timedelta(seconds=60))
    store.set(f"left {rank}", "")
    if rank == 0:  # it serves the store
        store.wait([f"left {r}" for r in range(dist.get_world_size())], timedelta(seconds=60))
    dist.destroy_process_group()
    return str(error.value)


@pytest.mark.parametrize(("failing", "named"), [((0, 1), "processes 0, 1, first in process [01]"), ((1,), "process 1")])
def test_a_process_in_which_a_collective_fails_has_answered(failing: tuple[int, ...], named: str) -> None:
    """Also where the others were done with it before."""
    said, again = run_processes(check_with_failing, 2, failing)
    assert said == again
    expected = rf"world group \[0, 1\]: all answer, but a collective failed in {named}: the link is down"
    assert re.fullmatch(expected, said), said


@pytest.mark.slow
def test_those_who_wait_for_a_process_in_which_a_collective_fails_at_once_have_answered() -> None:
    """They say so only when it has lasted too long for them; what is told is what went wrong before."""
    said = "world group [0, 1, 2]: all answer, but a collective failed in processes 0, 1, 2, first in process 1: "
    assert run_processes(check_with_failing, 3, (1,), False) == [f"{said}the link is down"] * 3


class Counted:
    """A store that counts the requests."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.requests = store, 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


def test_many_processes_ask_the_store_little() -> None:
    """All of them ask one server."""
    store = Counted(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    for rank in range(1, 512):
        store.store.set(f"group {rank}", f"says {rank}")
    said = exchange_in_store(store, "group", 0, range(512), "says 0", 60.0)  # type: ignore[arg-type]
    assert said == {rank: f"says {rank}" for rank in range(512)}
    assert store.requests <= 3
    said = exchange_in_store(store, "group", 0, range(513), "says 0", 0.1)  # type: ignore[arg-type]
    assert said == {rank: f"says {rank}" for rank in range(512)}
    assert store.requests <= 3 + 4 + 2 * 10, "each halving asks twice"


def pass_at_a_distance(rank: int) -> int:
    """Cases that pass at once; what the store says is read a second later by all but the process that serves it."""

    class Distant(dist.PrefixStore):
        def wait(self, *arguments: Any) -> None:
            super().wait(*arguments)
            time.sleep(1.0)

    with patch.object(run, "_start", lambda *_: (None, [])):
        if rank == 0:
            return len(selftest([TENSOR], timeout=60))
        with patch.object(dist, "PrefixStore", Distant):
            return len(selftest([TENSOR], timeout=60))


def test_the_process_that_serves_the_store_ends_last() -> None:
    """Under srun that is the first one, whose node hears of a key before the others do."""
    assert run_processes(pass_at_a_distance, 3) == [2, 0, 0]


def test_one_process_needs_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where something else has left RANK and WORLD_SIZE."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(run, "_start", lambda *_: (None, []))
    lines: list[str] = []
    assert len(selftest([Case(), TENSOR], timeout=60, say=lines.append)) == 1
    assert lines[0] == "1 process, gloo; skipped, for they need more: 1 layout"
    assert lines[-1].endswith("(1 process, gloo) (1 skipped)")


def test_a_program_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the others have found."""
    monkeypatch.setattr(run, "GRACE", 0.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert run._of_everyone(dist.PrefixStore("case 0", store), ["gradients"], 0, [0, 1], 0.1) == (
        ["gradients", "the program that starts process 1 does not answer"],
        True,
    )


@pytest.mark.parametrize("lost", [False, True])
def test_a_first_program_that_never_says_what_it_lacks_is_named(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """Be it late, or gone with the store that it served."""
    monkeypatch.setattr(run, "GRACE", 0.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, wait_for_workers=False)
    if lost:
        del store
    with pytest.raises(UserError, match=r"program that starts process 0 does not answer: .* --timeout"):
        run._lacks_of_first([Case()], client, False, 0.3)
