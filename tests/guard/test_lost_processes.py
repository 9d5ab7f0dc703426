"""A process that dies or hangs: the others end within the timeout and name it; nobody is left."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from pathlib import Path

import pytest
from fleet import Fleet, alive, descendants, last_step, losses, train
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl.train.watch import suspects

LOST, TIMEOUT = 71, 12.0
LONG = ["--train.steps", "2000", "--checkpoint.every", "0", "--guard.timeout", str(TIMEOUT)]


def hang(rank: int, guilty: int, where: str, mark: str) -> None:
    """One process never comes back from its fifth step, or from reading its data."""
    from megatron_lcl.data.loader import PackedLoader
    from megatron_lcl.train.step import Stepper

    if rank != guilty:
        return
    cls, name = (Stepper, "run") if where == "computing" else (PackedLoader, "_batches")
    plain, calls = getattr(cls, name), []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 5:
            Path(mark).touch()
            time.sleep(3600)
        return plain(self, *arguments)

    def batches(self):  # type: ignore[no-untyped-def]
        for i, batch in enumerate(plain(self)):
            if i == 8:  # two of each step
                Path(mark).touch()
                time.sleep(3600)
            yield batch

    setattr(cls, name, run if where == "computing" else batches)


def slow_start(rank: int) -> None:
    """A first step, and saves, that take longer than the timeout."""
    from megatron_lcl.train import checkpointer
    from megatron_lcl.train.step import Stepper

    plain, write, calls = Stepper.run, checkpointer.write_files, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 1 and rank == 1:
            time.sleep(TIMEOUT + 1)
        return plain(self, *arguments)

    def write_files(*arguments):  # type: ignore[no-untyped-def]
        if rank == 0:
            time.sleep(TIMEOUT + 1)
        return write(*arguments)

    Stepper.run, checkpointer.write_files = run, write_files  # type: ignore[method-assign]


def fail(rank: int) -> None:
    """The second process meets an error of its own."""
    from megatron_lcl.train.step import Stepper

    plain, calls = Stepper.run, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 5 and rank == 1:
            raise RuntimeError("cosmic ray")
        return plain(self, *arguments)

    Stepper.run = run  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed(killed: int, config_file: str, undisturbed: list[tuple], tmp_path: Path) -> None:
    """Process 0 keeps the store over which the others watch."""
    run = tmp_path / "run"
    with Fleet(run, "--config", config_file, *LONG) as fleet:
        fleet.wait_for_step(5)
        loaders = [*descendants(fleet.pid(0)), *descendants(fleet.pid(1))]
        step, began = last_step(run), time.monotonic()
        os.kill(fleet.pid(killed), signal.SIGKILL)
        codes = fleet.wait(TIMEOUT)
        assert codes[killed] == -signal.SIGKILL
        assert codes[1 - killed] == LOST, fleet.said()
        assert time.monotonic() - began < TIMEOUT
        said = fleet.said()
        deadline = time.monotonic() + 12  # torch's loader processes look after their parent every 5 seconds
        while alive(loaders) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not alive(loaders)
    named = re.search(rf"process {killed} .*last step done: (\d+)\)", said)
    assert named, said
    assert abs(int(named[1]) - step) <= 60  # it goes on while we read, and speaks once a second


@pytest.mark.slow
@pytest.mark.parametrize(("guilty", "where"), [(1, "computing"), (0, "reading data")])
def test_a_process_that_hangs(guilty: int, where: str, config_file: str, tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "hangs"
    words = ["--config", config_file, *LONG, "--train.global_batch", "6"]
    with Fleet(run, *words, size=3, plant=hang, planted=(guilty, where, str(mark))) as fleet:
        fleet.wait_for(mark.exists)
        assert fleet.wait(TIMEOUT) == [LOST] * 3, fleet.said()
        for log in fleet.logs:
            named = re.search(r"megatron-lcl: (.*?)\. ", log.read_text())
            assert named, fleet.said()
            assert f"process {guilty} hangs while {where} (host" in named[1]
            assert "last step done: 4)" in named[1]


@pytest.mark.slow
def test_a_process_that_is_frozen(config_file: str, tmp_path: Path) -> None:
    """Not even its watching threads run: the machine is out of memory, or the process is stopped."""
    with Fleet(tmp_path / "run", "--config", config_file, *LONG) as fleet:
        fleet.wait_for_step(5)
        os.kill(fleet.pid(0), signal.SIGSTOP)
        fleet.processes[1].join(TIMEOUT)
        assert fleet.processes[1].exitcode == LOST, fleet.said()
        assert re.search(r"process 0.*last step done: \d+\)", fleet.said()), fleet.said()


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_the_others(config_file: str, tmp_path: Path) -> None:
    with Fleet(tmp_path / "run", "--config", config_file, *LONG, plant=fail) as fleet:
        assert fleet.wait(TIMEOUT + 30) == [LOST, 1], fleet.said()
        said = fleet.said()
    assert "process 1 failed while computing" in said
    assert "last step done: 4): RuntimeError: cosmic ray" in said
    assert said.count("Traceback (most recent call last):") == 1


@pytest.mark.slow
def test_a_long_first_step_and_long_saves_are_no_hang(
    config_file: str, undisturbed: list[tuple], tmp_path: Path
) -> None:
    words = ["--config", config_file, "--checkpoint.every", "0", "--checkpoint.background", "false"]
    train(tmp_path / "run", *words, "--guard.timeout", str(TIMEOUT), plant=slow_start)
    assert losses(tmp_path / "run") == undisturbed


def test_who_is_waited_for() -> None:
    assert suspects({0: {"world": 7}, 1: {"world": 6}, 2: {"world": 7}}) == [1]
    assert suspects({0: {"world": 7}, 1: {"world": 7}}) == []
    # 3 waits for 2 in their stage, 2 for 1 in theirs: 1 is the cause
    chain = {0: {"a": 4, "x": 9}, 1: {"a": 3, "y": 5}, 2: {"b": 3, "y": 6}, 3: {"b": 4, "x": 9}}
    assert suspects(chain) == [1]


@given(st.integers(2, 9), st.integers(0, 8), st.integers(1, 99))
@settings(deadline=None)
def test_whoever_stops_first_is_named(size: int, guilty: int, count: int) -> None:
    """The others each stop at the next collective of a ring of groups that ends at the guilty one."""
    order = [(guilty + i) % size for i in range(size)]
    groups: dict[int, dict[str, int]] = {rank: {} for rank in order}
    for before, after in itertools.pairwise(order):
        groups[before][f"{before}-{after}"], groups[after][f"{before}-{after}"] = count, count + 1
    assert suspects(groups) == [order[0]]
