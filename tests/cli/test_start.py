"""A signal is answered from a command's first moment: the documented exit code, and no traceback. `--version`."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from train.resilience import fleet

from megatron_lcl import machine
from megatron_lcl.cli import main, version
from megatron_lcl.interrupts import end_with_command, holding_interrupts
from megatron_lcl.train.resilience.start import REQUEUE

SLOW = """
import os, pathlib, time
pathlib.Path(os.environ["MARK"] + str(os.getpid())).touch()
for _ in range(600):  # a signal that comes before a sleep does not end it
    time.sleep(0.1)
"""

OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def stopped_in(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """stopped_in(module, signum, words): exit code and standard error of a command that gets a signal while it
    imports the module, which takes a minute."""

    def stop(
        module: str, signum: int, *words: str, program: tuple[str, ...] = ("-m", "megatron_lcl")
    ) -> tuple[int, str]:
        package = tmp_path / "stub" / module
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(SLOW)
        path = os.pathsep.join([str(tmp_path / "stub"), os.environ.get("PYTHONPATH", "")])
        marks = tmp_path / "marks"
        marks.mkdir()
        alone = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
        environment = {**alone, "STUB": path, "MARK": f"{marks}/"} | (
            {"PYTHONPATH": path} if program[0] == "-m" else {}
        )
        command = [sys.executable, *program, *words]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while len(list(marks.iterdir())) < (2 if program[0] == "-c" else 1):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.killpg(process.pid, signum)
            said = process.communicate(timeout=20)[1]
        finally:
            process.kill()
        begun, deadline = [int(mark.name) for mark in marks.iterdir()], time.monotonic() + 20
        while fleet.alive(begun):  # they have closed standard error, so they are about to end
            assert time.monotonic() < deadline, "somebody is left behind"
            time.sleep(0.02)
        return process.returncode, said

    return stop


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("module", ["pydantic", "torch"])
def test_train_that_has_not_begun(stopped_in: Callable[..., tuple[int, str]], module: str, signum: int) -> None:
    """Before and after its arguments are read; a requeue loses nothing, for there is nothing."""
    code, said = stopped_in(module, signum, "train", "--data.corpora", "nowhere")
    assert code == (130 if signum == signal.SIGINT else REQUEUE), said
    name = signal.Signals(signum).name  # the launching process says so, which imports no torch, or the only one
    assert re.fullmatch(f"megatron-lcl( train)?: {name}: stopped; the same command goes on\n", said)


@pytest.mark.parametrize("module", ["pydantic", "jinja2"])
def test_ctrl_c_of_any_command(stopped_in: Callable[..., tuple[int, str]], module: str) -> None:
    assert stopped_in(module, signal.SIGINT, "report", "nowhere/run") == (130, "")


def test_the_launching_process_ends_what_has_not_begun(stopped_in: Callable[..., tuple[int, str]]) -> None:
    script = (
        "import os, sys\nfrom megatron_lcl.train import launch\nsys.path[:0] = os.environ['STUB'].split(os.pathsep)\n"
        "sys.exit(launch.start_local(['train', '--data.corpora', 'nowhere'], 2))"
    )
    code, said = stopped_in("pydantic", signal.SIGTERM, program=("-c", script))
    assert (code, said) == (REQUEUE, "megatron-lcl train: SIGTERM: stopped; the same command goes on\n")


OF_SEVERAL = """
import os, signal
from megatron_lcl.train.resilience.signals import Signals
from megatron_lcl.train.resilience.start import answer_signals
with answer_signals(training=True):
    os.kill(os.getpid(), signal.SIGUSR1)  # and the command ends by an error of its own
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
with answer_signals(training=True):
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    with Signals() as signals:
        print(int(signals.received), flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    print("at the end", flush=True)
"""


@pytest.mark.parametrize("environment", [{"RANK": "1", "WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "2"}])
def test_a_process_of_several_ends_with_the_others(environment: dict[str, str]) -> None:
    """What comes before it has met them waits for the run, which all end together."""
    command = [sys.executable, "-c", OF_SEVERAL]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert done.stdout.split("\n") == ["set()", "still here", str(int(signal.SIGTERM)), "at the end", ""]


ENDING = """
import atexit, sys, types
from megatron_lcl.cli import command, main
class Kept:
    def __del__(self): print("taken apart")
kept = Kept()
def run(given):
    if given == ["with torch"]:
        sys.modules["torch"] = types.ModuleType("torch")
    atexit.register(print, "at exit")
    {}
command.run = run
raise SystemExit(main())
"""


@pytest.mark.parametrize(("how", "code"), [("return 3", 3), ("raise SystemExit(71)", 71), ("raise ValueError", 1)])
def test_where_torch_is_imported_python_does_not_take_its_modules_apart(how: str, code: int) -> None:
    """gloo's threads may still need its lock, and C++ would abort the process."""
    command, called = ENDING.format(how), ENDING.format(how).replace("main()", "main(sys.argv[1:])")
    whole = "at exit\ntaken apart\n"
    for program, torch, said in (
        (command, "with torch", "at exit\n"), (command, "without", whole), (called, "with torch", whole),
    ):  # fmt: skip
        words = [sys.executable, "-c", program, torch]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, said), done.stderr
        assert done.stderr.count("Traceback") == (how == "raise ValueError")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_that_comes_when_the_command_has_ended_changes_no_exit_code(signum: int) -> None:
    """It may come later to one process of several than to another, which has answered it for all."""
    program = (
        "import atexit, os, time\n"
        "from megatron_lcl.cli import command, main\n"
        "def run(given):\n"
        f"    atexit.register(lambda: (os.kill(os.getpid(), {int(signum)}), time.sleep(60)))\n"
        f"    return {REQUEUE}\n"
        "command.run = run\n"
        "raise SystemExit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (REQUEUE, "")


def test_a_process_ends_though_nobody_reads_what_it_says() -> None:
    """Its main thread waits in a full pipe, with stderr's lock."""
    program = (
        "import sys, threading\n"
        "from megatron_lcl.train.resilience import start\n"
        "start.WRITE_SECONDS = 0.2\n"
        "threading.Timer(0.2, start.leave, (71, 'the end')).start()\n"
        "print('x' * 10**6, file=sys.stderr)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    try:
        assert process.wait(60) == 71
    finally:
        process.kill()
        process.communicate()


def test_workers_are_born_with_ctrl_c_held_back() -> None:
    held = [sys.executable, "-c", "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"]
    said = []

    def start() -> None:
        with holding_interrupts():
            signal.raise_signal(signal.SIGINT)  # comes when all are started
            said.append(subprocess.run(held, capture_output=True, text=True, check=True).stdout)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert said == ["True\n"]
    assert subprocess.run(held, capture_output=True, text=True, check=True).stdout == "False\n"
    worker = (
        f"import os, signal\nfrom {end_with_command.__module__} import end_with_command\n"
        "os.kill(os.getpid(), signal.SIGINT)\nend_with_command()"
    )
    with holding_interrupts():
        done = subprocess.run([sys.executable, "-c", worker], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_without_docstrings() -> None:
    """`python -OO` leaves none."""
    command = [sys.executable, "-OO", "-m", "megatron_lcl"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert "Exit codes: 0 done, 1 a check failed" in told.stdout
    done = subprocess.run([*command, "checkpoint", "list", "nowhere"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megatron-lcl checkpoint: ")
    assert len(done.stderr.splitlines()) == 1


# --- --version ---------------------------------------------------------------------------------------------------


def test_version_names_what_is_installed_without_importing_it() -> None:
    code = (
        "import sys\nfrom megatron_lcl.cli import main\ntry: main(['--version'])\nfinally: print(sorted(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    first, second, modules = said.splitlines()
    for name in ("megatron-lcl", "torch", "deepspeed"):
        assert f"{name} {metadata.version(name)}" in first
    assert second.startswith("CUDA: ")
    assert not {"torch", "deepspeed", "numpy"} & set(eval(modules))
    shown = f"{shlex.join([sys.executable, '-m', 'megatron_lcl', '--version'])} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")  # a reader that has gone is no error


@pytest.mark.parametrize(
    ("built", "devices", "said"),
    [
        ("None", 0, "no, torch is built without it"),
        ("'12.6'", 0, "no GPU is visible (torch is built for CUDA 12.6)"),
        ("'13.0'", 1, "yes, 13.0, 1 GPU visible"),
        ("'13.0'", 8, "yes, 13.0, 8 GPUs visible"),
    ],
)
def test_cuda_or_not(
    built: str,
    devices: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {built}\nhip: Optional[str] = None\n")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(version, "num_cuda_devices", lambda: devices)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[1] == f"CUDA: {said}"


def test_cuda_as_torch_says_it() -> None:
    torch = pytest.importorskip("torch")
    assert machine.torch_built_for("cuda") == torch.version.cuda
    assert machine.torch_built_for("hip") == torch.version.hip
    assert machine.num_cuda_devices() == torch.cuda.device_count()
