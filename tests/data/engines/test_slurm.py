"""Protects: a job array of a real Slurm writes the same bytes; a job that is killed is run again alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data import writers
from data.engines.running import marked
from data.helpers import TOKENIZER, contents
from data.writers import picture
from local_slurm import Slurm

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.engines import Engine
from megatron_lcl.data.prepare.jobs import preprocess_in_jobs
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify

pytest.importorskip("submitit")


# In job 1, before any Python starts: the first time round the job is killed, as if its node were lost.
LOST_ONCE = """\
echo "${{SLURM_ARRAY_TASK_ID-alone}}" >> {folder}/ran
if [ "$SLURM_ARRAY_TASK_COUNT" = 3 ] && [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then
  scancel --signal=KILL --full "$SLURM_ARRAY_JOB_ID"_1; sleep 60
fi"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_job_array_writes_the_same_bytes_though_a_job_is_lost(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.environment[name])
    for part in range(4):
        documents = [Document((Text(f"{part} {k}"), Image(picture(k % 9)))) for k in range(40)]
        writers.write_jsonl(documents, tmp_path / "in")
        (tmp_path / "in/documents.jsonl").rename(tmp_path / f"in/{part}.jsonl")
    TOKENIZER.save(tmp_path / "t.model")
    options = {"tokenizer": tmp_path / "t.model", "task_bytes": 1}
    preprocess("jsonl", tmp_path / "in", tmp_path / "expected", **options)
    parameters = {"timeout_min": 5, "mem_gb": 1, "slurm_setup": [LOST_ONCE.format(folder=tmp_path)]}
    engine = Engine("slurm", 3, parameters)
    summary = preprocess_in_jobs("jsonl", tmp_path / "in", tmp_path / "out", engine, **options)
    assert summary.counts["documents"] == 160
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not verify(tmp_path / "out")
    assert sorted((tmp_path / "ran").read_text().split()) == ["0", "1", "2", "alone"]  # job 1 once more


WAITS = """
import sys
from pathlib import Path
from data.engines.engine_jobs import waits
from megatron_lcl.data.engines import Engine, run_jobs
parameters = {"timeout_min": 5, "mem_gb": 1}
run_jobs(waits, {"folder": Path(sys.argv[1])}, Engine("slurm", 6, parameters), output=Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_signal_cancels_the_jobs(slurm: Slurm, tmp_path: Path) -> None:
    """Those that run and those that wait for a node."""
    environment = marked("", **{name: slurm.environment[name] for name in ("SLURM_CONF", "PATH")})
    process = subprocess.Popen([sys.executable, "-c", WAITS, tmp_path], env=environment, stderr=subprocess.DEVNULL)
    try:
        slurm.wait(lambda: bool(list(tmp_path.glob("tries-*"))), "a job that runs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        slurm.wait(lambda: slurm.run("squeue", "--noheader", "--name=megatron-lcl-waits") == "", "an empty queue")
    finally:
        process.kill()
        process.wait()


class FakeJob:
    def __init__(self, error: Exception | None) -> None:
        self.job_id, self._error = "1_0", error

    def done(self) -> bool:
        return True

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> str:
        return ""


class FakeExecutor:
    """Runs jobs where they are submitted; job 1 is lost the first `num_lost` times."""

    num_lost = 1
    submitted: list[list[int]]

    def __init__(self, folder: Path, cluster: str) -> None:
        assert cluster == "slurm"
        FakeExecutor.submitted = []

    def update_parameters(self, **parameters: object) -> None:
        pass

    def map_array(self, run, tasks, indices):  # type: ignore[no-untyped-def]
        self.submitted.append(indices)
        jobs = []
        for task, index in zip(tasks, indices, strict=True):
            if index == 1 and len(self.submitted) <= self.num_lost:
                jobs.append(FakeJob(RuntimeError("node n2 went away")))
            else:
                task.logs.mkdir(exist_ok=True)
                assert run(task, index) == ""
                jobs.append(FakeJob(None))
        return jobs


def test_a_lost_job_alone_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit

    writers.write_jsonl([Document((Text("a"), Image(picture(0))))] * 5, tmp_path / "in")
    monkeypatch.setattr(submitit, "AutoExecutor", FakeExecutor)
    engine = Engine("slurm", 3)
    summary = preprocess_in_jobs("jsonl", tmp_path / "in", tmp_path / "out", engine, tokenizer=TOKENIZER)
    assert FakeExecutor.submitted == [[0, 1, 2], [1]]
    assert summary.counts["documents"] == 5
    monkeypatch.setattr(FakeExecutor, "num_lost", 9)
    with pytest.raises(ValueError, match=r"jobs \[1\] of 3 failed, each 3 times, the first with: node n2 went away"):
        preprocess_in_jobs("jsonl", tmp_path / "in", tmp_path / "two", engine, tokenizer=TOKENIZER)
