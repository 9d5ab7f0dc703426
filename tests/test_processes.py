"""Processes that are started: their sockets, wherever temporary files lie, and when their garbage is collected."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_lcl.errors import UserError
from megatron_lcl.processes import importing_first, prepare_sockets

FORKS = """
import multiprocessing.util
from concurrent.futures import ProcessPoolExecutor
from megatron_lcl.train.forks import forkserver

context = forkserver()
with ProcessPoolExecutor(1, context) as pool:
    print(pool.submit(len, "abc").result(), multiprocessing.util.get_temp_dir())
"""


@pytest.mark.timeout(120)
def test_a_fork_server_where_the_path_of_temporary_files_is_long(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 80)
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer, place = done.stdout.split()
    assert (answer, Path(place).parent) == ("3", Path("/tmp"))
    assert not Path(place).exists(), "it outlives the command"
    assert list(folder.iterdir()) == []


def no_folder(*_: Any, **__: Any) -> str:
    raise OSError(errno.EROFS, "Read-only file system", "/tmp/pymp-1")


def test_the_folder_of_temporary_files_stays_what_it_is_for_other_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, make, folder = [], tempfile.mkdtemp, tmp_path / ("n" * 80)
    config = vars(multiprocessing.current_process())["_config"]
    monkeypatch.setitem(config, "tempdir", None)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **given: (seen.append(tempfile.gettempdir()), make(**given))[1])
    prepare_sockets()
    assert Path(config["tempdir"]).parent == Path("/tmp")
    assert seen == [str(folder)]


def test_where_there_is_no_place_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(multiprocessing.current_process())["_config"], "tempdir", None)
    monkeypatch.setattr(tempfile, "mkdtemp", no_folder)
    with pytest.raises(UserError, match=r"^/tmp/pymp-1: Read-only file system; processes need .* TMPDIR .* 71 bytes$"):
        prepare_sockets()


LEAVES = """
import os, sys
from megatron_lcl.processes import prepare_sockets
from megatron_lcl.train.resilience.start import leave

prepare_sockets()
assert len(os.listdir(os.environ["TMPDIR"])) == 1
if os.fork() == 0:
    leave(0, "")
os.wait()
assert len(os.listdir(os.environ["TMPDIR"])) == 1, "another process's"
leave(3, "ends")
"""


def test_the_folder_of_sockets_does_not_outlive_a_process_that_ends_at_once() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short enough for a socket's path
        given = {**os.environ, "TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", LEAVES], env=given, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (3, "megatron-lcl: \nmegatron-lcl: ends\n")
        assert os.listdir(folder) == []


class SaysWhetherGarbageIsCollected:
    """In the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return gc.isenabled, ()


def send_what_is_said(pipe: Any, said: bool) -> None:
    pipe.send((said, gc.isenabled(), gc.get_threshold()[0], gc.get_freeze_count() > 1000))


@pytest.mark.timeout(60)
def test_garbage_is_collected_once_all_is_imported() -> None:
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    target, given = importing_first(send_what_is_said, writing, SaysWhetherGarbageIsCollected())
    process = context.Process(target=target, args=given)
    process.start()
    try:
        writing.close()
        assert reading.recv() == (False, True, 20_000, True)
    finally:
        process.join()
