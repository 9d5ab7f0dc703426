"""A real Slurm of two nodes, and one to spare, on this machine, on loopback only: the fixture `slurm`.

Nothing outside a temporary folder is touched: its own munged (own key and socket), its own ports. Needs Debian's
packages slurm-wlm and munge, and root (slurmd starts jobs as other users).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import hold_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "setpriv")
CONF = """
ClusterName=test
GresTypes=gpu
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
KillWait=20
MpiDefault=none
NodeName=n1 Gres=gpu:2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory={memory}
NodeName=n2 Gres=gpu:2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory={memory}
NodeName=n3 Gres=gpu:2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory={memory}
PartitionName=test Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=spare Nodes=n[1-3] MaxTime=INFINITE State=UP
"""
# cred_expire: how long a requeued job waits before it starts again (Slurm's default: 120 s)
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # stand in for two GPUs of every node


@dataclass(frozen=True)
class Slurm:
    """A running Slurm; its commands find it through SLURM_CONF in `environment`."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str | Path, **options: object) -> str:
        """What a command prints; its errors are the exception's."""
        result = subprocess.run(
            [str(part) for part in command],
            **{"capture_output": True, "text": True, "timeout": 60, "env": self.environment, **options},  # type: ignore
        )
        assert result.returncode == 0, f"{command}: {result.stderr}{result.stdout}"
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """The job's state, e.g. PENDING, RUNNING, COMPLETED."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        for word in self.run("scontrol", "show", "job", job).split():
            key, _, value = word.partition("=")
            if key == name:
                return value
        raise AssertionError(f"scontrol shows no {name} of job {job}")

    def idle_nodes(self) -> int:
        """How many nodes wait for work; 0 also while nothing answers."""
        command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, env=self.environment)
        return sum(map(int, result.stdout.split())) if result.returncode == 0 else 0

    def wait(self, reached: Callable[[], bool], what: str, timeout: float = 120.0) -> None:
        """Until `reached`; fails with `what` and the ends of Slurm's own logs. Slurm may once not answer in time."""
        deadline = time.monotonic() + timeout
        while True:
            failed: Exception | None = None
            try:
                if reached():
                    return
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failed = error
            assert time.monotonic() < deadline, f"not after {timeout} s: {what}; {failed}\n{self.logs()}"
            time.sleep(0.5)  # most look by a command of Slurm

    def logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Slurm with the nodes n1 and n2, of two CPUs each, and n3 in the partition `spare`; skips where it cannot run."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)} not found; Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of the tests' own needs root")
    # a short path: that of a socket has 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder, start(Path(folder)) as started:
        yield started


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@contextmanager
def start(folder: Path) -> Iterator[Slurm]:
    """All daemons as children of this process; at the end jobs are killed and the daemons ended."""
    folder.chmod(0o755)
    for part in ("munge", "state", "spool-n1", "spool-n2", "spool-n3"):
        (folder / part).mkdir(mode=0o755)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 4
    held = [hold_port() for _ in range(4)]
    ports = [one.getsockname()[1] for one in held]
    conf = CONF.format(host=socket.gethostname(), folder=folder, ports=ports, memory=memory)
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(GPUS)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    environment = {**keep, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    slurm, munge = Slurm(folder, environment), folder / "munge"
    slurm.run("mungekey", "--create", "--keyfile", munge / "key")
    files = [f"--{name}-file={munge / name}" for name in ("key", "log", "pid", "seed")]
    with ExitStack() as daemons:
        for one in held:
            daemons.enter_context(one)

        def daemon(*command: str) -> None:
            # ends with this process, however that ends
            line = ["setpriv", "--pdeathsig=TERM", *command]
            log = daemons.enter_context((folder / f"{command[0]}-output.log").open("ab"))
            where = {"env": environment, "cwd": folder, "stdin": subprocess.DEVNULL}
            child = subprocess.Popen(line, stdout=log, stderr=log, **where)
            daemons.callback(_end, child)

        daemon("munged", "--force", "--foreground", f"--socket={munge / 'socket'}", *files)
        slurm.wait((munge / "socket").exists, "munged's socket", 20)
        daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2", "n3"):
            daemon("slurmd", "-D", "-N", node)
        daemons.callback(_kill_jobs, folder)
        slurm.wait(lambda: slurm.idle_nodes() == 3, "three idle nodes", 60)
        yield slurm


def _kill_jobs(folder: Path) -> None:
    """Whatever is left, in one way for all faults: jobs know the cluster, Slurm's own processes stand in its folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            knows = f"SLURM_CONF={folder}".encode() in (process / "environ").read_bytes()
            if knows or os.readlink(process / "cwd").startswith(str(folder)):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # gone, or not ours to look at
            continue


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(15)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
