"""The sbatch scripts on a real Slurm of two nodes, with a stand-in for Python: what they start, and what they do next.

`test_training_on_slurm.py` trains with them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from local_slurm import Slurm
from ports import hold_port

from megatron_lcl.train.launch import hosts

ROOT = Path(__file__).parents[2]
ARGUMENTS = ("--train.output", "runs/an output")
SCRIPTS = ("lcl_vitb32", "lcl_vitb16", "lcl_vitl14", "lcl_vitg")
STAND_IN = """#!/usr/bin/env bash
# of a job's first start, `last` is the node of that name; Slurm gives a job whichever are free
[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || last=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-login}" | tail -n 1)
[ "${FAULTY:-}" != last ] || FAULTY=${last:-none}
[ "${STUCK:-}" != last ] || STUCK=${last:-none}
case " $* " in *" --dry-run "*)
  if [ "${FAULTY:-}" = "${SLURMD_NODENAME:-login}" ]; then
    printf 'a warning\\nmegatron-lcl train: cannot read it\\n' >&2
    exit 2
  fi
  [ "${OLDER:-}" != "${SLURMD_NODENAME:-login}" ] || echo "software    torch 1.0"
  echo "command     $MEGATRON_LCL_LAUNCH"
  [ -n "${SLURM_JOB_ID:-}" ] || printf '<%s>' "$@"
  echo "run         runs/an output: goes on from $(cat "${SLURM_SUBMIT_DIR:-.}/newest" 2>/dev/null)"
  echo "checks      passed: all"
  exit ;;
esac
case " $* " in *" selftest "*)
  [ "${STUCK:-}" != "$SLURMD_NODENAME" ] || sleep 600
  [ -z "${REAL:-}" ] || exec "$REAL" "$@"
  [ "$SLURM_PROCID" != 0 ] || echo "all-reduce  of $SLURM_STEP_NUM_TASKS: $*"
  exit ;;
esac
trap 'echo saved && exit 75' USR1 TERM
echo "start ${SLURM_RESTART_COUNT:-0}, task $SLURM_PROCID of $SLURM_STEP_NUM_TASKS, $SLURM_LOCALID on $SLURMD_NODENAME"
echo "GPUs $CUDA_VISIBLE_DEVICES"
printf '<%s>' "$@" && echo
eval "${DOES:-}"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
if [ "${CRASHES:-}" = "$SLURM_PROCID" ]; then echo "OSError: no such thing" && exit 1; fi
[ -z "${CRASHES:-}" ] || exit 0
while :; do sleep 0.1; done
"""

# of an array's three tasks: the first ends at once, the last after it and starts again, the second once it has
ONE_TASK_AGAIN = """
echo "member $SLURM_ARRAY_TASK_ID, start ${SLURM_RESTART_COUNT:-0}"
cd "$SLURM_SUBMIT_DIR"
tries=0
patiently() { until "$@" || [ $((tries += 1)) = 300 ]; do sleep 0.2; done; }
two_are_left() { [ "$(squeue --noheader --array --jobs="$SLURM_ARRAY_JOB_ID" | wc -l)" = 2 ]; }
case $SLURM_ARRAY_TASK_ID,${SLURM_RESTART_COUNT:-0} in
  1,0) patiently test -e again ;;
  2,0) patiently two_are_left && exit 75 ;;
  2,1) touch again ;;
esac
exit 0
"""
OF_ANOTHER = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "7", "SLURM_GPUS": "1"}
SRUN = """#!/usr/bin/env bash
printf '%s\\n' srun "$@" >"$SLURM_SUBMIT_DIR/srun-$SLURM_JOB_ID"
{ printf '%q ' "$@" && echo; } >>"$SLURM_SUBMIT_DIR/sruns-$SLURM_JOB_ID"
if [ -n "${UNREACHED:-}" ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
  UNREACHED=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
  echo "srun: error: Task launch for StepId=$SLURM_JOB_ID.0 failed on node $UNREACHED: Communication failure" >&2
  echo "srun: error: Application launch failed: Communication failure" >&2
  exit 1
fi
words=()
for word in "$@"; do [[ "$word" == --container-* ]] || words+=("$word"); done # those are the plugin pyxis's
exec "$(PATH=${PATH#*:} type -P srun)" "${words[@]}"
"""  # keeps the last one's words, and those of all
APPTAINER = """#!/usr/bin/env bash
[ "$1 $2 $3" = "exec --nv an image.sif" ] || exit 255
shift 3
[ "$1" = /opt/in/the/image/bin/python3 ] || exit 254
shift
exec "$(dirname "$0")/python3" "$@"
"""  # an image whose Python is nowhere else


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts alone, in a path with a space, and an environment whose Python is the stand-in."""
    checkout = tmp_path_factory.mktemp("a checkout") / "of mine"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("python3", STAND_IN), ("srun", SRUN), ("apptainer", APPTAINER)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return checkout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where jobs are submitted, another place."""
    folder = tmp_path / "sub mit"
    folder.mkdir()
    return folder


def submit(slurm: Slurm, checkout: Path, folder: Path, *options: str, **environment: str) -> str:
    """A job of four tasks on both nodes; its number."""
    line = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=2", *options, checkout / "launch" / "lcl_vitg.sh"]
    path = f"{checkout}/.venv/bin:{slurm.environment['PATH']}"
    return slurm.run(*line, *ARGUMENTS, cwd=folder, env={**slurm.environment, "PATH": path, **environment})


def starts(folder: Path, job: str) -> list[str]:
    """Every start of every task."""
    lines = [line for log in (folder / f"lcl_vitg-{job}").glob("rank-*.log") for line in log.read_text().splitlines()]
    return sorted(line for line in lines if line.startswith("start"))


def planned(text: str) -> list[str]:
    """The words of the command that a dry run prints."""
    line = next(line for line in reversed(text.splitlines()) if line.startswith("command "))
    return shlex.split(line)[1:]


def log(folder: Path, job: str) -> str:
    return (folder / f"lcl_vitg-{job}.log").read_text()


@pytest.mark.slow
def test_before_the_time_limit_the_job_saves_and_goes_back_into_the_queue(
    slurm: Slurm, checkout: Path, folder: Path
) -> None:
    job = submit(slurm, checkout, folder, "--time=10", "--signal=USR1@70")
    slurm.wait(lambda: len(starts(folder, job)) == 4, "all tasks have started")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    slurm.wait(lambda: slurm.state(job) == "COMPLETED", "the second start has finished", 240)
    text = log(folder, job)
    assert slurm.field(job, "Restarts") == "1"
    assert text.count("checks      passed") == 2
    assert text.count("ended by a signal; back into the queue") == 1
    ranks = [(0, 0, "n1"), (1, 1, "n1"), (2, 0, "n2"), (3, 1, "n2")]
    expected = [f"start {n}, task {rank} of 4, {local} on {node}" for n in (0, 1) for rank, local, node in ranks]
    assert starts(folder, job) == expected
    first = (folder / f"lcl_vitg-{job}" / "rank-0000.log").read_text()
    assert "GPUs 0,1\n" in first  # both of the node: the process takes its own by its local rank
    config = checkout / "configs" / "lcl_vitg_interleaved.yaml"
    assert f"<--config><{config}><--train.output><runs/an output>" in first
    assert "saved" in first


@pytest.mark.slow
def test_a_canceled_job_saves_and_stays_canceled(slurm: Slurm, checkout: Path, folder: Path) -> None:
    job = submit(slurm, checkout, folder)
    slurm.wait(lambda: len(starts(folder, job)) == 4, "all tasks have started")
    slurm.run("scancel", job)
    slurm.wait(lambda: slurm.state(job) == "CANCELLED", "script and tasks have ended")
    assert "saved" in (folder / f"lcl_vitg-{job}" / "rank-0003.log").read_text()
    assert "back into the queue" not in log(folder, job)


@pytest.mark.slow
def test_a_requeue_from_outside_is_not_asked_for_twice(slurm: Slurm, checkout: Path, folder: Path) -> None:
    job = submit(slurm, checkout, folder, "--ntasks-per-node=1")
    slurm.wait(lambda: len(starts(folder, job)) == 2, "one task a node has started, as was asked for")
    slurm.run("scontrol", "requeue", job)
    slurm.wait(lambda: slurm.state(job) == "COMPLETED", "the second start has finished")
    assert slurm.field(job, "Restarts") == "1"
    assert len(starts(folder, job)) == 4
    assert "back into the queue" not in log(folder, job)
    ran = (folder / f"srun-{job}").read_text().splitlines()
    assert planned(log(folder, job)) == ran, "what the check has printed is what was run"
    # without a job: the same words, but for what only a job knows
    script = ["bash", checkout / "launch" / "lcl_vitg.sh", *ARGUMENTS, "--dry-run"]
    before = slurm.run(*script, "--nodes", "2", "--processes=1", cwd=folder)
    assert "<--dry-run><--nodes><2><--processes><1>" in before
    known = {
        "--cpus-per-task=CPUS": "--cpus-per-task=2",
        "--output=lcl_vitg-JOB/rank-%4t.log": f"--output=lcl_vitg-{job}/rank-%4t.log",
    }
    assert [known.get(word, word) for word in planned(before)] == ran
    script_says = planned(slurm.run(*script, cwd=folder))
    assert {"--nodes=32", "--ntasks=256", "--ntasks-per-node=8"} <= set(script_says)


class Lost(NamedTuple):
    """A job that loses a process, and what becomes of it."""

    options: tuple[str, ...]
    does: str
    """what its tasks do"""
    environment: dict[str, str]


TELL = 'echo "${last:-n2}" >"$MEGATRON_LCL_FAULTS/fault-$SLURM_PROCID"; '
LOST = {
    "killed": Lost(("--nodes=1",), '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || kill -KILL $$', {}),
    "no progress": Lost(("--nodes=2",), TELL + "echo step-5 >newest; exit 71", {"MAX_RESTARTS": "1"}),
    "watched": Lost(
        ("--nodes=2", "--partition=spare"),
        'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then ' + TELL + "exit 71; fi",
        {},
    ),
    "check": Lost(("--nodes=2", "--partition=spare"), "exit 0", {"FAULTY": "last"}),
    "unreached": Lost(("--nodes=2", "--partition=spare"), "exit 0", {"UNREACHED": "last"}),
    "stuck": Lost(
        ("--nodes=2", "--partition=spare"),
        "exit 0",
        {"STUCK": "last", "REAL": sys.executable, "CHECK_TIMEOUT": "30", "MASTER_ADDR": "127.0.0.1"},
    ),
    "stopped": Lost(("--nodes=1",), "exit 75", {"MAX_RESTARTS": "1"}),
    "saves": Lost(
        ("--nodes=1",),
        'echo "step-$SLURM_RESTART_COUNT" >newest; [ "${SLURM_RESTART_COUNT:-0}" = 2 ] || exit 75',
        {"MAX_RESTARTS": "0"},
    ),
    "never": Lost(("--nodes=1",), "exit 71", {"MAX_RESTARTS": "0"}),
    "bad input": Lost(("--nodes=1",), "exit 2", {}),
    "program": Lost(("--nodes=1",), "exit 1", {}),
}


@pytest.fixture(scope="module")
def lost(
    slurm: Slurm, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[str, Path]]]:
    """Each job's number and folder; all wait for Slurm at the same time."""
    jobs, held = {}, [hold_port() for _ in LOST]
    for (name, job), port in zip(LOST.items(), held, strict=True):
        folder = tmp_path_factory.mktemp("lost") / "sub mit"
        folder.mkdir()
        options = ("--gpus-per-node=0", "--ntasks-per-node=1", *job.options)
        # their all-reduces meet at a port of their own: by the job's number it would be that of other tests' jobs
        environment = {"DOES": job.does, "MASTER_PORT": str(port.getsockname()[1]), **job.environment}
        jobs[name] = submit(slurm, checkout, folder, *options, **environment), folder
    yield jobs
    for port in held:
        port.close()


def ended(slurm: Slurm, job: str) -> tuple[str, ...]:
    """How a job has ended, how often it was started again, which nodes it leaves out, and where it ran last."""
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), "the job has ended", 300)
    return tuple(slurm.field(job, name) for name in ("JobState", "ExitCode", "Restarts", "ExcNodeList", "NodeList"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "watched", "check", "unreached", "stuck"])
def test_what_is_lost_starts_again_without_the_node(name: str, slurm: Slurm, lost: dict[str, tuple[str, Path]]) -> None:
    """By what srun says, or the processes that watched each other; also a node that alone fails the check, or on which
    it cannot be launched, or whose process does not come to the all-reduce, which is real."""
    job, folder = lost[name]
    how = ended(slurm, job)
    text = log(folder, job)
    given = re.search(r": start 0 of job \d+ on (\S+);", text)
    assert given, text
    last = hosts(given[1])[-1]
    assert how[:4] == ("COMPLETED", "0:0", "1", last), text
    assert hosts(how[4]) == [f"n{n}" for n in range(1, 3 if name == "killed" else 4) if f"n{n}" != last], text
    if name == "stuck":
        before, after = text.split(f"back into the queue, without {last}")
        assert f"megatron-lcl: all-reduce: process 1 of {last} has not come within 30 s\n" in before, before
        assert re.search(r"\nall-reduce  2 processes on 2 nodes, gloo: 16 MiB in .* bus bandwidth .* GB/s ", after)
        assert [line.split(",")[0] for line in starts(folder, job)] == ["start 1"] * 2, "nothing was trained before"
    assert text.count(f"back into the queue, without {last}") == 1


@pytest.mark.slow
def test_starts_from_the_same_checkpoint_are_bounded(slurm: Slurm, lost: dict[str, tuple[str, Path]]) -> None:
    """Two of them here. A checkpoint that came in the first start gives all of them back."""
    job, folder = lost["no progress"]
    assert ended(slurm, job) == ("FAILED", "71:0", "2", "(null)", "n[1-2]")
    text = log(folder, job)
    assert text.splitlines()[-1] == "--- the job has been started 2 times from the same checkpoint (MAX_RESTARTS=1)"
    assert text.count("there are not enough nodes to do without n2") == 2
    assert text.count("goes on from step-5") == 2


@pytest.mark.slow
def test_stops_without_a_new_checkpoint_are_bounded(slurm: Slurm, lost: dict[str, tuple[str, Path]]) -> None:
    """Those that have saved are not."""
    job, folder = lost["stopped"]
    assert ended(slurm, job)[:3] == ("FAILED", "71:0", "2"), log(folder, job)
    assert [line.split(",")[0] for line in starts(folder, job)] == ["start 0", "start 1"]
    assert "--- the job has been started 3 times from the same checkpoint (MAX_RESTARTS=1)" in log(folder, job)
    job, folder = lost["saves"]
    assert ended(slurm, job)[:3] == ("COMPLETED", "0:0", "2"), log(folder, job)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bad input", "program", "never"])
def test_what_would_only_happen_again_does_not_start_again(
    name: str, slurm: Slurm, lost: dict[str, tuple[str, Path]]
) -> None:
    job, folder = lost[name]
    code = {"bad input": 2, "program": 1, "never": 71}[name]
    assert ended(slurm, job)[:4] == ("FAILED", f"{code}:0", "0", "(null)")
    assert "back into the queue" not in log(folder, job)


@pytest.mark.slow
def test_a_failed_check_is_one_line_and_starts_nothing(slurm: Slurm, checkout: Path, folder: Path) -> None:
    faulty = submit(slurm, checkout, folder, FAULTY="n2")
    older = submit(slurm, checkout, folder, OLDER="n2")
    nothing = submit(slurm, checkout, folder, VENV=str(folder))
    for job, message in (
        (faulty, "megatron-lcl train: cannot read it (on n2)"),
        (older, "nodes n1 and n2 differ: > software    torch 1.0"),
        (nothing, f"no Python at {folder}/bin/python3; set VENV to an environment with megatron_lcl"),
    ):
        slurm.wait(lambda job=job: slurm.state(job) == "FAILED", "the job fails")  # type: ignore[misc]
        assert slurm.field(job, "ExitCode") == "2:0"
        lines = [line for line in log(folder, job).splitlines() if not line.startswith("---")]
        assert lines == [message]
        assert starts(folder, job) == []


@pytest.mark.slow
def test_a_process_that_fails_is_named(slurm: Slurm, checkout: Path, folder: Path) -> None:
    """By its log in the folder that is called like the job, whatever of the name srun would replace.

    All four are started, whatever sbatch passes on of another job.
    """
    job = submit(slurm, checkout, folder, "--job-name=lr10%seed%j", CRASHES="2", **OF_ANOTHER)
    slurm.wait(lambda: slurm.state(job) == "FAILED", "the job fails")
    assert slurm.field(job, "ExitCode") == "1:0"
    said = (folder / f"lr10%seed%j-{job}.log").read_text()
    assert said.splitlines()[-1] == "rank-0002.log: OSError: no such thing"


@pytest.mark.slow
def test_a_job_with_another_number_of_gpus_than_the_script_asks_for_uses_those(
    slurm: Slurm, checkout: Path, folder: Path
) -> None:
    """Which are all of the node: the script asks for nodes of its own."""
    job = submit(slurm, checkout, folder, "--nodes=1", "--gpus-per-node=8", "--gres=gpu:1", DOES="exit 0")
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "the job has ended")
    assert slurm.state(job) == "COMPLETED", log(folder, job)
    assert slurm.field(job, "TresPerNode") == "gres/gpu:8,gres/gpu:1"
    node = slurm.field(job, "NodeList")
    assert starts(folder, job) == [f"start 0, task {n} of 2, {n} on {node}" for n in range(2)]
    assert "GPUs 0,1\n" in (folder / f"lcl_vitg-{job}" / "rank-0000.log").read_text()


@pytest.mark.slow
def test_containers_are_given_to_srun_or_before_python(slurm: Slurm, checkout: Path, folder: Path) -> None:
    """In every step: the check, the all-reduce, the run; with a Python that is in the image only."""
    environment = {
        "SRUN_ARGS": f"--container-image='an image.sqsh' --container-mounts={folder.parent} --cpu-bind=none",
        "TASK_PREFIX": "apptainer exec --nv 'an image.sif'",
        "VENV": "/opt/in/the/image",
        "DOES": "exit 0",
        "CHECK_TIMEOUT": "77",
    }
    job = submit(slurm, checkout, folder, "--gpus-per-node=0", "--ntasks-per-node=1", **environment)
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "the job has ended")
    assert slurm.state(job) == "COMPLETED", log(folder, job)
    assert len(starts(folder, job)) == 2
    steps = [shlex.split(line) for line in (folder / f"sruns-{job}").read_text().splitlines()]
    before = ["apptainer", "exec", "--nv", "an image.sif", "/opt/in/the/image/bin/python3", "-m", "megatron_lcl"]
    for words, command in zip(steps, ("train", "selftest", "train"), strict=True):
        at = words.index("apptainer")
        assert words[at : at + 8] == [*before, command]
        options = words[:at]
        assert {"--container-image=an image.sqsh", "--cpu-bind=none", "--export=ALL"} <= set(options)
        assert f"--container-mounts={folder.parent}" in options
    assert "--dry-run" in steps[0]
    assert f"all-reduce  of 2: {' '.join(before[5:])} selftest --all-reduce --timeout 77\n" in log(folder, job)
    assert planned(log(folder, job)) == ["srun", *steps[2]], "and the check has printed it"


def test_the_file_of_the_site_may_choose_the_environment(checkout: Path, tmp_path: Path) -> None:
    its_own = tmp_path / "an environment" / "bin" / "python3"
    its_own.parent.mkdir(parents=True)
    its_own.write_text("#!/bin/sh\necho chosen\n")
    its_own.chmod(0o755)
    (tmp_path / "set-up").write_text(f"export VENV='{its_own.parents[1]}'\n")
    script = ["bash", str(checkout / "launch" / "lcl_vitg.sh"), "--dry-run"]
    environment = {**os.environ, "SETUP": str(tmp_path / "set-up")}
    result = subprocess.run(script, capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode, result.stdout) == (0, "chosen\n"), result.stderr


def test_the_scripts_differ_in_name_and_size_only() -> None:
    texts = set()
    for name in SCRIPTS:
        text = (ROOT / "launch" / f"{name}.sh").read_text()
        assert (ROOT / "configs" / f"{name}_interleaved.yaml").is_file()
        options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
        assert all(option in options[0] for option in ("--requeue", "--open-mode=append", "--signal=USR1@"))
        code = "\n".join(line for line in text.splitlines() if not line.startswith("# "))
        texts.add(re.sub(r"--nodes=\d+", "", code.replace(name, "NAME")))
    assert len(texts) == 1


@pytest.mark.slow
def test_each_task_of_a_job_array_knows_its_own(slurm: Slurm, checkout: Path, folder: Path) -> None:
    """As `train --sweep` needs it, and every task finds the scripts, whatever scontrol says of the others.

    The last one, whose number is that of the array, goes back into the queue alone, while one has ended and one runs.
    """
    one_node = ["--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=1", "--array=0-2"]
    array = submit(slurm, checkout, folder, *one_node, DOES=ONE_TASK_AGAIN)

    def members() -> list[str]:
        lines = [line for path in folder.glob("lcl_vitg-*/rank-0000.log") for line in path.read_text().splitlines()]
        return sorted(line for line in lines if line.startswith("member"))

    tasks = [f"{array}_{number}" for number in range(3)]
    slurm.wait(lambda: all(slurm.state(t) in ("COMPLETED", "FAILED") for t in tasks), "all tasks have ended")
    assert [(slurm.state(task), slurm.field(task, "Restarts")) for task in tasks] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
    ]
    assert members() == ["member 0, start 0", "member 1, start 0", "member 2, start 0", "member 2, start 1"]
    assert slurm.field(tasks[2], "JobId") == array
