"""Collectives wait longer than the watchdog, which alone decides what is a hang: a start may take its time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fleet import train
from processes import run_processes

from megatron_lcl.config import Guard
from megatron_lcl.parallel.mesh import Axis, connect_on_demand, set_timeouts
from megatron_lcl.train.resilience.watchdog import timeout_of


def late(rank: int) -> str:
    """The first process comes two seconds after the time that was allowed before; in another group it does not come."""
    connect_on_demand()
    dist.init_process_group("gloo")
    other = Axis.of_group(dist.new_group(backend="gloo"))
    world = Axis.of_group(dist.group.WORLD)
    for axis in (world, other):
        axis.barrier()  # they have met: gloo does not end by itself to wait for a connection
    set_timeouts(1.0)
    if rank == 1:
        with pytest.raises(RuntimeError, match="Timed out"):
            other.broadcast_object("")
    set_timeouts(60.0)
    if rank == 0:
        time.sleep(3.0)
    heard = world.broadcast_object("late" if rank == 0 else "")
    dist.destroy_process_group()
    return heard


def test_a_timeout_is_that_which_was_set_last() -> None:
    assert run_processes(late, 2) == ["late", "late"]


def look(rank: int, folder: str) -> None:
    """Writes the timeouts of all groups when the first process begins to look where to go on, and at the first step."""
    from megatron_lcl.train import run
    from megatron_lcl.train.step import Stepper

    def note(name: str) -> None:
        groups = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_names]
        seconds = sorted({group.options._timeout.total_seconds() for group in groups})
        (Path(folder) / f"{name}-{rank}").write_text(f"{len(groups)} groups: {seconds}")

    resolve, start = run.resolve_resume_point, Stepper.start
    run.resolve_resume_point = lambda *arguments: note("start") or resolve(*arguments)  # type: ignore[func-returns-value]
    Stepper.start = lambda *arguments: note("step") or start(*arguments)  # type: ignore[method-assign, func-returns-value]


def test_all_groups_of_a_run_wait_longer_than_its_watchdog(config_file: str, tmp_path: Path) -> None:
    """Also those that DeepSpeed has made by the first step; but for the day in which a checkpoint is written."""
    words = ["--config", config_file, "--train.steps", "1", "--guard.timeout", "12", "--guard.long_timeout", "3000"]
    train(tmp_path / "run", *words, plant=look, planted=(str(tmp_path),))
    for rank in range(2):
        assert (tmp_path / f"start-{rank}").read_text() == "1 groups: [3012.0]"
        assert (tmp_path / f"step-{rank}").read_text() == "3 groups: [3012.0, 86400.0]"


def test_a_timeout_of_the_user_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    for guard in (Guard(), Guard(timeout=5000.0)):
        assert timeout_of(guard) > max(guard.timeout, guard.long_timeout)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "5")
    assert timeout_of(Guard()) == 300.0
