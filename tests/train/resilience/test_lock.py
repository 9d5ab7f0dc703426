"""Two runs never share a run folder."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from audit_lines import read_audit
from clocks import set_back
from fleet import Fleet, alive, last_step, losses, train

from megatron_lcl.errors import UserError
from megatron_lcl.run_folder import LOCK
from megatron_lcl.train import resume_point
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.resilience import lock
from megatron_lcl.train.resilience.lock import lock_run_folder

LONG = ["--train.steps", "2000", "--checkpoint.every", "2"]


def impatient(rank: int) -> None:
    """A second of patience."""
    lock.PATIENCE_SECONDS = 1.0


def name_of(pid: int) -> str:
    """A pattern for what a process of this machine writes into the lock file."""
    return rf"process {pid} \([0-9a-f]{{8}}\) on {re.escape(socket.gethostname())}"


@pytest.mark.slow
def test_a_second_run_is_refused_and_changes_nothing(config_file: str, tmp_path: Path) -> None:
    """Neither the first one's metrics nor the saves that it is writing."""
    run, second = tmp_path / "run", tmp_path / "second" / "run"
    second.parent.mkdir()
    second.symlink_to(run)
    with Fleet(run, "--config", config_file, *LONG) as fleet:
        fleet.wait_for_step(3)
        said = train(second, "--config", config_file, *LONG, code=2, plant=impatient)
        holder = name_of(fleet.pid(0))
        assert re.search(f"is in use by {holder}; waiting up to 1 s", said)
        assert said.count("megatron-lcl train:") == 1
        assert re.search(f"is in use by {holder}; end that run, or name another folder", said)
        at = last_step(run)
        fleet.wait_for_step(at + 3)
        os.kill(fleet.pid(0), signal.SIGTERM)
        assert fleet.wait() == [75, 75], fleet.said()
    assert [step for step, *_ in losses(run)] == list(range(1, last_step(run) + 1))
    assert [line["event"] for line in read_audit(run)] == ["stopped"], "every save was complete"
    assert all(checkpoint.verify(folder) == [] for folder in checkpoint.list_checkpoints(run))


def test_the_lock_is_waited_for_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from megatron_lcl.train.resilience.lock import *\n"
         f"with lock_run_folder(Path({str(tmp_path)!r})): print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdout.readline()
    say, end = lock._say_waiting, holder.stdin.close
    monkeypatch.setattr(lock, "_say_waiting", lambda *arguments: (say(*arguments), end()))
    with lock_run_folder(tmp_path):
        assert holder.wait(60) == 0
    assert re.search(f"in use by {name_of(holder.pid)}; ", capfd.readouterr().err)
    with lock_run_folder(tmp_path):
        assert re.fullmatch(name_of(os.getpid()), (tmp_path / LOCK).read_text())


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_run_folder(tmp_path):
        pass
    assert capfd.readouterr().err.count("cannot be locked (Function not implemented)") == 1


def apart(rank: int, places: str, unreadable: bool) -> None:
    """Each process is another machine's, where the same name is of another folder.

    unreadable: nor can the first one read what it has written.
    """
    place = Path(places) / str(rank)
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    os.environ["SLURMD_NODENAME"] = f"node-{rank}"
    if unreadable:
        resume_point.holder_of = stale  # type: ignore[assignment]


def stale(run: Path) -> str:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(run / LOCK))


@pytest.mark.slow
def test_machines_that_do_not_share_the_run_folder_are_named(config_file: str, tmp_path: Path) -> None:
    """Before anything is written or claimed for the run, and before the watchdog ends the machine that waits."""
    command = ["train", "--config", config_file, "--train.output", "run"]
    command += ["--guard.timeout", "30", "--guard.long_timeout", "30"]
    places = tmp_path / "places"
    said = train(tmp_path / "run", command=command, code=2, plant=apart, planted=(str(places), False))
    assert "train.output = run is another folder on node-1 than on node-0, " in said
    assert "name a folder that all nodes share" in said
    assert [file.name for file in (places / "0" / "run").iterdir()] == [LOCK]
    said = train(tmp_path / "run", command=command, code=2, plant=apart, planted=(str(places), True))
    assert "Stale file handle" in said


def test_a_lock_file_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a machine that has looked before does not see it at once."""
    file = tmp_path / LOCK
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 30:
            file.write_text("process 7 on another" if now[0] < 50 else "process 8 on another")

    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    assert lock.sees_lock(tmp_path, "process 8 on another", 1200)
    assert 50 <= now[0] < 51
    assert not lock.sees_lock(tmp_path, "process 9 on another", 1200)
    assert 120 <= now[0] < 122
    assert not lock.sees_lock(tmp_path, "process 9 on another", 20)
    assert 140 <= now[0] < 143, "the watchdog would end it"


def refused(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


class OtherMachine:
    """Another machine's run, which touches the lock file late, after two and a half heartbeats, and has ended in order
    when it has touched it so many times. It stands in for the module `time`: the clock goes on while one sleeps, and
    only then."""

    every = 2.5 * lock.HEARTBEAT_SECONDS

    def __init__(self, file: Path, touches: float) -> None:
        self.file, self.touches, self.now, self.killed = file, touches, 0.0, False
        file.write_text("process 7 on another")

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        number = int(self.now / self.every)
        if number > self.touches:
            self.file.write_text("")
        elif not self.killed:
            os.utime(self.file, (number, number))


@pytest.mark.parametrize("how", ["not coherent", "refused"])
def test_a_run_on_another_machine_is_known_to_live_where_locks_do_not_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "refused":
        monkeypatch.setattr(fcntl, "flock", refused)
    other = OtherMachine(tmp_path / LOCK, math.inf)
    monkeypatch.setattr(lock, "time", other)
    with pytest.raises(UserError, match="in use by process 7 on another"), lock_run_folder(tmp_path):
        pass
    other.killed = True
    with lock_run_folder(tmp_path):  # it is dead, though it could not say so
        assert re.fullmatch(name_of(os.getpid()), (tmp_path / LOCK).read_text())
    assert (tmp_path / LOCK).read_text() == ""


def test_a_run_that_is_ending_on_another_machine_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = OtherMachine(tmp_path / LOCK, touches=2)
    monkeypatch.setattr(lock, "time", other)
    with lock_run_folder(tmp_path):
        assert other.now > 2 * other.every
    assert "in use by process 7 on another; waiting up to 30 s" in capfd.readouterr().err


def test_who_has_the_run_folder_touches_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_back(monkeypatch)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with lock_run_folder(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.timeout(120)
def test_who_was_stopped_ends_where_another_has_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, time\n"
        "from megatron_lcl.train.resilience import lock\n"
        "lock.HEARTBEAT_SECONDS = 0.1\n"
        "with lock.lock_run_folder(lock.Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        os.kill(holder.pid, signal.SIGSTOP)
        monkeypatch.setattr(fcntl, "flock", refused)
        monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
        with lock_run_folder(tmp_path):
            name = (tmp_path / LOCK).read_text()
            assert re.fullmatch(name_of(os.getpid()), name)
            os.kill(holder.pid, signal.SIGCONT)
            _, said = holder.communicate(timeout=30)
            assert holder.returncode == 71
            assert said == f"megatron-lcl: train.output = {tmp_path} was taken over by {name}\n"
            assert (tmp_path / LOCK).read_text() == name
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("same", [False, True])
def test_who_ends_leaves_the_name_of_who_has_the_run_folder_now(same: bool, tmp_path: Path) -> None:
    """same: a container that was made again, whose process has the number and the host's name of the one before."""
    other = f"process {os.getpid()} (00000000) on {socket.gethostname()}" if same else "process 7 on another"
    with lock_run_folder(tmp_path):
        (tmp_path / LOCK).write_text(other)
    assert (tmp_path / LOCK).read_text() == other


@pytest.mark.parametrize("how", ["left", "killed"])
def test_processes_that_live_on_do_not_hold_the_lock(how: str, tmp_path: Path) -> None:
    """Loader processes, which are forked while the run holds it."""
    program = (
        "import os, sys, time\n"
        "from multiprocessing import get_context\n"
        "from megatron_lcl.train.resilience import lock\n"
        "with lock.lock_run_folder(lock.Path(sys.argv[1])):\n"
        "    loader = get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    loader.start()\n"
        "    if sys.argv[2] == 'killed':\n"
        "        print(loader.pid, flush=True); time.sleep(60)\n"
        "print(loader.pid, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), how], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    loader = int(holder.stdout.readline())
    if how == "killed":
        holder.kill()
        holder.wait()
    try:
        with lock_run_folder(tmp_path):
            assert alive([loader]) == [loader]
    finally:
        os.kill(loader, signal.SIGKILL)
        holder.kill()
        holder.wait()
