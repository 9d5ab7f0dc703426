"""Processes on this machine: how many, and starting them.

A launcher (torchrun, DeepSpeed's) gives every process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and
most give LOCAL_WORLD_SIZE, which says how many share the machine; for the tasks of Slurm's srun `adopt_slurm` derives
them. Without a launcher `start_local` starts the processes itself and gives them the same variables. That needs no
torch (but to count GPUs for ROCm), whose import takes seconds: each of the processes has its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from pathlib import Path

from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.errors import UserError, complain
from megatron_lcl.machine import num_cores, num_gpus
from megatron_lcl.processes import same_code
from megatron_lcl.train.resilience.start import code_of_signal, handle
from megatron_lcl.units import counted, listed

GRACE_SECONDS = 30.0
"""how long the other processes may take to end by themselves once one has ended, beside what their watchdogs take"""
END_SECONDS = 120.0
"""how much longer where none has failed: two trackers may each have 60 s for what was not sent (telemetry/feed.py)"""
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""variables that every launcher sets"""
WATCHED = "MEGATRON_LCL_WATCHED"
"""variable with the number of the pipe into which `start_local`'s processes say that they watch each other"""
OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""the ports that Linux gives to connections, first and last"""
_PR_SET_PDEATHSIG = 1
"""of Linux's prctl"""


def is_launched() -> bool:
    """Whether a launcher started this process.

    UserError where it is to be one of several and lacks some of the launcher's variables: they are left over from
    something else, or set by hand. Without LOCAL_RANK all processes of a machine would use its first GPU.
    """
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE"}:
        return False
    missing = [name for name in OF_LAUNCHERS if name not in os.environ]
    if missing and os.environ["WORLD_SIZE"] != "1":
        raise UserError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are set, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not; set what is missing, or, if no launcher has started this "
            "process, `unset RANK WORLD_SIZE`"
        )
    return True


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """In a task of srun, set the launcher's variables from Slurm's; where a launcher has set them they stay.

    MASTER_ADDR and MASTER_PORT are kept if they are set; otherwise they are the first node's name and a port derived
    from the numbers of the job and the step (several steps of a job may begin on one node). A step of one task
    (`srun --pty bash`) is a machine like any other, on which `start_local` starts processes.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks == 1 or "RANK" in environment:
        return
    bound = num_gpus() == 1  # by --gpus-per-task: the task's own GPU is number 0
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(tasks)
    environment["LOCAL_RANK"] = "0" if bound else environment["SLURM_LOCALID"]
    if (counts := environment.get("SLURM_STEP_TASKS_PER_NODE")) and "SLURM_NODEID" in environment:
        environment["LOCAL_WORLD_SIZE"] = str(_per_node(counts)[int(environment["SLURM_NODEID"])])
    environment.setdefault("MASTER_ADDR", hosts(environment["SLURM_STEP_NODELIST"])[0])
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID") or 0)
    environment.setdefault("MASTER_PORT", str(10_000 + (job + 7_919 * step) % 20_000))


def hosts(nodes: str) -> list[str]:
    """The names in a list as Slurm writes it: "gpu[003-004,9],login" → gpu003, gpu004, gpu9, login."""
    names = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not names:
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r} names no node")
    return [host for name in names for host in _expand(name)]


def _per_node(counts: str) -> list[int]:
    """Numbers as Slurm writes them for the nodes of a step: "2(x3),1" → 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _expand(name: str) -> list[str]:
    head, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    ranges, _, tail = rest.partition("]")
    ends = [part.partition("-")[::2] for part in ranges.split(",")]
    numbers = [str(n).zfill(len(low)) for low, high in ends for n in range(int(low), int(high or low) + 1)]
    return [f"{head}{number}{others}" for number in numbers for others in _expand(tail)]


def processes_at_hand() -> int:
    """One per CUDA device; on CPU two where there are two cores."""
    return num_gpus() or min(2, num_cores())


def divides(config: Config, processes: int) -> bool:
    """Whether the layout and the global batch of every phase divide among so many. UserError as `phases_of`."""
    for phase in phases_of(config):
        parallel, train = phase.config.parallel, phase.config.train
        replicas, rest = divmod(processes, parallel.tensor * parallel.pipeline)
        if rest or train.global_batch % (replicas * train.micro_batch):
            return False
    return True


def default_processes(config: Config, nodes: int = 1) -> int:
    """How many start on each of so many machines like this one: those at hand, or the most below that among which
    everything `divides`; where none is, all, and the check of the run says why. UserError as `phases_of`."""
    at_hand = processes_at_hand()
    return next((n for n in range(at_hand, 0, -1) if divides(config, nodes * n)), at_hand)


def check_devices(processes: int) -> None:
    """UserError where this machine has GPUs, and not one for every process. Takes none of them."""
    if 0 < (visible := num_gpus()) < processes:
        raise UserError(f"{processes} processes on a node where torch sees {counted(visible, 'GPU')}; start one a GPU")


def start_local(arguments: Sequence[str], processes: int, told: list[int] | None = None) -> int:
    """Run `python -m megatron_lcl ARGUMENTS`, with the code of this process, in so many; their exit code (the first
    that failed).

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on; before the processes watch each other, where nothing has begun,
    they end all at once. SIGTSTP (Ctrl-Z) stops them, until this process goes on. When one process has ended with a
    failure, the others notice that by themselves (`watchdog`); those that do not, or have not even begun to watch, are
    killed after a while. So are those that do not end when one has without a failure: it has waited for all before
    (`Checkpointer.wait_for_all`), and only trackers may have something left to send. None outlives this process (on
    Linux).
    told: is given the signals that came, for a caller that has more to start.
    """
    threads = max(1, num_cores() // processes)
    watched, say = os.pipe()
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **same_code(), WATCHED: str(say)}
    held = hold_port()  # they listen there once they have imported everything
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_lcl", *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches them once, through the handler below
            pass_fds=[say],
            preexec_fn=partial(_end_with, os.getpid(), getattr(ctypes.CDLL(None), "prctl", None)),
        )
        for rank in range(processes)
    ]
    os.close(say)

    came: list[int] = []
    told = [] if told is None else told

    def note(signum: int, _frame: object) -> None:
        came.append(signum)
        told.append(signum)

    def suspend(_signum: int, _frame: object) -> None:
        """Stop with the processes, which a terminal's Ctrl-Z does not reach, and go on with them. Their loaders wait
        for them by themselves; stopped, they would not notice where their process is killed."""
        for signum in (signal.SIGSTOP, signal.SIGCONT):
            for child in children:
                child.send_signal(signum)
            if signum == signal.SIGSTOP:
                signal.raise_signal(signum)  # returns when this process is to go on

    before = handle(note)
    if signal.getsignal(signal.SIGTSTP) is not signal.SIG_IGN:
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, suspend)
    try:
        return _wait(" ".join(["megatron-lcl", *arguments[:1]]), children, _Heard(watched), came)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(watched)
        held.close()


def _end_with(parent: int, prctl: Callable[[int, int], int] | None) -> None:
    """In a new process: end when `parent` does, or has before this could be asked for. prctl: Linux's."""
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def say_watched(timeout: float) -> None:
    """Tell `start_local` that a run has begun, and a signal is to end it in order; its processes watch each other, and
    end within `timeout` seconds when one has died."""
    if WATCHED in os.environ:
        os.write(int(os.environ[WATCHED]), f"{timeout} ".encode())


class _Heard:
    """What the processes have said into the pipe."""

    def __init__(self, pipe: int) -> None:
        os.set_blocking(pipe, False)
        self._pipe = pipe
        self._parts: list[bytes] = []

    def timeouts(self) -> list[float]:
        """Of the processes that watch, in seconds."""
        with contextlib.suppress(BlockingIOError):
            self._parts.append(os.read(self._pipe, 1 << 16))
        return [float(word) for word in b"".join(self._parts).split()]


def _wait(command: str, children: list[subprocess.Popen[bytes]], heard: _Heard, came: list[int]) -> int:
    """command: for messages. came: signals in the order in which they came. Their handler only adds to it: it may run
    at any point of this."""
    failed = stopped = 0
    waited, now = 0.0, time.monotonic()
    running = children
    killed: list[subprocess.Popen[bytes]] = []
    while running:
        before, some_ended = now, len(running) < len(children)
        time.sleep(0.1)
        now = time.monotonic()
        if some_ended:
            waited += min(now - before, 1.0)  # where more has passed this process was stopped, and the others with it
        running = [child for child in children if child.poll() is None]
        timeouts = heard.timeouts()
        while came and running:
            signum = came.pop(0)
            stopped = stopped or (0 if timeouts else signum)
            for child in running:
                child.send_signal(signal.SIGKILL if stopped else signum)
        failures = [(rank, child.returncode) for rank, child in enumerate(children) if child.returncode]
        if failures and not failed and not killed:
            rank, failed = failures[0]
            if failed < 0 and not stopped:
                name = signal.Signals(-failed).name
                complain(f"{command}: process {rank} was killed by {name}")
        grace = GRACE_SECONDS + max(timeouts, default=0.0) + (0 if failures else END_SECONDS)
        if running and not killed and waited > grace:
            killed = running
            for child in killed:
                child.kill()
            late = listed([rank for rank, child in enumerate(children) if child in killed], "process")
            complain(f"{command}: {late} had not ended {grace:.0f} s after the others: killed")
    if stopped:
        complain(f"{command}: {signal.Signals(stopped).name}: stopped; the same command goes on")
        return code_of_signal(stopped)
    return 128 - failed if failed < 0 else failed


def hold_port() -> socket.socket:
    """A socket with a port of 127.0.0.1 that is free, and that no connection is given before it is used, in seconds or
    minutes: none of `OF_CONNECTIONS`, where these leave any.

    Until it is closed nobody else finds the port free; who is told of it can listen there, by a socket with
    SO_REUSEADDR as servers have it.
    """
    try:
        first, last = map(int, OF_CONNECTIONS.read_text().split())
    except OSError:  # not Linux
        first, last = 32_768, 65_535
    ports = [port for port in range(10_000, 65_536) if not first <= port <= last] or [0]  # 0: any
    while True:
        held = socket.socket()
        try:
            held.bind(("127.0.0.1", random.SystemRandom().choice(ports)))
        except OSError as error:
            held.close()
            if error.errno != errno.EADDRINUSE:  # no port of this address can be had
                raise
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
