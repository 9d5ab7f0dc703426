"""A real Ray of two nodes, one of which is killed in mid-run: the same bytes, every URL once, and nothing left."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from data import writers
from data.engines.engine_jobs import fails, fails_last, hashes
from data.engines.running import gone, kill_tree, marked, processes_marked
from data.fetch.faulty_server import serving
from data.fetch.test_fetch import FLAGS, check_store, mixed
from data.helpers import TOKENIZER, contents
from data.writers import picture

from megatron_lcl.cli import main
from megatron_lcl.curate.run import curate
from megatron_lcl.curate.settings import read_settings
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.engines import Engine, run_jobs
from megatron_lcl.data.prepare import jobs
from megatron_lcl.data.prepare.preprocess import WORK, preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

no_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), no_ray]
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False, "include_log_monitor": False}
WATCHED = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


class Ray:
    """A cluster of two nodes of one CPU each, the second of which can be killed."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        first = {**NODE, "temp_dir": str(folder), "_system_config": WATCHED}
        self._cluster = Cluster(initialize_head=True, head_node_args=first)
        self._second: Any = None

    @property
    def address(self) -> str:
        return self._cluster.address

    def second(self) -> str:
        """The second node, begun anew if it was killed: its id."""
        if self._second is None:
            self._second = self._cluster.add_node(**NODE)
        return self._second.node_id

    def kill_second(self) -> None:
        from ray._private.ray_constants import PROCESS_TYPE_RAYLET

        (raylet,) = self._second.all_processes[PROCESS_TYPE_RAYLET]
        kill_tree(raylet.process.pid)
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = None

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Ray]:
    import tempfile

    # a short path: that of a socket has 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        mark, handler = uuid.uuid4().hex, signal.getsignal(signal.SIGTERM)
        # where it notes its address, in a folder that it does not make
        (Path(folder) / "ray").mkdir()
        for name, value in marked(mark, RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=folder).items():
            patch.setenv(name, value)
        with contextlib.chdir(folder):  # not where commands are given
            cluster = Ray(Path(folder))
        patch.delenv("TEST_MARK")
        try:
            yield cluster
        finally:
            cluster.shutdown()
            signal.signal(signal.SIGTERM, handler)
            for pid in processes_marked(mark):
                with gone():
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def command() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begins a command of ours; what it has started is gone afterwards."""
    mark, begun = uuid.uuid4().hex, []

    def begin(*words: object) -> subprocess.Popen[str]:
        line = [sys.executable, *map(str, words)]
        begun.append(
            subprocess.Popen(line, env=marked(mark), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 60
    while (left := processes_marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def nodes_of(logs: Path) -> dict[str, list[str]]:
    """On which nodes each job was begun, in order."""
    found = {}
    for log in logs.glob("job-*.log"):
        found[log.stem] = re.findall(r"^node (\w+): job", log.read_text(), re.MULTILINE)
    return found


def kill_when_busy(ray: Ray, node: str, logs: Path, process: subprocess.Popen[str]) -> None:
    """Kill the second node as soon as a job has begun on it."""
    deadline = time.monotonic() + 120
    while not any(node in tries for tries in nodes_of(logs).values()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ray.kill_second()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, output, and lines on stderr but for the bars."""
    out, err = process.communicate(timeout=400)
    lines = [line for line in re.split("[\r\n]", err) if line.strip() and "job/s]" not in line and "s/job]" not in line]
    return process.returncode, out, lines


def written(folder: Path, files: int, documents: int) -> Path:
    """JSON lines, so many files of so many documents with pictures that take a while to scale."""
    pictures = [Image(picture(seed, 640, 480, "JPEG")) for seed in range(3)]
    for number in range(files):
        texts = [Document((Text(f"{number} {k}"), pictures[k % 3])) for k in range(documents)]
        writers.write_jsonl(texts, folder)
        (folder / "documents.jsonl").rename(folder / f"{number}.jsonl")
    return folder


PREPROCESS = """
import sys
from megatron_lcl.data.engines import Engine
from megatron_lcl.data.prepare.jobs import preprocess_in_jobs
folder, output, address = sys.argv[1:]
options = {"tokenizer": f"{folder}/t.model", "max_image_side": 500, "task_bytes": 1}
print(preprocess_in_jobs("jsonl", f"{folder}/in", output, Engine("ray", 3, {"address": address}), **options))
"""


def test_a_node_killed_in_mid_run_changes_no_byte(ray_cluster: Ray, command: Any, tmp_path: Path) -> None:
    source = written(tmp_path / "in", 3, 50)
    TOKENIZER.save(tmp_path / "t.model")
    preprocess("jsonl", source, tmp_path / "expected", tokenizer=TOKENIZER, max_image_side=500, task_bytes=1)
    tries: dict[str, list[str]] = {}
    for attempt in range(3):
        output = tmp_path / f"out-{attempt}"
        node = ray_cluster.second()
        process = command("-c", PREPROCESS, tmp_path, output, ray_cluster.address)
        kill_when_busy(ray_cluster, node, Path(f"{output}.ray"), process)
        code, out, said = finish(process)
        assert code == 0, said
        assert "150 documents" in out
        assert [line for line in said if "its process was killed, or its node was lost" in line] == said
        assert contents(output) == contents(tmp_path / "expected")
        assert not verify(output)
        tries = nodes_of(Path(f"{output}.ray"))
        assert len(tries) == 3
        if any(len(nodes) > 1 for nodes in tries.values()):
            break  # else the job had ended before its node did
    assert any(len(nodes) > 1 for nodes in tries.values())


def test_a_fetch_whose_node_is_killed_accounts_for_every_url_once(
    ray_cluster: Ray, command: Any, tmp_path: Path
) -> None:
    node = ray_cluster.second()
    with serving(tmp_path, addresses=8) as server:
        urls = mixed(server, 590, start=1)
        (tmp_path / "urls.txt").write_text("\n".join(urls) + "\n")
        process = command(
            "-m", "megatron_lcl", "fetch", tmp_path / "urls.txt", "--output", tmp_path / "store", *FLAGS,
            "--delay", 0.1, "--shard-urls", 40, "--executor", "ray", "--jobs", 3, "--ray", ray_cluster.address,
        )  # fmt: skip
        kill_when_busy(ray_cluster, node, tmp_path / "store.ray", process)
        code, out, said = finish(process)
    assert code == 0, said
    assert "590 URLs" in out
    assert [line for line in said if "its process was killed, or its node was lost" in line] == said
    assert any(len(nodes) > 1 for nodes in nodes_of(tmp_path / "store.ray").values())
    check_store(tmp_path / "store", urls)


CURATE = """
import os, sys
from megatron_lcl.curate.run import curate_in_jobs
from megatron_lcl.curate.settings import read_settings
from megatron_lcl.data.engines import Engine
folder, address, *rules = sys.argv[1:]
os.chdir(folder)
settings = read_settings(overrides=dict(rule.split("=") for rule in rules))
print(curate_in_jobs("corpus", "out", Engine("ray", 2, {"address": address}), settings, task_bytes=100_000))
"""


def test_a_curation_whose_node_is_killed_changes_no_byte(
    ray_cluster: Ray, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paths are those of the folder in which the command is given."""
    monkeypatch.chdir(tmp_path)
    preprocess("jsonl", written(tmp_path / "in", 2, 30), "corpus", tokenizer=TOKENIZER)
    preprocess("jsonl", written(tmp_path / "in2", 1, 1), "other", tokenizer=TOKENIZER)
    rules = {"image.max_places": "300", "duplicates.images.action": "keep-one", "duplicates.against": "[other]"}
    curate("corpus", "expected", read_settings(overrides=rules), task_bytes=100_000)
    node = ray_cluster.second()
    process = command("-c", CURATE, tmp_path, ray_cluster.address, *(f"{key}={value}" for key, value in rules.items()))
    kill_when_busy(ray_cluster, node, tmp_path / "out.ray", process)
    code, out, said = finish(process)
    assert code == 0, said
    assert "image.duplicates" in out
    assert any(len(nodes) > 1 for nodes in nodes_of(tmp_path / "out.ray").values())
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not verify(tmp_path / "out")


def test_a_job_that_always_fails_is_one_line_and_the_others_work_stays(
    ray_cluster: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    ray_cluster.second()
    writers.write_jsonl([Document((Text(f"{k}"), Image(picture(k)))) for k in range(50)], tmp_path / "in")
    (tmp_path / "in/documents.jsonl").rename(tmp_path / "in/0.jsonl")
    (tmp_path / "in/1.jsonl").write_text("not JSON\n" * 50)
    TOKENIZER.save(tmp_path / "t.model")
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jobs, "preprocess_in_jobs", functools.partial(jobs.preprocess_in_jobs, task_bytes=1))
    assert main(["preprocess", "--format", "jsonl", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"),
                 "--tokenizer", str(tmp_path / "t.model"), "--executor", "ray", "--jobs", "2"]) == 2  # fmt: skip
    *_, said = capfd.readouterr().err.splitlines()
    # the one that is done last sees that too much is bad, or both do where they are done at the same time
    failed = r"megatron-lcl preprocess: jobs? (\d)(?:, \d)? of 2 failed \(tried 3 times; .*\), the first with: .*"
    match = re.fullmatch(failed, said)
    assert match, said
    assert f"logs in {tmp_path / 'out.ray'}" in said
    assert "part-000000" in {path.name[:11] for path in (tmp_path / "out" / WORK).glob("part-*")}
    assert len(nodes_of(tmp_path / "out.ray")[f"job-{match[1]}"]) == 3
    # nothing of Ray is left in this process
    assert not ray.is_initialized()
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_job_that_failed_goes_to_the_other_node(ray_cluster: Ray, tmp_path: Path) -> None:
    """Were all nodes alike, Ray would at times give the second of three jobs the same again."""
    second = ray_cluster.second()
    for how in ("raises", "killed"):
        folder = tmp_path / how
        folder.mkdir()
        arguments = {"folder": folder, "how": how}
        run_jobs(fails_last, arguments, Engine("ray", 3, {"address": ray_cluster.address}), output=folder)
        nodes = nodes_of(tmp_path / f"{how}.ray")["job-1"]
        assert len(nodes) == len(set(nodes)) == 2
        assert second in nodes


def test_a_password_reaches_the_jobs_and_no_file(ray_cluster: Ray, tmp_path: Path) -> None:
    password, arguments = uuid.uuid4().hex, {"folder": tmp_path, "variable": "PLANTED"}
    engine = Engine("ray", 1, {"address": ray_cluster.address})
    run_jobs(hashes, arguments, engine, output=tmp_path / "out", environment={"PLANTED": password})
    assert (tmp_path / "hash").read_text() == hashlib.sha256(password.encode()).hexdigest()
    files = [path for at in (tmp_path, Path(os.environ["RAY_TMPDIR"])) for path in at.rglob("*") if path.is_file()]
    assert {"raylet.out", "hash"} <= {path.name for path in files}
    assert [path.name for path in files if password.encode() in path.read_bytes()] == []


def test_no_ray_where_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:1")  # of a cluster that was killed
    arguments = {"folder": tmp_path, "times": 0, "how": ""}
    for address, said in (("127.0.0.1:1", r"no Ray at 127\.0\.0\.1:1: "), ("auto", "no Ray runs on this machine")):
        with pytest.raises(UserError, match=said):
            run_jobs(fails, arguments, Engine("ray", 1, {"address": address}), output=tmp_path / "out")


def test_a_job_too_large_for_all_nodes_is_said(ray_cluster: Ray, command: Any, tmp_path: Path) -> None:
    parameters = f'{{"address": "{ray_cluster.address}", "memory_gb": 1e6}}'
    process = command("-c", WAITS.replace('{"address": "local"}', parameters), tmp_path)
    assert "what a job needs, num_cpus 1 and 1,000 TB; waiting until one comes" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (128 + signal.SIGTERM, "", [])
    assert not list(tmp_path.glob("tries-*"))


WAITS = """
import sys
from pathlib import Path
from data.engines.engine_jobs import waits
from megatron_lcl.data.engines import Engine, run_jobs
run_jobs(waits, {"folder": Path(sys.argv[1])}, Engine("ray", 2, {"address": "local"}), output=Path(sys.argv[1]))
"""


def test_a_ray_of_its_own_ends_with_the_command(command: Any, tmp_path: Path) -> None:
    """The fixture sees that no process is left."""
    process = command("-c", WAITS, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("tries-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    folders = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            folders |= set(re.findall(r"/tmp/ray-\w+", " ".join(child.cmdline())))
    assert len(folders) == 1
    process.send_signal(signal.SIGTERM)
    code, out, said = finish(process)
    assert (code, out, said) == (128 + signal.SIGTERM, "", [])
    assert not Path(*folders).exists()
