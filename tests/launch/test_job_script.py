"""The sbatch scripts, and functions of restarts.sh, with stand-ins for Slurm's commands, which may not answer, and for
the time that they wait.

`test_sbatch.py` runs them on a real Slurm.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NO_ANSWER = "Socket timed out on send/recv operation"
SCONTROL = f"""#!/usr/bin/env bash
echo "scontrol $*" >>"$FAKE/asked"
case $1 in
  show)
    [ "$2" != hostnames ] || {{ tr , '\\n' <<<"$3" && exit; }}
    # the first times there is no answer
    [ -s "$FAKE/silent" ] || {{ cat "$FAKE/jobs" && exit; }}
    sed -i 1d "$FAKE/silent"
    echo "slurm_load_jobs error: {NO_ANSWER}" >&2 && exit 1 ;;
  requeue) echo COMPLETING >"$FAKE/state" ;;
esac
"""
SQUEUE = """#!/usr/bin/env bash
cat "$FAKE/state"
"""
SRUN = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$FAKE/sruns" && echo >>"$FAKE/sruns"
env | grep ^SLURM_ | sort >"$FAKE/environment"
step=run code=${RUN:-0}
case " $* " in *" --dry-run "*) step=check code=${CHECK:-0} ;; *" selftest "*) step=sum code=${SUM:-0} ;; esac
if [ -n "${REFUSES:-}" ] && [ "$REFUSES" = "$step" ]; then echo "srun: error: $SAYS" >&2 && exit 1; fi
log=job-$SLURM_JOB_ID
case $step in
  check)
    [ "$code" = 0 ] || echo "megatron-lcl: SIGUSR1: stopped" >"$log/check-0.err"
    [ "$code" != 0 ] || printf '%s\\n' 'run  a: step 0' 'checks  passed: all' | tee "$log"/check-{0,1}.log >/dev/null ;;
  sum) echo "all-reduce  all" >"$log/all-reduce.log" ;;
esac
exit "$code"
"""
JOB = "JobId=27 JobName=job\n   NtasksPerN:B:S:C={tasks}:0:*:* CoreSpec=*\n   Command={script} --train.output a\n"
"""as scontrol shows a job"""
OF_A_JOB = {
    "SLURM_JOB_ID": "27",
    "SLURM_JOB_NAME": "job",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n1,n2",
    "SLURM_JOB_PARTITION": "any",
    "SLURM_CPUS_ON_NODE": "16",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_GPUS_PER_NODE": "4",
    "SLURMD_NODENAME": "n1",
}
"""what Slurm sets in it"""
OF_ANOTHER = {
    "SLURM_ARRAY_JOB_ID": "25",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_ARRAY_TASK_COUNT": "3",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x00000001",
    "SLURM_CPU_BIND_LIST": "0x00000001",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_MEM_BIND": "local",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_MEM_PER_NODE": "1600",
    "SLURM_GPUS": "1",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_TRES_PER_TASK": "cpu=1,gres/gpu=1",
    "SLURM_NTASKS_PER_GPU": "1",
    "SLURM_NTASKS_PER_TRES": "1",
    "SLURM_CPUS_PER_GPU": "1",
    "SLURM_TRES_BIND": "gres/gpu:closest",
}
"""that of the job in which sbatch was called"""


class Ended(NamedTuple):
    """What a job has done."""

    code: int
    said: str
    asked: list[str]
    """of scontrol, but for nodes' names"""
    sruns: list[list[str]]
    environment: dict[str, str]
    """Slurm's variables in the last of them"""


class Stage:
    """A checkout, the stand-ins, and the folder of a job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, folder / "programs"
        self.script = folder / "a checkout" / "launch" / "lcl_vitg.sh"
        shutil.copytree(ROOT / "launch", self.script.parent)
        self.programs.mkdir()
        for name, text in (("scontrol", SCONTROL), ("squeue", SQUEUE), ("srun", SRUN), ("sleep", "#!/bin/sh\n")):
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        shutil.copy(self.script, folder / "slurm_script")  # as Slurm does
        self.shows(JOB.format(tasks=0, script=self.script))

    def shows(self, text: str) -> None:
        """What scontrol shows of the job."""
        (self.folder / "jobs").write_text(text)

    def run(self, *arguments: str, script: Path | None = None, **environment: str) -> Ended:
        """The job, of two nodes."""
        for name in ("asked", "sruns", "environment"):
            (self.folder / name).write_text("")
        (self.folder / "state").write_text("RUNNING\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MEGATRON_LCL"))}
        kept |= {"PATH": f"{self.programs}:{kept['PATH']}", "VENV": "/in/the/image", "SRUN_ARGS": "--cpu-bind=none"}
        kept |= {"FAKE": str(self.folder), **OF_A_JOB, **environment}
        command = ["bash", str(script or self.folder / "slurm_script"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=kept, cwd=self.folder)
        asked = (self.folder / "asked").read_text().splitlines()
        words = [shlex.split(line) for line in (self.folder / "sruns").read_text().splitlines()]
        variables = dict(line.split("=", 1) for line in (self.folder / "environment").read_text().splitlines())
        asked = [line for line in asked if "hostnames" not in line]
        return Ended(result.returncode, result.stdout + result.stderr, asked, words, variables)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_controller_that_does_not_answer_is_asked_again_where_the_scripts_are(stage: Stage) -> None:
    (stage.folder / "silent").write_text("1\n2\n3\n")
    ended = stage.run()
    assert (ended.code, ended.asked) == (0, ["scontrol show job 27"] * 4), ended.said
    (stage.folder / "silent").write_text("no\n" * 1000)
    ended = stage.run()
    assert (ended.code, len(ended.asked)) == (71, 120)
    again, at_last = ended.said.splitlines()
    assert again == f"slurm_load_jobs error: {NO_ANSWER}; asking again for ten minutes"
    assert at_last == f"scontrol does not say where lcl_vitg.sh is: slurm_load_jobs error: {NO_ANSWER}"


def test_where_there_is_no_slurm_it_is_asked_once(stage: Stage) -> None:
    """As in a shell inside a job's container."""
    (stage.programs / "scontrol").write_text("#!/bin/sh\necho 'scontrol: command not found' >&2\nexit 127\n")
    (stage.programs / "sleep").write_text("#!/bin/sh\nexit 9\n")
    ended = stage.run()
    assert (ended.code, ended.sruns) == (71, [])
    assert ended.said == "scontrol does not say where lcl_vitg.sh is: scontrol: command not found\n"


def test_a_job_takes_nothing_from_the_one_in_which_sbatch_was_called(stage: Stage) -> None:
    ended = stage.run(**OF_ANOTHER, RUN="75")
    assert ended.code == 75, ended.said
    assert [step[step.index(f"--ntasks-per-node={n}") - 1] for step, n in zip(ended.sruns, (1, 8, 8), strict=True)] == [
        "--ntasks=2",
        "--ntasks=16",
        "--ntasks=16",
    ]
    assert not OF_ANOTHER.keys() & ended.environment.keys()
    assert ended.environment["SLURM_GPUS_PER_NODE"] == "8", "those that it has"
    assert "scontrol requeue 27" in ended.asked


def test_a_job_keeps_what_is_its_own(stage: Stage) -> None:
    """A task of an array, whose number scontrol shows with all of the array's."""
    other, own = "JobId=26 ArrayJobId=27 ArrayTaskId=0", "JobId=27 ArrayJobId=27 ArrayTaskId=5"
    jobs = [JOB.format(tasks=tasks, script=stage.script) for tasks in (2, 4)]
    stage.shows("\n".join(job.replace("JobId=27", of) for job, of in zip(jobs, (other, own), strict=True)))
    ended = stage.run(**{**OF_ANOTHER, "SLURM_NTASKS_PER_NODE": "4"}, RUN="75")
    assert ended.code == 75, ended.said
    assert "--ntasks=8" in ended.sruns[-1]
    variables = {name: value for name, value in ended.environment.items() if name in OF_ANOTHER}
    assert variables == {"SLURM_ARRAY_JOB_ID": "27", "SLURM_ARRAY_TASK_ID": "5", "SLURM_NTASKS_PER_NODE": "4"}
    assert "scontrol requeue 27_5" in ended.asked


@pytest.mark.parametrize("step", ["check", "sum", "run"])
def test_a_step_that_no_controller_confirms_starts_again(stage: Stage, step: str) -> None:
    for says in (
        f"Unable to confirm allocation for job 27: {NO_ANSWER}",
        "Unable to contact slurm controller (connect)",
    ):
        ended = stage.run(REFUSES=step, SAYS=says)
        assert ended.asked[-1] == "scontrol requeue 27", ended.said
        assert f"srun: error: {says}" in ended.said
        assert "No such file" not in ended.said
        shutil.rmtree(stage.folder / "job-27")  # with the count of starts


def test_a_signal_during_the_check_starts_the_job_again(stage: Stage) -> None:
    """So often as a signal in a run from one checkpoint may."""
    for start in range(3):
        ended = stage.run(CHECK="75", MAX_RESTARTS="1")
        assert ended.code == (75 if start < 2 else 71), ended.said
        assert ("scontrol requeue 27" in ended.asked) == ("ended by a signal; back into the queue" in ended.said)
        assert ("back into the queue" in ended.said) == (start < 2)
        assert "megatron-lcl: SIGUSR1: stopped\n" in ended.said
    assert "--- the job has been started 3 times from the same checkpoint (MAX_RESTARTS=1)" in ended.said
    assert stage.run("--dry-run", CHECK="75").asked == ["scontrol show job 27"]


def test_a_job_without_gpus_uses_none(stage: Stage) -> None:
    """Though the node, which is its own, has some; it starts one process there."""
    ended = stage.run(SLURM_GPUS_PER_NODE="0")
    assert ended.code == 0, ended.said
    assert "--ntasks=2" in ended.sruns[-1]
    assert ended.environment["SLURM_GPUS_PER_NODE"] == "0"
    assert "SLURM_GPUS_ON_NODE" not in ended.environment


def test_how_long_the_others_go_on_can_be_set(stage: Stage) -> None:
    """srun takes the last of an option; that of the all-reduce stays."""
    check, total, run = stage.run(SRUN_ARGS="--wait=9000").sruns
    waits = [[word for word in step if word.startswith("--wait=")] for step in (check, total, run)]
    assert waits == [["--wait=9000"], ["--wait=9000", "--wait=30"], ["--wait=600", "--wait=9000"]]


def test_a_node_that_does_not_respond_is_none_to_start_on(tmp_path: Path) -> None:
    """sinfo marks it so: `idle*`."""
    text = """
    sinfo() { printf '%s\\n' 'n1 mixed' 'n2 idle' 'n3 idle*' 'n4 allocated' 'n5 down'; }
    scontrol() { [ "$2" = job ] || printf '%s\\n' n1; }
    source "$1" && nodes=$2 && leave_out n1 && echo "$out"
    """
    environment = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_JOB_PARTITION": "any"}
    for nodes, left_out in (("2", "n1\n"), ("3", "")):
        command = ["bash", "-uc", text, "bash", str(ROOT / "launch" / "restarts.sh"), nodes]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert result.stdout == left_out, result.stderr


def test_starts_are_counted_from_the_same_checkpoint(tmp_path: Path) -> None:
    """A start whose check said nothing counts for the checkpoint before; a sweep goes on where any of its runs does."""
    text = 'source "$1" && logs=$2 && count_start && echo "$again"'
    command = ["bash", "-euc", text, "bash", str(ROOT / "launch" / "restarts.sh"), str(tmp_path)]
    first, second = "run a: from step 5", "run b: from step 1"
    starts = [("", "0"), (first, "0"), ("", "1"), (first, "2"), (f"{first}\n{second}", "0"), ("", "1")]
    starts += [(f"{first}\nrun b: from step 2", "0")]
    for says, again in starts:
        for log in tmp_path.glob("check-*.log"):
            log.unlink()
        for node in range(2 if says else 0):
            (tmp_path / f"check-{node}.log").write_text(f"checks  passed\n{says}\n")
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, "SLURM_JOB_ID": "1"}
        )
        assert result.stdout == f"{again}\n", (says, result.stderr)


def test_what_srun_says_of_a_node_is_no_fault_of_the_job(tmp_path: Path) -> None:
    text = 'source "$1" && logs=$2 && was_lost 1 && failed_nodes'
    environment = {**os.environ, "SLURM_JOB_ID": "1"}
    stand_in = f'scontrol() {{ echo "${{@: -1}}"; }}\n{text}'
    for said, nodes in (
        ("Task launch for StepId=1.0 failed on node n7: Communication connection failure", "n7\n"),
        ("Task launch for StepId=1.0 failed on node n7: Invalid job credential", "n7\n"),
        ("Unable to create step for job 1: Required node not available (down, drained or reserved)", ""),
        ("Unable to create step for job 1: Requested node configuration is not available", None),
        ("Unable to create step for job 1: Memory required by task is not available", None),
        ("Unable to create step for job 1: Invalid generic resource (gres) specification", None),
        ("Unable to confirm allocation for job 1: Socket timed out on send/recv operation", ""),
        ("Unable to confirm allocation for job 1: Invalid job id specified", None),
        ("Unable to contact slurm controller (connect failure)", ""),
    ):
        (tmp_path / "srun").write_text(f"srun: error: {said}\n")
        command = ["bash", "-uc", stand_in, "bash", str(ROOT / "launch" / "restarts.sh"), str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert (None if result.returncode else result.stdout) == nodes, (said, result.stderr)


def test_those_that_srun_kills_after_the_first_have_not_failed(tmp_path: Path) -> None:
    """Once one of the processes has aborted in the all-reduce, and the others have waited for it too long."""
    text = 'scontrol() { tr , "\\n" <<<"${@: -1}"; }; source "$1" && logs=$2 && failed_nodes'
    command = ["bash", "-euc", text, "bash", str(ROOT / "launch" / "restarts.sh"), str(tmp_path)]
    first = "srun: error: n2: task 3: Aborted\n"
    killed = "srun: error: n2: task 2: Killed\nsrun: error: n1: tasks 0-1: Killed\n"
    for between, nodes in (
        ("srun: First task exited 30s ago\nsrun: StepId=24.1 task 3: exited\nsrun: Terminating StepId=24.1\n", "n2\n"),
        ("srun: Terminating StepId=24.1\n", "n2\n"),
        ("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n", "n2\n"),
        ("", "n1\nn2\n"),
    ):
        (tmp_path / "srun").write_text(first + between + killed)
        environment = {**os.environ, "SLURM_JOB_ID": "1"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert result.stdout == nodes, (between, result.stderr)


def test_a_controller_that_does_not_answer_is_asked_again_for_a_requeue(tmp_path: Path) -> None:
    """It may have done what it gives no answer to; where it refuses, or says something else, that is it.

    `answers`: what squeue and `scontrol requeue` say, one after the other.
    """
    text = """
    answer() {  # the next line; 1 where it is an error
      local line; line=$(head -n 1 "$answers"); sed -i 1d "$answers"; echo "$1" >>"$answers.asked"
      case $line in error*) echo "$line" >&2; return 1 ;; *) echo "$line" ;; esac
    }
    squeue() { answer squeue; }
    scontrol() { if [ "$1" = requeue ]; then answer requeue; else echo update >>"$answers.asked"; fi; }
    sleep() { :; }
    source "$1"; answers=$2; requeue "it has failed" n7
    """
    lost = "error: Socket timed out on send/recv operation"
    for answers, asked in (
        ([lost, lost, "RUNNING", "taken"], ["squeue"] * 3 + ["requeue", "update"]),
        (["RUNNING", lost, "RUNNING", "taken"], ["squeue", "requeue", "squeue", "requeue", "update"]),
        (["RUNNING", lost, "COMPLETING"], ["squeue", "requeue", "squeue", "update"]),
        (["RUNNING", lost, lost, lost, "PENDING"], ["squeue", *["requeue", "squeue"] * 2, "update"]),
        (["RUNNING", "error: Requested operation is presently disabled", "RUNNING"], ["squeue", "requeue", "squeue"]),
        ([lost, "COMPLETING"], ["squeue"] * 2),
        (["error: Invalid job id specified"], ["squeue"]),
        ([lost] * 200, ["squeue"] * 120),
    ):
        said = tmp_path / "answers"
        said.write_text("".join(f"{line}\n" for line in answers))
        said.with_suffix(".asked").write_text("")
        command = ["bash", "-euc", text, "bash", str(ROOT / "launch" / "restarts.sh"), str(said)]
        environment = {**os.environ, "SLURM_JOB_ID": "1"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
        assert result.returncode == 0, result.stderr
        assert said.with_suffix(".asked").read_text().split() == asked, answers
        assert ("back into the queue, without n7" in result.stdout) == ("requeue" in asked)
