"""A process that dies or hangs: the others end within the timeout and name it; none is left."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fleet import Fleet, descendants, last_step, left, loaders_stay, losses, train, wait_while

from megatron_lcl.train import launch
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.resilience.start import LOST
from megatron_lcl.train.resilience.watchdog import SUSPICION_SECONDS

TIMEOUT, LONG_TIMEOUT = 12.0, 18.0
BUSY = 30.0  # seconds that a machine may add that is busy with others
PATIENCE = 90.0  # of this test
LONG = ["--train.steps", "2000", "--checkpoint.every", "0", "--guard.timeout", str(TIMEOUT)]


def hang(rank: int, faulty: int, where: str, mark: str) -> None:
    """One process never comes back from its first or fifth step, from reading its data, from a block's forward, or,
    in the background, from writing its part of a checkpoint."""
    from megatron_lcl.data.loading.loader import PackedLoader
    from megatron_lcl.model.layers import LanguageBlock as Block
    from megatron_lcl.train import first_batch
    from megatron_lcl.train.checkpoint import checkpointer
    from megatron_lcl.train.step import Stepper

    loaders_stay()
    first_batch.choose_partition = lambda *_: (0, 2, 4)
    os.environ |= {"SLURMD_NODENAME": f"node-{rank}", "MEGATRON_LCL_FAULTS": str(Path(mark).parent)}
    if rank != faulty:
        return

    def write_files(*_):  # type: ignore[no-untyped-def]
        Path(mark).touch()
        time.sleep(3600)

    if where == "saving":
        checkpointer.write_files = write_files
        return
    classes: dict[str, tuple[Any, str]] = {
        "computing": (Stepper, "start"),
        "starting": (Stepper, "start"),
        "reading data": (PackedLoader, "_batches"),
        "in a stage": (Block, "forward"),
    }
    cls, name = classes[where]
    plain, calls = getattr(cls, name), []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == {"starting": 1, "computing": 5, "in a stage": 19}[where]:  # four forwards of it in each step
            Path(mark).touch()
            time.sleep(3600)
        return plain(self, *arguments)

    def batches(self):  # type: ignore[no-untyped-def]
        for i, batch in enumerate(plain(self)):
            if i == 8:  # two of each step
                Path(mark).touch()
                time.sleep(3600)
            yield batch

    setattr(cls, name, batches if where == "reading data" else run)


def slow_start(rank: int) -> None:
    """A first step, and saves, that take longer than the timeout."""
    from megatron_lcl.train.checkpoint import checkpointer
    from megatron_lcl.train.step import Stepper

    plain, write, calls = Stepper.start, checkpointer.write_files, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 1 and rank == 1:
            time.sleep(TIMEOUT + 1)
        return plain(self, *arguments)

    def write_files(*arguments):  # type: ignore[no-untyped-def]
        if rank == 0:
            time.sleep(TIMEOUT + 1)
        return write(*arguments)

    Stepper.start, checkpointer.write_files = run, write_files  # type: ignore[method-assign]


def fail(rank: int, error: Exception, mark: str) -> None:
    """The second process leaves a mark, and meets an error of its own when that is removed."""
    loaders_stay()
    from megatron_lcl.train.step import Stepper

    plain, calls = Stepper.start, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 5 and rank == 1:
            Path(mark).touch()
            wait_while(mark)
            raise error
        return plain(self, *arguments)

    Stepper.start = run  # type: ignore[method-assign]


def fail_while_saving(rank: int, where: str, mark: str) -> None:
    """The first process meets an error of its own while the second one writes its part of the first checkpoint, for
    longer than the timeout, or the first one copies it, for ever."""
    loaders_stay()
    from megatron_lcl.train.checkpoint import checkpointer
    from megatron_lcl.train.step import Stepper

    plain, write, calls = Stepper.start, checkpointer.write_files, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 3 and rank == 0:
            while not Path(mark).exists():
                time.sleep(0.01)
            raise RuntimeError("cosmic ray")
        return plain(self, *arguments)

    def late(*arguments):  # type: ignore[no-untyped-def]
        Path(mark).touch()
        time.sleep(TIMEOUT + 1 if where == "writing" else 3600)
        return write(*arguments)

    Stepper.start = run  # type: ignore[method-assign]
    if where == "copying":
        checkpointer.Checkpointer._copy = late  # type: ignore[method-assign]
    elif rank == 1:
        checkpointer.write_files = late


def die_while_saving(rank: int, mark: str) -> None:
    """The second process is killed while it writes its part of a checkpoint; the first one waits for that by then."""
    from megatron_lcl.train.checkpoint import checkpointer

    os.environ |= {"SLURMD_NODENAME": f"node-{rank}", "MEGATRON_LCL_FAULTS": str(Path(mark).parent)}

    def write_files(*_):  # type: ignore[no-untyped-def]
        Path(mark).touch()
        time.sleep(2.0)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        checkpointer.write_files = write_files


def survive(rank: int, killed: int) -> None:
    """The loader processes of the one that is not killed."""
    if rank != killed:
        loaders_stay()


class Outcome(NamedTuple):
    """How a run ended after its fault."""

    codes: list[int | None]
    said: list[str]
    """by process"""
    named: list[str]
    """nodes, as each process that names any tells the launch script"""
    left: list[int]
    """loader processes that still run"""
    step: int
    """last one before the fault; of a run that is killed, of which it is not known, the last one in the metrics"""
    seconds: float
    """from the fault to the end of the last process"""


def outcome(fleet: Fleet, fault: float, step: int, watched: Sequence[int], mark: Path | None = None) -> Outcome:
    """How it ended with the processes `watched`, after a fault at that `time.time()`, or which removing a mark lets
    come."""
    loaders = [pid for rank in watched for pid in descendants(fleet.pid(rank))]
    assert loaders, "no loader process is alive"
    if mark:
        mark.unlink()
    codes = fleet.wait(PATIENCE, watched)
    seconds = time.time() - fault
    named = [file.read_text() for file in sorted(fleet.run.parent.glob("fault-*"))]
    return Outcome(codes, [log.read_text() for log in fleet.logs], named, left(loaders), step, seconds)


def killed(faulty: int, config_file: str, folder: Path) -> Outcome:
    """A failing collective makes suspicious: no process waits for the timeout."""
    words = ["--config", config_file, *LONG, "--guard.timeout", "300"]
    with Fleet(folder / "run", *words, plant=survive, planted=(faulty,)) as fleet:
        fleet.wait_for_step(5)
        loaders = descendants(fleet.pid(faulty))
        os.kill(fleet.pid(faulty), signal.SIGKILL)
        ended = outcome(fleet, time.time(), 5, [1 - faulty])
        # torch's loader processes look after their parent every 5 seconds
        return ended._replace(left=[*ended.left, *left(loaders)], step=last_step(fleet.run))


def hung(faulty: int, where: str, config_file: str, folder: Path) -> Outcome:
    """Three replicas; or a pipeline, whose stages wait for each other in other ways than by collectives."""
    layout = ["--parallel.pipeline", "3"] if where == "in a stage" else ["--train.global_batch", "6"]
    words, mark = ["--config", config_file, *LONG, *layout], folder / "hangs"
    if where in ("starting", "saving"):
        words += ["--guard.long_timeout", str(LONG_TIMEOUT), "--checkpoint.every", "2"]
    with Fleet(folder / "run", *words, size=3, plant=hang, planted=(faulty, where, str(mark))) as fleet:
        fleet.wait_for(mark.exists)
        return outcome(fleet, mark.stat().st_mtime, 4, range(3))


def frozen(config_file: str, folder: Path) -> Outcome:
    with Fleet(folder / "run", "--config", config_file, *LONG, plant=survive, planted=(0,)) as fleet:
        fleet.wait_for_step(5)
        os.kill(fleet.pid(0), signal.SIGSTOP)
        return outcome(fleet, time.time(), 5, [1])


def suspended(config_file: str, folder: Path) -> int:
    """The whole job, as by `scontrol suspend`, its processes a second apart; steps that it makes after that."""
    with Fleet(folder / "run", "--config", config_file, *LONG) as fleet:
        fleet.wait_for_step(5)
        for signum, seconds in ((signal.SIGSTOP, TIMEOUT + 3), (signal.SIGCONT, 5.0)):
            for rank in (1, 0):
                os.kill(fleet.pid(rank), signum)
                time.sleep(1.0)
            step = last_step(fleet.run)
            time.sleep(seconds)
        fleet.wait_for_step(step + 1)
        assert fleet.wait(0.0) == [None, None], fleet.said()
        return last_step(fleet.run) - step


def failed(error: Exception, config_file: str, folder: Path) -> Outcome:
    mark = folder / "fails"
    with Fleet(folder / "run", "--config", config_file, *LONG, plant=fail, planted=(error, str(mark))) as fleet:
        fleet.wait_for(mark.exists)
        return outcome(fleet, time.time(), 4, range(2), mark)


def failed_while_saving(where: str, config_file: str, folder: Path) -> Outcome:
    # where it is written the first process is to wait for it, however slow the disk is
    long_timeout, mark = 60 if where == "writing" else LONG_TIMEOUT, folder / "saves"
    words = ["--config", config_file, *LONG, "--guard.long_timeout", str(long_timeout), "--checkpoint.every", "2"]
    with Fleet(folder / "run", *words, plant=fail_while_saving, planted=(where, str(mark))) as fleet:
        fleet.wait_for(mark.exists)
        ended = outcome(fleet, mark.stat().st_mtime, 2, range(2))
    (saved,) = checkpoint.list_checkpoints(folder / "run")
    assert checkpoint.verify(saved) == []
    return ended


def died_while_saving(background: str, config_file: str, folder: Path) -> Outcome:
    words, mark = ["--config", config_file, *LONG, "--checkpoint.every", "1"], folder / "saves"
    words += ["--checkpoint.background", background, "--checkpoint.max_failures", "1", "--guard.timeout", "300"]
    with Fleet(folder / "run", *words, plant=die_while_saving, planted=(str(mark),)) as fleet:
        fleet.wait_for(mark.exists)
        return outcome(fleet, time.time(), 1, [0])


def slow(config_file: str, folder: Path) -> list[tuple[Any, ...]]:
    words = ["--config", config_file, "--checkpoint.every", "0", "--checkpoint.background", "false"]
    train(folder / "run", *words, "--guard.timeout", str(TIMEOUT), plant=slow_start)
    return losses(folder / "run")


@pytest.fixture(scope="module")
def outcomes(config_file: str, undisturbed: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """All runs of this file, at the same time, for they mostly wait."""
    scenarios = {
        "killed 0": partial(killed, 0),
        "killed 1": partial(killed, 1),
        "hangs 1 computing": partial(hung, 1, "computing"),
        "hangs 0 reading data": partial(hung, 0, "reading data"),
        "hangs 1 in a stage": partial(hung, 1, "in a stage"),
        "hangs 1 starting": partial(hung, 1, "starting"),
        "hangs 2 saving": partial(hung, 2, "saving"),
        "frozen": frozen,
        "suspended": suspended,
        "failed": partial(failed, RuntimeError("cosmic ray")),
        "failed with a file": partial(failed, PermissionError(errno.EACCES, "Permission denied", "/data/c/tokens-0")),
        "failed writing": partial(failed_while_saving, "writing"),
        "failed copying": partial(failed_while_saving, "copying"),
        "died while saving": partial(died_while_saving, "false"),
        "died while saving beside the steps": partial(died_while_saving, "true"),
        "slow": slow,
    }
    with ThreadPoolExecutor(4) as pool:
        folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in scenarios}
        yield {name: pool.submit(scenario, config_file, folders[name]) for name, scenario in scenarios.items()}


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_process_that_is_killed(faulty: int, outcomes: dict[str, Future[Outcome]]) -> None:
    """Process 0 keeps the store over which the others watch."""
    codes, said, _, left, step, seconds = outcomes[f"killed {faulty}"].result()
    assert codes[faulty] == -signal.SIGKILL
    assert codes[1 - faulty] == LOST, said
    assert not left
    named = re.search(rf"megatron-lcl: process {faulty} .*last step done: (\d+)\)", said[1 - faulty])
    assert named, said
    assert int(named[1]) <= step + 2  # it says so once a second, and is a step ahead of the other one at most
    assert seconds < 3 * SUSPICION_SECONDS + BUSY, said


@pytest.mark.slow
@pytest.mark.parametrize(("faulty", "where"), [(1, "computing"), (0, "reading data"), (1, "in a stage")])
def test_a_process_that_hangs(faulty: int, where: str, outcomes: dict[str, Future[Outcome]]) -> None:
    codes, said, named, left, step, seconds = outcomes[f"hangs {faulty} {where}"].result()
    assert codes == [LOST] * 3, said
    assert named == [f"node-{faulty}\n"] * 3
    assert not left
    assert seconds < TIMEOUT + BUSY, said
    for text in said:
        told = re.search(r"megatron-lcl: (.*?)\. ", text)
        assert told, said
        doing = "computing" if where == "in a stage" else where
        assert re.search(rf"process {faulty} hangs while {doing} at [a-z_]+\.py:\d+ in [a-z_<>]+ \(host", told[1]), said
        assert f"last step done: {step})" in told[1]


@pytest.mark.slow
@pytest.mark.parametrize(("faulty", "where"), [(1, "starting"), (2, "saving")])
def test_a_hang_in_what_may_take_long(faulty: int, where: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """The first step; and a save in the background, which all wait for when the next is due."""
    codes, said, _, left, _, seconds = outcomes[f"hangs {faulty} {where}"].result()
    assert codes == [LOST] * 3, said
    assert not left
    assert seconds < LONG_TIMEOUT + BUSY, said
    doing, step = {"starting": ("computing", 0), "saving": ("saving", 4)}[where]
    for text in said:
        assert re.search(rf"megatron-lcl: process {faulty} hangs while {doing} at .* last step done: {step}\)", text), (
            said
        )
        assert f"(guard.long_timeout = {LONG_TIMEOUT:g} s; raise it" in text, said


@pytest.mark.slow
def test_a_process_that_is_frozen(outcomes: dict[str, Future[Outcome]]) -> None:
    """Not even its watching threads run: the machine is out of memory, or the process is stopped."""
    codes, said, _, left, _, seconds = outcomes["frozen"].result()
    assert codes == [None, LOST], said
    assert not left
    assert seconds < TIMEOUT + BUSY, said
    assert re.search(r"megatron-lcl: process 0.*last step done: \d+\)", said[1]), said


@pytest.mark.slow
def test_a_job_that_is_suspended_goes_on(outcomes: dict[str, Future[Any]]) -> None:
    """For longer than the timeout."""
    assert outcomes["suspended"].result() > 0


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_the_others(outcomes: dict[str, Future[Outcome]]) -> None:
    """And is no fault of the machine: all end with the code that says so."""
    codes, said, _, left, _, seconds = outcomes["failed"].result()
    assert codes == [1, 1], said
    assert not left
    assert seconds < TIMEOUT + BUSY, said
    assert "process 1 failed while computing" in said[0]
    assert "last step done: 4): RuntimeError: cosmic ray" in said[0]
    assert "Traceback" not in said[0]
    assert said[1].count("Traceback (most recent call last):") == 1


@pytest.mark.slow
def test_a_file_that_one_process_may_not_read_is_an_input_for_all(outcomes: dict[str, Future[Outcome]]) -> None:
    """They end with the code of the process that met it, whose line says what is to be mended."""
    codes, said, _, left, _, _ = outcomes["failed with a file"].result()
    assert codes == [2, 2], said
    assert not left
    assert re.search(r"process 1 failed while computing .*: PermissionError: .*'/data/c/tokens-0'", said[0]), said
    assert "megatron-lcl train: /data/c/tokens-0: Permission denied\n" in said[1]
    assert "Traceback" not in "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["writing", "copying"])
def test_an_error_of_one_process_during_a_save(where: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """Is no hang, however long all finish the save; nor where what only this process waits for never ends."""
    codes, said, _, left, _, seconds = outcomes[f"failed {where}"].result()
    assert codes == [1, 1], said
    assert not left
    assert TIMEOUT < seconds < {"writing": TIMEOUT + 1, "copying": LONG_TIMEOUT}[where] + BUSY, said
    assert re.search(r"process 0 failed while computing .*last step done: 2\): RuntimeError: cosmic ray", said[1]), said
    assert said[0].count("Traceback (most recent call last):") == 1
    assert "hangs" not in "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", " beside the steps"])
def test_a_process_that_is_killed_while_all_save(how: str, outcomes: dict[str, Future[Outcome]]) -> None:
    """Is no save that has failed, were it the last that may."""
    codes, said, named, left, _, seconds = outcomes[f"died while saving{how}"].result()
    assert codes == [LOST, -signal.SIGKILL], said
    assert named == ["node-1\n"]
    assert not left
    assert re.search(r"megatron-lcl: process 1 died or its machine did: .*last step done: \d+\)", said[0]), said
    assert "no checkpoint of step" not in said[0]
    assert seconds < 3 * SUSPICION_SECONDS + BUSY, said


@pytest.mark.slow
def test_a_long_first_step_and_long_saves_are_no_hang(
    undisturbed: list[tuple[Any, ...]], outcomes: dict[str, Future[Any]]
) -> None:
    assert outcomes["slow"].result() == undisturbed


class Clock:
    """Stands in for the module `time`: it goes on while one sleeps, and after 1.5 s another process ends."""

    def __init__(self, last: subprocess.Popen[bytes]) -> None:
        self.last, self.now = last, 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 1.5:
            self.last.communicate()


@pytest.mark.parametrize("watched", [False, True])
def test_the_launcher_says_who_was_killed_and_ends_the_rest(
    watched: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time in which they end by themselves, if they watch each other."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    reader, writer = os.pipe()
    monkeypatch.setenv(launch.WATCHED, str(writer))
    if watched:
        launch.say_watched(1.0)
        launch.say_watched(3.0)
    commands = ("sleep 60", "kill -9 $$", "trap '' TERM; exec sleep 60", "read; exit 71")
    children = [subprocess.Popen(["bash", "-c", command], stdin=subprocess.PIPE) for command in commands]
    children[1].wait()
    clock = Clock(children[3])
    monkeypatch.setattr(launch, "time", clock)
    assert launch._wait("megatron-lcl train", children, launch._Heard(reader), []) == 128 + signal.SIGKILL
    codes = [child.returncode for child in children]
    assert codes == [-signal.SIGKILL] * 3 + [LOST if watched else -signal.SIGKILL]
    assert clock.now > (3.5 if watched else 0.5)
    said = capfd.readouterr().err.splitlines()
    late = "processes 0, 2" if watched else "processes 0, 2, 3"
    assert said[0] == "megatron-lcl train: process 1 was killed by SIGKILL"
    assert re.fullmatch(rf"megatron-lcl train: {late} had not ended \d s after the others: killed", said[1])
    assert len(said) == 2
    os.close(reader)
    os.close(writer)
    for child in children:
        child.communicate()


@pytest.mark.parametrize("code", [0, 3])
def test_the_launcher_does_not_wait_for_one_that_does_not_end(
    code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the others have, also where nothing has failed: then all is done, and the code says so."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(launch, "END_SECONDS", 1.0)
    reader, writer = os.pipe()
    children = [subprocess.Popen(["bash", "-c", command]) for command in (f"exit {code}", "exec sleep 99")]
    assert launch._wait("megatron-lcl train", children, launch._Heard(reader), []) == code
    assert [child.wait() for child in children] == [code, -signal.SIGKILL]
    said = capfd.readouterr().err
    assert said == f"megatron-lcl train: process 1 had not ended {0 if code else 1} s after the others: killed\n"
    os.close(reader)
    os.close(writer)


def test_time_in_which_a_run_is_stopped_is_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-Z, after one of its processes has ended, for longer than the others may take."""

    class StoppedClock(Clock):
        def sleep(self, seconds: float) -> None:
            self.now += 1000
            if self.now > 3000:
                self.last.communicate()

    reader, writer = os.pipe()
    children = [subprocess.Popen(command, stdin=subprocess.PIPE) for command in ("true", "cat")]
    children[0].communicate()
    monkeypatch.setattr(launch, "time", StoppedClock(children[1]))
    assert launch._wait("megatron-lcl train", children, launch._Heard(reader), []) == 0
    assert [child.returncode for child in children] == [0, 0]
    os.close(reader)
    os.close(writer)
