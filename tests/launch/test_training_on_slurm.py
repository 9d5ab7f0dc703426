"""Training on a real Slurm: a job over two nodes that is stopped and loses one ends like a run that never stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from local_slurm import Slurm
from ports import hold_port
from train.resilience import fleet

from megatron_lcl import config as configs
from megatron_lcl.run_folder import CONFIG

SCRIPT = Path(__file__).parents[2] / "launch" / "lcl_vitg.sh"
STEPS = 30
SLOW = """
import sys, time
from pathlib import Path

if "train" in sys.orig_argv and "--dry-run" not in sys.orig_argv:
    from megatron_lcl.train.step import Stepper

    plain, calls = Stepper.start, []

    def start(self, *arguments):
        calls.append(1)
        if len(calls) > 6 and Path(__file__).with_name("slow").exists():
            time.sleep(2.0)
        return plain(self, *arguments)

    Stepper.start = start
"""
"""sitecustomize.py, which Python imports first: the run is then not at its end when it is stopped, or loses a node"""


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    """Step, loss, contrastive loss and gradient norm of every step of a run."""
    lines = [line for line in fleet.lines(run) if "loss" in line]
    return [(line["step"], line["loss"], line["contrastive"], line["grad_norm"]) for line in lines]


def sbatch(
    slurm: Slurm, folder: Path, *arguments: str, options: Sequence[str] = ("--nodes=2",), **environment: str
) -> str:
    environment = {**slurm.environment, "VENV": str(Path(sys.executable).parents[1]), **environment}
    options = ["--parsable", "--partition=spare", "--gpus-per-node=0", "--ntasks-per-node=1", *options]
    return slurm.run("sbatch", *options, SCRIPT, *arguments, cwd=folder, env=environment)


def processes_of(slurm: Slurm, job: str, node: str) -> list[int]:
    """A job's processes of training on a node, loaders included, which are its children."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        cluster = f"SLURM_CONF={slurm.environment['SLURM_CONF']}"  # tests that run side by side have one each
        wanted = {cluster.encode(), f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()}
        if (
            wanted <= set(environment)
            and b"megatron_lcl" in words
            and Path(words[0].decode()).name.startswith("python")
        ):
            found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_requeued_and_after_a_lost_node_it_ends_like_an_undisturbed_run(
    slurm: Slurm, tiny: list[str], tmp_path: Path
) -> None:
    """Over two nodes: put back into the queue, and then killed on the second of them, which is not used again."""
    folder, run = tmp_path / "sub mit", tmp_path / "sub mit" / "a run"
    folder.mkdir()
    arguments = [*tiny, "--train.steps", str(STEPS), "--checkpoint.every", "20"]
    held = hold_port()  # by its number, which starts at 1, it would be that of other tests' jobs on this machine
    port = str(held.getsockname()[1])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    slow = tmp_path / "site" / "slow"
    slow.parent.mkdir()
    slow.touch()
    slow.with_name("sitecustomize.py").write_text(SLOW)
    meet["PYTHONPATH"] = os.pathsep.join(filter(None, (str(slow.parent), os.environ.get("PYTHONPATH"))))
    job = sbatch(slurm, folder, *arguments, "--train.output", "a run", **meet)
    metrics, log = run / "metrics.jsonl", folder / f"lcl_vitg-{job}.log"
    slurm.wait(lambda: metrics.exists() and len(losses(run)) > 5, "six steps", 300)
    slurm.run("scontrol", "requeue", job)
    rank0 = folder / f"lcl_vitg-{job}" / "rank-0000.log"
    slurm.wait(lambda: rank0.read_text().count("going on from") == 1, "the second start has its checkpoint", 300)
    stopped = re.search(r"SIGTERM: ended after step (\d+)", rank0.read_text())
    assert stopped is not None, rank0.read_text()
    assert 5 < int(stopped[1]) < STEPS
    assert f"going on from a run/checkpoints/step-{int(stopped[1]):08d}" in rank0.read_text()
    shown = re.findall(
        rf"^step (\d+)/{STEPS} loss [\d.]+ \(generation .*img/s.* left$", rank0.read_text(), re.MULTILINE
    )
    assert [int(step) for step in shown][: int(stopped[1])] == list(range(1, int(stopped[1]) + 1))
    slurm.wait(lambda: losses(run)[-1][0] > int(stopped[1]), "a step of the second start", 300)
    for pid in processes_of(slurm, job, "n2"):
        os.kill(pid, signal.SIGKILL)
    slow.unlink()
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "the job has ended", 300)
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert (slurm.field(job, "Restarts"), slurm.field(job, "NodeList")) == ("2", "n[1,3]")
    assert "exit code 137; back into the queue, without n2" in log.read_text()
    said = rank0.read_text()
    assert re.search(r"process 1 died or its machine did: .* \(host n2, last step done: \d+\)", said), said
    summed = re.findall(
        r"^all-reduce  2 processes on 2 nodes, gloo: 16 MiB in .*, bus bandwidth [\d.]+ GB/s ",
        log.read_text(),
        re.MULTILINE,
    )
    assert len(summed) == 3, "before each start"
    assert log.read_text().count(f"processes   2: 1 on each of 2 nodes, meeting at 127.0.0.1:{port}\n") == 3

    held.close()
    undisturbed = tmp_path / "undisturbed"
    config = SCRIPT.parents[1] / "configs" / "lcl_vitg_interleaved.yaml"
    fleet.train(undisturbed, "--config", str(config), *arguments, timeout=300)
    assert losses(run) == losses(undisturbed)
    assert [step for step, *_ in losses(run)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_what_is_wrong_is_one_line_before_anything_starts(slurm: Slurm, tiny: list[str], tmp_path: Path) -> None:
    job = sbatch(slurm, tmp_path, *tiny, "--data.corpora", "/nowhere", MASTER_ADDR="127.0.0.1")
    slurm.wait(lambda: slurm.state(job) == "FAILED", "the job fails", 300)
    lines = (tmp_path / f"lcl_vitg-{job}.log").read_text().splitlines()
    assert lines[1:] == [
        "megatron-lcl train: /nowhere is not a corpus: it has no corpus.json; write one with `megatron-lcl preprocess` "
        "(on n1 n2)"
    ]
    assert not list((tmp_path / f"lcl_vitg-{job}").glob("rank-*"))


@pytest.mark.slow
def test_each_task_of_an_array_trains_its_run_of_a_sweep(slurm: Slurm, tiny: list[str], tmp_path: Path) -> None:
    sweep = ["--train.steps", "2", "--train.output", "runs", "--sweep", "train.seed=0,1", "--processes", "1"]
    array = sbatch(slurm, tmp_path, *tiny, *sweep, options=("--nodes=1", "--array=0-1"))
    slurm.wait(lambda: slurm.idle_nodes() == 3 and not slurm.run("squeue", "--noheader"), "the array has ended", 300)
    said = "".join(log.read_text() for log in tmp_path.glob("lcl_vitg-*.log"))
    runs = {run.name: run for run in (tmp_path / "runs").iterdir()}
    assert set(runs) == {"seed=0", "seed=1"}, said
    assert [configs.load(runs[f"seed={seed}"] / CONFIG).train.seed for seed in (0, 1)] == [0, 1]
    assert losses(runs["seed=0"])[0] != losses(runs["seed=1"])[0]
    assert [len(losses(run)) for run in runs.values()] == [2, 2], said
    states = slurm.run("scontrol", "--oneliner", "show", "job", array)
    assert states.count("JobState=COMPLETED") == 2, states
