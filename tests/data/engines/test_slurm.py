"""Job arrays of a real Slurm for preprocess, curate and fetch: a job that is killed is run again alone, and the bytes
are the same."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from curate.corpora_of_rules import files, write
from data import writers
from data.engines.engine_jobs import hashes, waits
from data.engines.running import marked, processes_marked
from data.fetch.faulty_server import requests_of, serving
from data.fetch.test_fetch import QUICK, check_store, mixed
from data.helpers import TOKENIZER, contents
from data.writers import picture
from local_slurm import Slurm

from megatron_lcl.curate.run import curate, curate_in_jobs
from megatron_lcl.curate.settings import read_settings
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.engines import Engine, run_jobs
from megatron_lcl.data.engines import slurm as engine_on_slurm
from megatron_lcl.data.fetch.run import fetch_in_jobs
from megatron_lcl.data.prepare.jobs import preprocess_in_jobs
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

pytest.importorskip("submitit")


SETUP = """\
echo "${{SLURM_ARRAY_TASK_ID-alone}}" >> {folder}/ran
if [ "$SLURM_ARRAY_TASK_COUNT" = 3 ] && [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then
  {first}
fi"""
"""before the Python of a job; first: what job 1 does the first time round"""
KILLED = 'scancel --signal=KILL --full "$SLURM_ARRAY_JOB_ID"_1; sleep 60'
"""as if its node were lost"""


@pytest.fixture
def client(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's commands are the test's Slurm's."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.environment[name])
    monkeypatch.setattr(engine_on_slurm, "_QUERY", 2.0)  # no network file system here


def three_jobs(folder: Path, first: str = KILLED) -> Engine:
    setup = SETUP.format(folder=folder, first=first)
    return Engine("slurm", 3, {"timeout_min": 5, "mem_gb": 1, "slurm_setup": [setup]})


def begun(folder: Path) -> list[str]:
    """The jobs, each as often as it was begun."""
    return sorted((folder / "ran").read_text().split())


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("client")
def test_preprocess_writes_the_same_bytes(tmp_path: Path) -> None:
    for part in range(4):
        documents = [Document((Text(f"{part} {k}"), Image(picture(k % 9)))) for k in range(40)]
        writers.write_jsonl(documents, tmp_path / "in")
        (tmp_path / "in/documents.jsonl").rename(tmp_path / f"in/{part}.jsonl")
    TOKENIZER.save(tmp_path / "t.model")
    options = {"tokenizer": tmp_path / "t.model", "task_bytes": 1}
    preprocess("jsonl", tmp_path / "in", tmp_path / "expected", **options)
    engine = three_jobs(tmp_path)
    summary = preprocess_in_jobs("jsonl", tmp_path / "in", tmp_path / "out", engine, **options)
    assert summary.counts["documents"] == 160
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not verify(tmp_path / "out")
    assert begun(tmp_path) == ["0", "1", "2", "alone"]  # job 1 once more


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("client")
def test_curate_writes_the_same_bytes(tmp_path: Path) -> None:
    documents = [Document((Text(f"number {k % 7} of all"), Text("one"), Image(picture(k % 5)))) for k in range(24)]
    source = write(tmp_path, documents, shard_documents=10)
    rules = {"text.min_words": "2", "image.max_places": "3", "duplicates.documents.action": "keep-one"}
    settings = read_settings(overrides=rules)
    one = curate(source, tmp_path / "expected", settings, task_bytes=200)
    engine = three_jobs(tmp_path)
    found = curate_in_jobs(source, tmp_path / "out", engine, settings, task_bytes=200)
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert (found.before, found.rules) == (one.before, one.rules)
    assert not verify(tmp_path / "out")
    assert begun(tmp_path) == ["0", "1", "2", "alone"]  # job 1 once more


def kill_when_busy(mark: str, store: Path) -> None:
    """A job's processes, once a part of job 1 is half done."""
    deadline = time.monotonic() + 120
    while not list(store.glob("0000[14].log")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in processes_marked(mark):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("client")
def test_fetch_accounts_for_every_url_once(tmp_path: Path) -> None:
    """Job 1 is killed with a part half done, which the next one goes on with."""
    settings = dataclasses.replace(QUICK, shard_urls=15, delay=0.75, concurrency=4)
    mark = uuid.uuid4().hex
    killer = threading.Thread(target=kill_when_busy, args=(mark, tmp_path / "store"))
    with serving(tmp_path, addresses=8) as server:
        urls = mixed(server, 149, start=1)
        (tmp_path / "urls.txt").write_text("\n".join(urls) + "\n")
        killer.start()
        engine = three_jobs(tmp_path, f"export TEST_MARK={mark}")
        found = fetch_in_jobs(tmp_path / "urls.txt", tmp_path / "store", engine, settings)
        asked = requests_of(*server)
    killer.join()
    check_store(tmp_path / "store", urls)
    assert sum(found[status] for status in ("kept", "dead", "refused")) == 149
    fetched = [url for url in urls if "/ok/" in url]
    twice = sum(asked["/" + url.split("/", 3)[3]] for url in fetched) - len(fetched)
    assert 0 <= twice <= settings.concurrency  # only what was under way
    assert begun(tmp_path) == ["0", "1", "2", "alone"]  # job 1 once more


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

    def result(self) -> None:
        return None


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
                assert run(task, index) is None
                jobs.append(FakeJob(None))
        return jobs


@pytest.mark.parametrize(("signum", "ended_by"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_jobs_are_canceled_whenever_a_signal_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, ended_by: type[BaseException]
) -> None:
    """While they are submitted, and while they are canceled."""
    import submitit

    canceled = []

    class Submits(FakeExecutor):
        def map_array(self, run, tasks, indices):  # type: ignore[no-untyped-def]
            signal.raise_signal(signum)  # to this thread: another one might take it, and it would come later
            return [FakeJob(None) for _ in indices]

    def run(command: list[str], check: bool) -> None:
        signal.raise_signal(signum)
        canceled.append(command)

    monkeypatch.setattr(submitit, "AutoExecutor", Submits)
    monkeypatch.setattr(engine_on_slurm.subprocess, "run", run)
    with pytest.raises(ended_by):
        run_jobs(waits, {"folder": tmp_path}, Engine("slurm", 2), output=tmp_path)
    assert canceled == [["scancel", "1_0", "1_0"]]


def test_a_lost_job_alone_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit

    writers.write_jsonl([Document((Text("a"), Image(picture(0))))] * 5, tmp_path / "in")
    monkeypatch.setattr(submitit, "AutoExecutor", FakeExecutor)
    engine = Engine("slurm", 3)
    summary = preprocess_in_jobs("jsonl", tmp_path / "in", tmp_path / "out", engine, tokenizer=TOKENIZER)
    assert FakeExecutor.submitted == [[0, 1, 2], [1]]
    assert summary.counts["documents"] == 5
    monkeypatch.setattr(FakeExecutor, "num_lost", 9)
    said = r"job 1 of 3 failed \(tried 3 times; logs in .*\), the first with: node n2 went away"
    with pytest.raises(ValueError, match=said):
        preprocess_in_jobs("jsonl", tmp_path / "in", tmp_path / "two", engine, tokenizer=TOKENIZER)


def test_logs_are_in_no_folder_whose_name_would_be_replaced(tmp_path: Path) -> None:
    output = tmp_path / "lr%j" / "out"
    with pytest.raises(UserError, match="for the % in it; give an output whose path has none"):
        run_jobs(hashes, {"folder": tmp_path, "variable": "PATH"}, Engine("slurm", 1), output=output)
    assert not output.parent.exists()


OF_A_JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_ARRAY_JOB_ID": "76",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x00000001",
    "SRUN_CPUS_PER_TASK": "1",
}
OF_A_USER = {"SLURM_CONF": "/etc/slurm/own.conf", "SLURM_CLUSTERS": "b", "SLURM_JWT": "mine", "SBATCH_ACCOUNT": "mine"}


def test_jobs_are_submitted_from_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch gets none of its variables, but what the user has set; all are there again afterwards."""
    import submitit

    seen: list[dict[str, str]] = []

    class Submits(FakeExecutor):
        def map_array(self, run, tasks, indices):  # type: ignore[no-untyped-def]
            seen.append({**os.environ})
            return super().map_array(run, tasks, indices)

    for name, value in (OF_A_JOB | OF_A_USER).items():
        monkeypatch.setenv(name, value)
    before = {**os.environ}
    monkeypatch.setattr(submitit, "AutoExecutor", Submits)
    run_jobs(hashes, {"folder": tmp_path, "variable": "PATH"}, Engine("slurm", 1), output=tmp_path)
    assert not seen[0].keys() & OF_A_JOB.keys()
    assert seen[0].items() >= OF_A_USER.items()
    assert {**os.environ} == before
    monkeypatch.delenv("SLURM_JOB_ID")  # what is left is the user's
    before = {**os.environ}
    run_jobs(hashes, {"folder": tmp_path, "variable": "PATH"}, Engine("slurm", 1), output=tmp_path / "two")
    assert seen[1].items() >= before.items()


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("client")
def test_jobs_of_a_job_read_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**OF_A_JOB, "PYTHONPATH": marked("")["PYTHONPATH"]}.items():
        monkeypatch.setenv(name, value)
    engine = Engine("slurm", 1, {"timeout_min": 5, "mem_gb": 1})
    run_jobs(hashes, {"folder": tmp_path, "variable": "PATH"}, engine, output=tmp_path / "out")
    assert (tmp_path / "hash").exists()
