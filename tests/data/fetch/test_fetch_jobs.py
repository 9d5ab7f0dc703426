"""A list that several jobs fetch: each part is one job's, and the ledger has every URL once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from data.fetch.faulty_server import LOGIN, WANTS_CREDENTIALS, requests_of, serving
from data.fetch.test_fetch import FLAGS, QUICK, check_store, mixed
from processes import Ends
from tqdm import tqdm

from megatron_lcl.cli import main
from megatron_lcl.data.engines import Engine, children
from megatron_lcl.data.fetch import run
from megatron_lcl.data.fetch.run import fetch, fetch_in_jobs
from megatron_lcl.data.fetch.settings import PROXY_LOGIN
from megatron_lcl.errors import UserError
from megatron_lcl.processes import NEVER_BEGAN


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_jobs_fetch_every_url_once(tmp_path: Path) -> None:
    """Two by hand, the last first, the others by an engine; then nothing is asked for again."""
    listed, store = tmp_path / "urls.txt", tmp_path / "store"
    settings = dataclasses.replace(QUICK, shard_urls=30)
    with serving(tmp_path, addresses=8) as server:
        urls = mixed(server, 299, start=1)
        listed.write_text("\n".join(urls) + "\n")
        for job in ("2/3", "0/3"):
            assert main(["fetch", str(listed), "--output", str(store), *FLAGS, "--shard-urls", "30", "--job", job]) == 0
        parts = range(len(list((store / "plan").glob("part-*.parquet"))))
        assert len(parts) > 3
        done = {int(path.name.split("-")[0]) for path in store.glob("*.parquet")}
        assert done == {part for part in parts if part % 3 != 1}
        left = len(urls) - sum(pq.read_metadata(path).num_rows for path in store.glob("*.parquet"))
        found = fetch_in_jobs(listed, store, Engine("local", 2), settings)
        check_store(store, urls)
        before = requests_of(*server)
        assert found["todo"] == left > 0
        again = {**found, "todo": 0}
        assert fetch_in_jobs(listed, store, Engine("local", 3), settings) == fetch(listed, store, settings) == again
        assert set(requests_of(*server) - before) == set()


def test_a_bad_list_is_refused_before_any_job(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("nothing\n")
    with pytest.raises(UserError, match="no image URL"):
        fetch_in_jobs(tmp_path / "urls.txt", tmp_path / "store", Engine("local", 2))
    assert [path.name for path in tmp_path.iterdir()] == ["urls.txt"]


class InFiles:
    """Stands in for submitit: jobs are pickled into its folder, and each is read from there and done at once."""

    def __init__(self, folder: Path, cluster: str) -> None:
        self.folder = folder

    def update_parameters(self, **_parameters: object) -> None:
        pass

    def map_array(self, *columns: Any) -> list[SimpleNamespace]:
        function, tasks, indices = columns
        self.folder.mkdir()
        jobs = []
        for task, index in zip(tasks, indices, strict=True):
            file = self.folder / f"{index}.pkl"
            file.write_bytes(pickle.dumps((function, task, index)))
            run, *given = pickle.loads(file.read_bytes())
            result = pickle.dumps(run(*given))
            job: dict[str, Any] = {"done": lambda: True, "exception": lambda: None}
            job["result"] = partial(pickle.loads, result)
            jobs.append(SimpleNamespace(job_id=f"1_{index}", **job))
        return jobs


def test_a_password_stands_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's jobs are files, which others may read; they have it from the environment."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit, "AutoExecutor", InFiles)
    monkeypatch.setenv(PROXY_LOGIN, "another:one")
    listed = tmp_path / "urls.txt"
    listed.write_text("".join(f"http://pictures.example/ok/{k}\n" for k in range(4)))
    with serving(tmp_path) as (_, port):
        settings = dataclasses.replace(QUICK, proxy=f"http://{LOGIN}@{WANTS_CREDENTIALS}:{port}")
        assert fetch_in_jobs(listed, tmp_path / "store", Engine("slurm", 2), settings)["kept"] == 4
    written = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert WANTS_CREDENTIALS.encode() in written["0.pkl"]
    assert [name for name, content in written.items() if LOGIN.partition(":")[2].encode() in content] == []
    assert os.environ[PROXY_LOGIN] == "another:one"


LONG = "x" * 200_000
"""more than a pipe holds"""


class BadPlan:
    """No part of it can be opened."""

    def lock(self, _: int) -> Path:
        raise UserError(LONG)


@pytest.mark.timeout(60)
def test_a_worker_says_all_that_went_wrong(tmp_path: Path) -> None:
    plan: Any = BadPlan()
    with pytest.raises(UserError, match=f"^{LONG}$"):
        run._do(tmp_path, plan, [0, 1], QUICK, 2, tqdm(disable=True))


class OneDeaf:
    """Whoever opens the one part does not end when it is told to, and who opens the other fails then."""

    def __init__(self, folder: Path) -> None:
        self.deaf = folder / "deaf"

    def lock(self, part: int) -> Path:
        if part == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (written := self.deaf.with_suffix(".new")).write_text(str(os.getpid()))
            written.rename(self.deaf)  # so that whoever finds it finds it written
            time.sleep(120)
        while not self.deaf.exists():
            time.sleep(0.01)
        raise UserError("no more")


@pytest.mark.timeout(60)
def test_a_worker_that_ignores_the_signal_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_PATIENCE", 0.2)
    plan: Any = OneDeaf(tmp_path)
    with pytest.raises(UserError, match="no more"):
        run._do(tmp_path, plan, [0, 1], QUICK, 2, tqdm(disable=True))
    assert not Path(f"/proc/{plan.deaf.read_text()}").exists()


@pytest.mark.timeout(60)
def test_workers_that_never_begin_are_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_process", Ends())
    plan: Any = None
    with pytest.raises(UserError, match=re.escape(NEVER_BEGAN)):
        run._do(tmp_path, plan, [0, 1], QUICK, 2, tqdm(disable=True))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    listed, store = tmp_path / "urls.txt", tmp_path / "store"
    flags = [*FLAGS, "--delay", "0.1", "--shard-urls", "40", "--workers", "2"]
    with serving(tmp_path, addresses=8) as server:
        urls = mixed(server, 590, start=1)
        listed.write_text("\n".join(urls) + "\n")
        command = [sys.executable, "-m", "megatron_lcl", "fetch", str(listed), "--output", str(store), *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 100
            workers: list[str] = []
            while not (len(workers) == 2 and list(store.glob("*.log"))):
                assert time.monotonic() < deadline
                time.sleep(0.01)
                workers = []
                for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                        workers += [pid] * (b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
            os.kill(int(workers[0]), signal.SIGKILL)
            out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "590 URLs" in out
    assert "its parts are gone on with" in err
    check_store(store, urls)
