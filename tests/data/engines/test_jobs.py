"""Jobs in processes of this machine: each is done, those that fail are tried again, and none outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
from data.engines.engine_jobs import fails, waits
from data.engines.running import marked, processes_marked
from processes import Ends

from megatron_lcl.data import engines
from megatron_lcl.data.engines import Engine, parse_job, run_jobs
from megatron_lcl.data.engines.task import Task, do
from megatron_lcl.errors import UserError
from megatron_lcl.processes import NEVER_BEGAN


def test_parse_job() -> None:
    assert parse_job("2/3") == (2, 3)
    for wrong in ("3/3", "1", "a/b", "-1/2", "1/2/3", "/2", ""):
        with pytest.raises(ValueError, match="i from 0 to n-1"):
            parse_job(wrong)


LONG = "x" * 200_000
"""more than a pipe holds"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "ValueError: two lines"),
        ("killed", "killed by SIGKILL, perhaps out of memory"),
        ("exits", "ended with exit code 3"),
        (LONG, f"ValueError: {LONG}"),
    ],
    ids=["raises", "killed", "exits", "long"],
)
@pytest.mark.timeout(120)
def test_a_job_that_fails_is_tried_again_and_then_said(tmp_path: Path, how: str, said: str) -> None:
    for times in (1, 9):
        folder = tmp_path / str(times)
        folder.mkdir()
        arguments = {"folder": folder, "times": times, "how": how}
        done = ["done-0-of-3", "done-1-of-3", "done-2-of-3"]
        if times == 1:
            run_jobs(fails, arguments, Engine("local", 3, retries=1), output=folder)
        else:
            with pytest.raises(UserError) as error:
                run_jobs(fails, arguments, Engine("local", 3, retries=1), output=folder)
            logs = tmp_path / f"{times}.local"
            assert str(error.value) == f"job 1 of 3 failed (tried 2 times; logs in {logs}), the first with: {said}"
            assert (logs / "job-1.log").read_text().count("job 1 of 3") == 2
            assert ("Traceback" in (logs / "job-1.log").read_text()) == (how in ("raises", LONG))
            done.remove("done-1-of-3")
        assert sorted(path.name for path in folder.glob("done-*")) == done
        assert [len((folder / f"tries-{k}").read_text().split()) for k in range(3)] == [1, 2, 1]


def test_a_job_s_remedies_are_the_command_s_to_say(tmp_path: Path) -> None:
    arguments = {"folder": tmp_path, "times": 9, "how": "advises"}
    with pytest.raises(UserError) as error:
        run_jobs(fails, arguments, Engine("local", 1, retries=0), output=tmp_path / "out")
    assert error.value.said().endswith(", the first with: no room")
    assert error.value.remedies == {"--data.cache": ", or set data.cache"}


def test_jobs_that_never_begin(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run_jobs(fails, {"folder": Ends()}, Engine("local", 1, retries=0), output=tmp_path / "out")
    assert f"the first with: {NEVER_BEGAN}" in str(error.value)


class Refuses:
    """Of four jobs one ends at each call, in order; job 0 fails the first time. refused: which submissions are."""

    def __init__(self, *refused: int) -> None:
        self.refused, self.submitted = refused, list[list[int]]()
        self.running: deque[int] = deque()

    def submit(self, jobs: Sequence[int]) -> None:
        self.submitted.append(list(jobs))
        if len(self.submitted) - 1 in self.refused:
            raise UserError("Slurm did not take the jobs: its controller restarts")
        self.running += jobs

    def ended(self) -> Mapping[int, UserError | None]:
        if not self.running:
            return {}
        error = UserError("killed") if len(self.running) == 4 else None
        return {self.running.popleft(): error}


@pytest.mark.parametrize(
    ("refused", "submitted"),
    [
        ((1,), [[0, 1, 2, 3], [0], [0]]),
        ((1, 2), [[0, 1, 2, 3], [0], [0], [0]]),
        ((1, 2, 3), [[0, 1, 2, 3], [0], [0], [0]]),
    ],
)
@pytest.mark.timeout(30)
def test_others_run_on_where_a_job_is_not_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...], submitted: list[list[int]]
) -> None:
    runner = Refuses(*refused)
    monkeypatch.setattr(engines, "_opened", lambda *_: nullcontext(runner))
    engine = Engine("slurm", 4, retries=3)
    if len(refused) < engine.retries:
        run_jobs(fails, {}, engine, output=tmp_path / "out")
    else:
        with pytest.raises(UserError, match=r"job 0 of 4 failed \(tried 4 times; .* with: Slurm did not take the jobs"):
            run_jobs(fails, {}, engine, output=tmp_path / "out")
    assert runner.submitted == submitted
    assert not runner.running


@pytest.mark.timeout(30)
def test_the_last_job_is_submitted_until_its_tries_are_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other can end before it."""
    runner = Refuses(1, 2)
    monkeypatch.setattr(engines, "_opened", lambda *_: nullcontext(runner))
    monkeypatch.setattr(runner, "ended", iter([{0: UserError("killed")}, {}, {0: None}]).__next__)
    run_jobs(fails, {}, Engine("slurm", 1, retries=3), output=tmp_path / "out")
    assert runner.submitted == [[0]] * 4


def test_jobs_that_are_not_taken_the_first_time_are_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Refuses(0)
    monkeypatch.setattr(engines, "_opened", lambda *_: nullcontext(runner))
    with pytest.raises(UserError, match=r"^Slurm did not take the jobs"):
        run_jobs(fails, {}, Engine("slurm", 4), output=tmp_path / "out")
    assert len(runner.submitted) == 1


def test_a_machine_that_does_not_see_the_folders_says_so(tmp_path: Path) -> None:
    arguments = {"folder": tmp_path, "times": 0, "how": ""}
    task = Task(fails, arguments, 1, 1, tmp_path, (tmp_path / "in",))
    said = f"does not see {tmp_path / 'in'}: input and output must be on a file system that all machines"
    assert said in str(do(task, 0))
    assert not list(tmp_path.glob("done-*"))
    with pytest.raises(UserError, match="there is no"):
        run_jobs(fails, arguments, Engine("local", 1), output=tmp_path / "out", reads=[tmp_path / "in"])
    assert not list(tmp_path.iterdir())


def test_a_job_s_relative_paths_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines start processes elsewhere; of a folder that only the command's machine has, absolute paths remain."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    relative = Task(fails, {"folder": Path("../jobs"), "times": 0, "how": ""}, 1, 1, tmp_path, (Path("../jobs"),))
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir("/")
    assert do(relative, 0) is None
    monkeypatch.chdir("/")
    (tmp_path / "here").rmdir()
    absolute = replace(relative, arguments={**relative.arguments, "folder": tmp_path / "jobs"}, reads=())
    assert do(absolute, 0) is None
    assert len((tmp_path / "jobs" / "tries-0").read_text().split()) == 2


def test_a_signal_while_a_process_is_started_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SpawnProcess.start
    started = []

    def start_and_be_told_to_end(self: SpawnProcess) -> None:
        start(self)
        started.append(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SpawnProcess, "start", start_and_be_told_to_end)
    with pytest.raises(SystemExit):
        run_jobs(waits, {"folder": tmp_path}, Engine("local", 1), output=tmp_path)
    (process,) = started
    assert not process.is_alive()


PROGRAM = """
import sys
from pathlib import Path
from data.engines.engine_jobs import waits
from megatron_lcl.data.engines import Engine, run_jobs
if __name__ == "__main__":
    run_jobs(waits, {"folder": Path(sys.argv[1])}, Engine("local", 3), output=Path(sys.argv[1]))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.timeout(120)
def test_a_signal_ends_all_processes(tmp_path: Path, signum: int) -> None:
    program, folder, mark = tmp_path / "program.py", tmp_path / "out", uuid.uuid4().hex
    program.write_text(PROGRAM)
    folder.mkdir()
    command = [sys.executable, str(program), str(folder)]
    with subprocess.Popen(command, env=marked(mark), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("tries-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            assert len(processes_marked(mark)) > 1
            os.kill(process.pid, signum)
            assert process.wait(30) in {128 + signum, -signum}
        finally:
            process.kill()
    while (
        processes_marked(mark) and time.monotonic() < deadline
    ):  # after SIGKILL they see by themselves that they are alone
        time.sleep(0.02)
    assert not processes_marked(mark)
