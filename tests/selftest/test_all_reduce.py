"""`selftest --all-reduce`: its bandwidth, and that whoever does not answer is named, with real processes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ports import hold_port
from train.resilience.fleet import Fleet

from megatron_lcl.cli import main
from megatron_lcl.selftest import all_reduce
from megatron_lcl.selftest.all_reduce import MIB, bus_bandwidth
from megatron_lcl.train.resilience.start import LOST

COMMAND = ("selftest", "--all-reduce", "--timeout")


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """doc/PERFORMANCE.md there: of an all-reduce, algorithm bandwidth S/t times 2(n-1)/n."""
    assert bus_bandwidth(10**9, 1.0, 2) == 1e9
    assert bus_bandwidth(2 * 10**9, 0.5, 8) == pytest.approx(1.75 * 4e9)
    # a ring's every link carries 2(n-1) chunks of S/n
    assert bus_bandwidth(16 * MIB, 1e-3, 16) == pytest.approx(2 * 15 * (16 * MIB / 16) / 1e-3)


def test_one_process_has_nothing_to_sum(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([*COMMAND, "9"]) == 0
    assert capsys.readouterr().out == "all-reduce  one process: nothing to sum\n"


def test_the_first_process_can_be_interrupted_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise AssertionError("it was not interrupted")

    monkeypatch.setattr(all_reduce, "_end", ended)  # which would end the tests
    with hold_port() as held:
        port = str(held.getsockname()[1])
        for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        interrupt, started = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)), time.monotonic()
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            all_reduce._meet(0, 2, 300.0)
        assert time.monotonic() - started < 60


def plant(rank: int, fault: str, faulty: int, faults: str) -> None:
    """Two nodes of one process each; a fault in one of them."""
    os.environ |= {
        "SLURM_STEP_NODELIST": "gpu[7-8]",
        "SLURMD_NODENAME": f"gpu{7 + rank}",
        "MEGATRON_LCL_FAULTS": faults,
    }
    if fault == "hangs by hosts":  # as on GPUs they have a group of their own; here both are gloo
        dist.get_backend = lambda *_: "nccl"  # type: ignore[assignment]
        all_reduce.SIZES["nccl"] = MIB  # what GPUs sum takes seconds here
    if fault == "stops" and rank != faulty:
        made = dist.init_process_group

        def make_slowly(*arguments: Any, **options: Any) -> None:
            """So that the other one is silent for longer than this one waits for it."""
            made(*arguments, **options)
            time.sleep(3)

        dist.init_process_group = make_slowly
    if rank != faulty:
        return
    if fault == "never comes":
        time.sleep(600)
    timed, summed = all_reduce._timed, dist.all_reduce

    def but_by_hosts(*arguments: Any, group: Any = None, **options: Any) -> Any:
        if group not in (None, dist.group.WORLD):
            time.sleep(600)
        return summed(*arguments, group=group, **options)

    def other(values: torch.Tensor) -> float:
        if fault == "hangs":
            time.sleep(600)
        if fault == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "dies":
            time.sleep(8)  # by then the other one knows it; of a sooner death srun tells the node
            os.kill(os.getpid(), signal.SIGKILL)
        seconds = timed(values)
        values[77] += 1
        return seconds

    if fault == "hangs by hosts":
        dist.all_reduce = but_by_hosts
    elif fault:
        all_reduce._timed = other


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "faulty", "seconds", "said"),
    [
        ("never comes", 1, 10, "process 1 of gpu8 has not come within 10 s"),
        ("never comes", 0, 10, "process 0 of gpu7 does not answer at 127.0.0.1:"),
        ("hangs", 1, 10, "process 1 hangs while summing over all processes at "),
        ("hangs by hosts", 1, 10, "process 1 hangs while summing over all hosts by gloo at "),
        ("stops", 1, 10, "process 1 died or its machine did: silent for "),
        ("dies", 0, 20, "process 0 or the launcher, which serve the store, are gone or out of reach"),
        ("wrong sum", 1, 30, "the sum over all processes is wrong (1 number on process 1)"),
    ],
)
def test_who_does_not_answer_is_named(fault: str, faulty: int, seconds: int, said: str, tmp_path: Path) -> None:
    """In one line of the others, and to the launch script."""
    faults = tmp_path / "faults"
    faults.mkdir()
    planted = (fault, faulty, str(faults))
    with Fleet(tmp_path / "run", command=(*COMMAND, str(seconds)), plant=plant, planted=planted) as fleet:
        answers = [rank for rank in (0, 1) if rank != faulty or fault == "wrong sum"]
        started = time.monotonic()
        codes = fleet.wait(100, answers)
        assert {codes[rank] for rank in answers} == {LOST}
        assert time.monotonic() - started < seconds + 60
        lines = [line for line in fleet.said().splitlines() if line.startswith("megatron-lcl")]
        assert "waitForInput" not in fleet.said(), "torch's warning of a wait in the store"
    assert any(said in line for line in lines), lines
    if fault != "wrong sum":
        told = {file.read_text() for file in faults.glob("fault-*")}
        assert told == {f"gpu{7 + faulty}\n"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_bandwidth_is_printed_once(tmp_path: Path) -> None:
    planted = ("", -1, str(tmp_path))
    with Fleet(tmp_path / "run", command=(*COMMAND, "30"), plant=plant, planted=planted) as fleet:
        assert fleet.wait(100) == [0, 0], fleet.said()
        lines = [line for line in fleet.said().splitlines() if line.startswith("all-reduce")]
    (line,) = lines
    found = re.fullmatch(
        r"all-reduce  2 processes on 2 nodes, gloo: 16 MiB in ([\d.e+]+) ms, bus bandwidth ([\d.]+) GB/s "
        r"\(the first one took [\d.]+ s\)",
        line,
    )
    assert found, line
    # of two processes it is the size over the time
    assert float(found[2]) == pytest.approx(16 * MIB / 1e9 / (float(found[1]) / 1e3), rel=0.02)
