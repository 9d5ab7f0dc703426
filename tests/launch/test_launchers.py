"""torchrun and DeepSpeed's own launcher start a run as the scripts call them."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path

import pytest
import torch
from ports import hold_port
from torch.distributed.launcher.api import LaunchConfig

from megatron_lcl.machine import num_cores
from megatron_lcl.train import dryrun, launch
from megatron_lcl.train.checkpoint import folder as checkpoint

LAUNCH = Path(__file__).parents[2] / "launch"
# what pdsh does for DeepSpeed, on this machine: `pdsh -S -f N -w HOST,HOST COMMAND…`, %n becomes the host's number; and
# a port that no other test can get
PDSH = """#!/usr/bin/env bash
IFS=, read -ra hosts <<<"$5"
command="${*:6}"
command=${command/--master_port=29500/--master_port=$HELD_PORT}
for n in "${!hosts[@]}"; do bash -c "${command//%n/$n}" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""
SSH = """#!/usr/bin/env bash
echo 127.0.0.1
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "VENV": str(Path(sys.executable).parents[1]), **more}


@pytest.mark.slow
def test_torchrun_passes_signals_on_and_waits_for_the_save(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["bash", str(LAUNCH / "torchrun.sh"), *tiny, "--train.steps", "1000", "--train.output", str(run)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(PROCESSES="2"))
    try:
        deadline = time.monotonic() + 150
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(100) != 0
    finally:
        process.kill()
    assert "SIGUSR1: ended after step" in (tmp_path / "log").read_text()
    (folder,) = checkpoint.list_checkpoints(run)
    assert checkpoint.verify(folder) == []


def test_torchrun_is_told_the_same_wherever_it_is_named() -> None:
    """By the script, the page, and a dry run for several machines."""
    page = LAUNCH.parent / "docs" / "launching.md"
    for text in (page.read_text(), (LAUNCH / "torchrun.sh").read_text()):
        assert re.search(f"[ \n]{dryrun.TORCHRUN_SIGNALS} ", text)
        assert re.search(f" {dryrun.TORCHRUN_WAITS}[ \n]", text)


def test_torchrun_script_sets_what_torch_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With options that torch 2.11 has, too: of those for the time to end it has none."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text('#!/usr/bin/env bash\necho "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    command = ["bash", str(LAUNCH / "torchrun.sh"), "--train.steps", "2"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(VENV=str(tmp_path)))
    seconds, *arguments = said.stdout.split()
    options = [argument.partition("=")[0] for argument in arguments[: arguments.index("megatron_lcl")]]
    assert options == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "--signals-to-handle", "-m"]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if hasattr(config, "shutdown_timeout"):  # from torch 2.12 on
        assert config.shutdown_timeout == 600


@pytest.mark.slow
def test_deepspeed_starts_the_machines_of_a_hostfile(tiny: list[str], tmp_path: Path) -> None:
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    run = tmp_path / "run"
    command = ["bash", str(LAUNCH / "hostfile.sh"), str(tmp_path / "hosts"), *tiny, "--train.steps", "2"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    with hold_port() as held:
        port = str(held.getsockname()[1])
        result = subprocess.run(
            [*command, "--train.output", str(run)],
            capture_output=True,
            text=True,
            timeout=500,
            env=environment(PATH=path, DS_ACCELERATOR="cpu", HELD_PORT=port),
        )
    assert result.returncode == 0, result.stderr + result.stdout
    (folder,) = checkpoint.list_checkpoints(run)
    assert folder.name == "step-00000002"
    assert "'two': [0]" in result.stdout + result.stderr  # the launcher's view: both hosts, a process each


@pytest.mark.slow
@pytest.mark.parametrize("machines", [["one"], ["one", "two"]])
def test_the_machines_of_a_hostfile_get_arguments_and_threads_as_they_are_here(
    machines: list[str], tmp_path: Path
) -> None:
    """Whatever their shells would make of braces, quotes and variables; also one machine, which need not be this."""
    of_machine = """#!/usr/bin/env bash
    echo "$5"
    command="${*:6}"
    OMP_NUM_THREADS= bash -c "${command%% cd *} printf '<%s>' \\"\\$OMP_NUM_THREADS\\" ${command##* megatron_lcl }"
    """
    for name, text in (("pdsh", of_machine), ("ssh", SSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"{machine} slots=1\n" for machine in machines))
    words = [
        "--data.corpora",
        "[{path:a,weight:1}]",
        "a  b",
        '[{path: "$HOME", weight: 1}]',
        "it's;",
        "`pwd`",
        "x\\y",
        "",
    ]
    result = subprocess.run(
        ["bash", str(LAUNCH / "hostfile.sh"), str(tmp_path / "hosts"), *words],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="3"),
    )
    assert result.returncode == 0, result.stderr
    words = ["3", "train", *words]
    assert result.stdout.splitlines()[-2:] == [",".join(machines), "".join(f"<{word}>" for word in words)]


@pytest.mark.parametrize(
    ("codes", "ends_with", "starts"),
    [
        ([0], 0, 1),
        ([71, 137, 0], 0, 3),
        ([71, 71, 71, 71, 0], 71, 4),
        ([71, 2, 0], 2, 2),
        ([130, 0], 130, 1),
        ([75, 0], 75, 1),
    ],
)
def test_the_loop_of_the_page_starts_again_after_a_loss(
    codes: list[int], ends_with: int, starts: int, tmp_path: Path
) -> None:
    """What stands below it in a script is only done after a run that has finished."""
    page = (LAUNCH.parent / "docs" / "launching.md").read_text()
    section = page.partition("\n## Starting again without Slurm\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    train = tmp_path / "megatron-lcl"
    train.write_text('#!/bin/sh\necho start\nread code <codes\nsed -i 1d codes\nexit "$code"\n')
    train.chmod(0o755)
    script = "\n".join([*lines, "echo finished"])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for shell in (["sh", "-c"], ["bash", "-euc"]):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        result = subprocess.run([*shell, script], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert result.stdout.split() == ["start"] * starts + ["finished"] * (ends_with == 0), result.stderr
        assert result.returncode == ends_with


def test_without_a_hostfile_its_script_says_how(tmp_path: Path) -> None:
    command = ["bash", str(LAUNCH / "hostfile.sh"), str(tmp_path / "absent")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert result.returncode == 2
    assert result.stderr.startswith("usage: bash ")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has another checkout, and a file with the name of one of Python's own."""
    package = tmp_path / "other" / "megatron_lcl"
    package.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py", "../queue.py"):
        (package / name).write_text("raise SystemExit('other code')\n")
    monkeypatch.chdir(package.parent)


@pytest.mark.usefixtures("other_code")
def test_its_own_processes_run_the_code_that_it_runs(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.start_local(["--version"], 1) == 0
    out, err = capfd.readouterr()
    assert (out.split()[0], err) == ("megatron-lcl", "")


@pytest.mark.usefixtures("other_code")
def test_scripts_run_the_code_of_their_checkout() -> None:
    script = f'source {LAUNCH}/common.sh; find_python; "$python" -m megatron_lcl --version'
    result = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=60, env=environment())
    assert (result.stdout.split()[:1], result.stderr) == (["megatron-lcl"], "")


def test_its_own_processes_know_how_many_share_the_machine_and_where_they_meet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport os, socket\n"
        "local, size, rank, world, port = (int(os.environ[name]) for name in\n"
        "    ('LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'RANK', 'WORLD_SIZE', 'MASTER_PORT'))\n"
        "try:\n    socket.socket().bind(('127.0.0.1', port))\n"
        "except OSError:\n    print(f'{local} of {size}, {rank} of {world}, alone at {port}')\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # as in the only task of a step
    assert launch.start_local([], 3) == 0
    said = sorted(capfd.readouterr().out.splitlines())
    port = said[0].split()[-1]
    assert said == [f"{rank} of 3, {rank} of 3, alone at {port}" for rank in range(3)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", int(port)))


def test_what_is_said_of_its_processes_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert launch.start_local(["selftest", "--all-reduce"], 1) == 137
    assert capfd.readouterr().err == "megatron-lcl selftest: process 0 was killed by SIGKILL\n"


def test_a_signal_that_comes_while_the_launcher_reads_what_its_processes_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """That the run has begun, so it is to save."""
    program = tmp_path / "python"
    program.write_text(
        '#!/usr/bin/env bash\ntrap "echo saved; exit 75" TERM\necho "12.0 " >&"$MEGATRON_LCL_WATCHED"\n'
        "for _ in {1..600}; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    plain, signals = os.read, [signal.SIGTERM]

    def read(pipe: int, size: int) -> bytes:
        data = plain(pipe, size)
        if data == b"12.0 \n" and signals:
            signal.raise_signal(signals.pop())
        return data

    monkeypatch.setattr(os, "read", read)
    told: list[int] = []
    assert launch.start_local([], 1, told) == 75
    assert told == [signal.SIGTERM]
    out, err = capfd.readouterr()
    assert (out, err) == ("saved\n", "")


def test_a_hang_up_under_nohup_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -HUP $PPID $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    told: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch.start_local([], 1, told) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not told


STOPPED = """
import os, signal, sys, time
signal.signal(signal.SIGCONT, lambda *_: os._exit(0))
with open(sys.argv[0] + ".pid", "w") as file:
    file.write(str(os.getpid()))
for _ in range(100):  # the first may come before the launcher answers
    os.kill(os.getppid(), signal.SIGTSTP)
    time.sleep(0.1)
sys.exit("nobody continues what is stopped")
"""


@pytest.mark.timeout(60)
def test_ctrl_z_stops_its_processes_until_it_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The terminal does not reach them."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}{STOPPED}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    stopped: list[int] = []

    def stop(signum: int) -> None:
        """In place of stopping this process, which goes on at once."""
        stopped.append(signum)
        status = Path("/proc", (tmp_path / "python.pid").read_text(), "stat")
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)

    monkeypatch.setattr(signal, "raise_signal", stop)
    before = signal.signal(signal.SIGTSTP, lambda *_: None)
    try:
        assert launch.start_local([], 1) == 0
    finally:
        signal.signal(signal.SIGTSTP, before)
    assert set(stopped) == {signal.SIGSTOP}


@pytest.mark.parametrize(
    ("of_connections", "allowed"),
    [
        (None, range(10_000, 32_768)),
        ("32768\t60999\n", (*range(10_000, 32_768), *range(61_000, 65_536))),
        ("10000\t64999\n", range(65_000, 65_536)),
        ("1024\t65535\n", range(1024, 65_536)),
    ],
)
def test_where_processes_meet_no_connection_comes_before_them(
    of_connections: str | None, allowed: Container[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They listen seconds after the port was chosen, and any connection may be given one of the system's meanwhile."""
    file = tmp_path / "ip_local_port_range"
    if of_connections is not None:
        file.write_text(of_connections)
    monkeypatch.setattr(launch, "OF_CONNECTIONS", file)
    for _ in range(20):
        with launch.hold_port() as held:
            assert held.getsockname()[1] in allowed


def test_where_there_is_no_port_the_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(_self: socket.socket, _address: tuple[str, int]) -> None:
        raise OSError(errno.EADDRNOTAVAIL, "no such address")

    monkeypatch.setattr(socket.socket, "bind", bind)  # as where the loopback interface is down
    with pytest.raises(OSError, match="no such address"):
        launch.hold_port()


def test_processes_and_threads_are_those_of_the_cores_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    try:
        os.sched_setaffinity(0, {min(before)})  # as in a container or a job with one core
        assert launch.processes_at_hand() == num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert num_cores() == len(before)
    assert launch.processes_at_hand() == min(2, len(before))
