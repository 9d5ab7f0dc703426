"""Signals: all processes end after the same step, with one checkpoint of it, and a code that means requeue."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
from audit_lines import read_audit
from fleet import (
    Fleet,
    alive,
    descendants,
    held_steps,
    last_step,
    left,
    lines,
    loaders_stay,
    losses,
    train,
    wait_while,
)
from processes import run_processes

from megatron_lcl.interrupts import end_with_command
from megatron_lcl.train import launch
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.resilience import signals

REQUEUE = 75
LONG = ["--train.steps", "12", "--checkpoint.every", "100"]


def held_steps_and_a_full_log(rank: int, mark: str) -> None:
    """What the process says has no room."""
    held_steps(rank, mark)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def held_saves(rank: int, mark: str) -> None:
    """The second process leaves a mark when it begins to write its first checkpoint, and waits until it is removed."""
    from megatron_lcl.train.checkpoint import checkpointer

    plain = checkpointer.write_files

    def write_files(*arguments):  # type: ignore[no-untyped-def]
        checkpointer.write_files = plain
        if rank == 1:
            Path(mark).touch()
            wait_while(mark)
        return plain(*arguments)

    checkpointer.write_files = write_files


def stuck(rank: int, mark: str) -> None:
    """The second process never comes to its fifth step."""
    loaders_stay()
    from megatron_lcl.train.step import Stepper

    plain, calls = Stepper.start, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if rank == 1 and len(calls) == 5:
            Path(mark).touch()
            time.sleep(3600)
        return plain(self, *arguments)

    Stepper.start = run  # type: ignore[method-assign]


def saved_steps(run: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run)]


def goes_on(run: Path, config_file: str, undisturbed: list[tuple]) -> None:
    assert "going on from" in train(run, "--config", config_file, *LONG)
    assert losses(run) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all(
    signum: signal.Signals, config_file: str, undisturbed: list[tuple], tmp_path: Path
) -> None:
    """SIGUSR1 also reaches the loader processes, as a scheduler sends it."""
    run, mark = tmp_path / "run", tmp_path / "hold"
    mark.touch()
    with Fleet(run, "--config", config_file, *LONG, plant=held_steps, planted=(str(mark),)) as fleet:
        fleet.wait_for_step(4)
        loaders = descendants(fleet.pid(1))
        assert loaders, "no loader process is alive"
        os.kill(fleet.pid(1), signum)
        for loader in loaders if signum == signal.SIGUSR1 else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(loader, signum)
        mark.unlink()
        assert fleet.wait() == [REQUEUE, REQUEUE], fleet.said()
        said = fleet.said()
    (step,) = saved_steps(run)
    assert 4 <= step == last_step(run) < 12
    assert f"{signum.name}: ended after step {step}" in said
    assert said.count("ended after") == 1
    assert "Traceback" not in said
    (line,) = read_audit(run)
    assert (line["event"], line["signal"], line["saved"]) == ("stopped", signum, step)
    goes_on(run, config_file, undisturbed)


@pytest.mark.slow
def test_a_signal_to_a_run_whose_log_is_on_a_full_disk(config_file: str, tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "hold"
    mark.touch()
    with Fleet(run, "--config", config_file, *LONG, plant=held_steps_and_a_full_log, planted=(str(mark),)) as fleet:
        fleet.wait_for_step(2)
        os.kill(fleet.pid(0), signal.SIGTERM)
        mark.unlink()
        assert fleet.wait() == [REQUEUE, REQUEUE]
    assert saved_steps(run) == [last_step(run)]


@pytest.mark.slow
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_signal_while_saving(background: str, config_file: str, undisturbed: list[tuple], tmp_path: Path) -> None:
    """With training waiting for the save there is one save; else steps go on beside it, and one more is due."""
    run, mark = tmp_path / "run", tmp_path / "saving"
    words = ["--config", config_file, "--checkpoint.every", "4", "--checkpoint.background", background]
    with Fleet(run, *words, plant=held_saves, planted=(str(mark),)) as fleet:
        fleet.wait_for(mark.exists)
        os.kill(fleet.pid(0), signal.SIGTERM)
        mark.unlink()
        assert fleet.wait() == [REQUEUE, REQUEUE], fleet.said()
    steps = saved_steps(run)
    assert steps == ([4] if background == "false" else sorted({4, last_step(run)}))
    assert all(checkpoint.verify(folder) == [] for folder in checkpoint.list_checkpoints(run))
    goes_on(run, config_file, undisturbed)


def slow_evaluation(rank: int, marks: str) -> None:
    """Evaluations that would take a minute; the first process leaves a mark at the second batch."""
    from megatron_lcl.train.step import Stepper

    plain, calls = Stepper.forward, []

    def forward(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2 and rank == 0:
            Path(marks).touch()
        time.sleep(1.0)
        return plain(self, *arguments)

    Stepper.forward = forward  # type: ignore[method-assign]


def break_off_evaluation(run: Path, marks: Path, words: list[str], step: int) -> None:
    """By a signal to one process of a run; what was due at that step is saved before."""
    with Fleet(run, *words, plant=slow_evaluation, planted=(str(marks),)) as fleet:
        fleet.wait_for(marks.exists)
        os.kill(fleet.pid(1), signal.SIGUSR1)
        assert fleet.wait() == [REQUEUE, REQUEUE], fleet.said()
        assert f"the evaluation after step {step} is broken off" in fleet.said()
    assert saved_steps(run) == [step]


@pytest.mark.slow
def test_a_signal_during_an_evaluation(config_file: str, undisturbed: list[tuple], tmp_path: Path) -> None:
    """What was due is saved before the evaluation; that is broken off."""
    run, marks = tmp_path / "run", tmp_path / "evaluating"
    corpus = json.loads(Path(config_file).with_suffix(".json").read_text())["corpus"]
    words = ["--config", config_file, "--train.evaluate_every", "4", "--evaluate.corpus", corpus]
    break_off_evaluation(run, marks, words, step=4)
    assert last_step(run) == 4
    goes_on(run, config_file, undisturbed)


@pytest.mark.slow
def test_a_signal_during_the_last_evaluation(config_file: str, tmp_path: Path) -> None:
    """The same command makes it up, once; with other settings it is refused, and the config says what was trained."""
    run, marks = tmp_path / "run", tmp_path / "evaluating"
    corpus = json.loads(Path(config_file).with_suffix(".json").read_text())["corpus"]
    words = ["--config", config_file, "--train.steps", "2", "--train.evaluate_every", "4", "--evaluate.corpus", corpus]
    break_off_evaluation(run, marks, words, step=2)
    config = (run / "config.yaml").read_bytes()
    said = train(run, "--config", *words[1:], "--optimizer.lr", "0.5", "--data.seed", "3", code=2)
    assert "has made 2 of 2 steps with data.seed = 0 where this command has 3, optimizer.lr = 0.01 where" in said
    assert "held out, after step 2: " in train(run, *words, "--train.log_every", "7")
    said = train(run, *words)
    assert "finished: 2 of 2 steps; more with --train.steps" in said
    assert "held out, after" not in said
    assert "going on from" not in said
    assert [line["step"] for line in lines(run) if "heldout/seconds" in line] == [2]
    assert (run / "config.yaml").read_bytes() == config


@pytest.mark.slow
def test_a_second_signal_ends_at_once_even_in_a_collective(config_file: str, tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "stuck"
    words = ["--config", config_file, *LONG, "--guard.timeout", "300"]
    with Fleet(run, *words, plant=stuck, planted=(str(mark),)) as fleet:
        fleet.wait_for(mark.exists)
        time.sleep(0.5)
        os.kill(fleet.pid(0), signal.SIGTERM)
        os.kill(fleet.pid(0), signal.SIGTERM)  # as from scheduler and launcher: the same
        time.sleep(1.5)
        assert fleet.processes[0].is_alive()
        loaders = descendants(fleet.pid(0))
        deadline = time.monotonic() + 60
        while fleet.processes[0].is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(fleet.pid(0), signal.SIGTERM)
            fleet.processes[0].join(1.5)  # a busy machine may deliver some of them as one
        assert fleet.processes[0].exitcode == 128 + signal.SIGTERM, fleet.said()
        assert "SIGTERM again" in fleet.said()
        assert loaders
        assert not left(loaders)


def test_signals_are_the_same_by_when_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the process gets to read them; one that comes when they are read is a second one, unless it is the
    SIGHUP that a shell sends, and the system once more when the shell has ended."""
    now, (end, write), later = 1000.0, os.pipe(), [signal.SIGUSR1, signal.SIGHUP]

    def read(_end: int, size: int) -> bytes:
        nonlocal now
        now += 5.0
        if not select.select([end], [], [], 0)[0]:
            os.write(write, bytes([later.pop()]))
        return plain(end, size)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def leave(code: int, message: str) -> None:
        raise SystemExit(f"{code}: {message}")

    plain = os.read
    monkeypatch.setattr(signals.os, "read", read)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    monkeypatch.setattr(signals.time, "sleep", sleep)
    monkeypatch.setattr(signals, "leave", leave)
    os.write(write, bytes([signal.SIGCHLD, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM]))
    asked = signals.Signals()
    with pytest.raises(SystemExit, match=f"{128 + signal.SIGUSR1}: SIGUSR1 again: ending at once"):
        asked._listen(end)
    assert asked.received == signal.SIGTERM
    os.close(end)
    os.close(write)


def test_what_whoever_started_the_command_wants_ignored_stays_so() -> None:
    """SIGHUP, under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.Signals() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked.received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def held_meeting(rank: int, mark: str) -> None:
    """The second process leaves a mark when it joins the others, and waits until it is removed."""
    from megatron_lcl.train import run as loop

    plain = loop.init_processes

    def init_processes(*arguments):  # type: ignore[no-untyped-def]
        if rank == 1:
            Path(mark).touch()
            wait_while(mark)
        return plain(*arguments)

    loop.init_processes = init_processes


def held_start(rank: int, mark: str) -> None:
    """The second process leaves a mark before anything of the run is imported, and waits until it is removed."""

    def adopt_slurm(environment: object) -> None:
        if rank == 1:
            Path(mark).touch()
            wait_while(mark)

    launch.adopt_slurm = adopt_slurm


@pytest.mark.slow
@pytest.mark.parametrize("plant", [held_start, held_meeting])
def test_a_signal_before_the_first_step(plant: Callable[[int, str], None], config_file: str, tmp_path: Path) -> None:
    """Even before the processes know of each other."""
    run, mark = tmp_path / "run", tmp_path / "meeting"
    with Fleet(run, "--config", config_file, plant=plant, planted=(str(mark),)) as fleet:
        fleet.wait_for(mark.exists)
        os.kill(fleet.pid(1), signal.SIGUSR1)
        mark.unlink()
        assert fleet.wait() == [REQUEUE, REQUEUE], fleet.said()
        assert "SIGUSR1: ended after step 0" in fleet.said()
    assert (saved_steps(run), last_step(run)) == ([], 0)


def held_simulation(mark: str) -> None:
    """A process that simulates leaves a mark, and waits until it is removed."""
    end_with_command()
    Path(mark).touch()
    wait_while(mark)


def own_groups(rank: int, mark: str) -> None:
    """Each process has a group of its own, as under a scheduler, and simulates, however much memory there is."""
    from megatron_lcl.train import fits, simulate

    os.setpgid(0, 0)
    fits.DOUBT = 10**9
    vars(forkserver._forkserver).update(vars(forkserver.ForkServer()), _preload_modules=[])  # not the tests' server
    simulate.forkserver = lambda: multiprocessing.get_context("forkserver")  # type: ignore[assignment]
    if rank == 0:
        simulate.end_with_command = partial(held_simulation, mark)  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_also_ends_simulations(signum: signal.Signals, config_file: str, tmp_path: Path) -> None:
    """It reaches the first process's whole group, with the server from which simulations are forked."""
    run, mark = tmp_path / "run", tmp_path / "simulates"
    with Fleet(run, "--config", config_file, plant=own_groups, planted=(str(mark),)) as fleet:
        fleet.wait_for(mark.exists)
        os.killpg(fleet.pid(0), signum)
        code = 130 if signum == signal.SIGINT else REQUEUE
        assert fleet.wait() == [code, code], fleet.said()
        said = fleet.said()
    assert f"{signum.name}: ended at once" in said
    assert "Traceback" not in said
    assert last_step(run) == 0


def without_compilers(rank: int, marks: str) -> None:
    """In its first step the second process gets a signal that ends the compiler that it has started, too."""
    from megatron_lcl.train.step import Stepper

    plain = Stepper.start

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            raise RuntimeError("C++ compile error")  # as inductor's where g++ is killed
        return plain(self, *arguments)

    Stepper.start = run  # type: ignore[method-assign]


def compile_workers(_rank: int) -> list[bool]:
    """Of each process that is started to compile, whether all signals are blocked in it; in this one none is."""
    signals.start_compilers()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(signals.SIGNALS)
    found = []
    for process in psutil.Process().children():
        if "compile_worker" in " ".join(process.cmdline()):
            status = Path(f"/proc/{process.pid}/status").read_text()
            blocked = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk"))
            found.append(all(blocked >> (number - 1) & 1 for number in signals.SIGNALS))
    return found


def test_processes_that_compile_for_gpus_are_not_ended_by_signals() -> None:
    """Inductor would wait for ever for what they were to compile."""
    (blocked,) = run_processes(compile_workers, 1)
    if not blocked:
        pytest.skip("torch starts no processes to compile here: it has no Triton, or one core")
    assert blocked == [True]


@pytest.mark.slow
def test_a_signal_that_also_ends_compilers(config_file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Fleet(run, "--config", config_file, plant=without_compilers, planted=("",)) as fleet:
        assert fleet.wait() == [REQUEUE, REQUEUE], fleet.said()
        assert "process 1 failed while computing" in fleet.said()
        assert "Interrupted: SIGUSR1: ended at once" in fleet.said()
    assert last_step(run) == 0


@pytest.mark.slow
def test_the_launcher_passes_signals_on_and_is_not_outlived(config_file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "megatron_lcl", "train", "--config", config_file, "--train.output", str(run)]
    command += ["--processes", "2", "--train.steps", "2000", "--checkpoint.every", "0"]

    def ended(launcher: subprocess.Popen[str], signum: int, when: Callable[[], bool]) -> str:
        """What the launcher said that got a signal."""
        deadline = time.monotonic() + 120
        try:
            while not when():
                assert launcher.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            children = descendants(launcher.pid)
            assert len(alive(children)) >= 2
            launcher.send_signal(signum)
            launcher.wait(120)
        finally:
            launcher.kill()
        assert not left(children)
        return launcher.communicate(timeout=10)[1]

    killed = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ended(killed, signal.SIGKILL, lambda: len(descendants(killed.pid)) >= 2)
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = ended(launcher, signal.SIGUSR1, lambda: last_step(run) >= 3)
    assert launcher.returncode == REQUEUE, said
    assert "SIGUSR1: ended after step" in said
    assert saved_steps(run) == [last_step(run)]


def test_a_process_whose_parent_has_died_already_ends_too() -> None:
    """Between its fork and its wish to end with its parent there is a moment."""
    for parent, code in ((os.getpid(), 0), (os.getpid() + 1, -signal.SIGKILL)):
        child = subprocess.Popen([sys.executable, "-c", ""], preexec_fn=partial(launch._end_with, parent, None))
        assert child.wait(60) == code
