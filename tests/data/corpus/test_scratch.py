"""Scratch folders: what a killed process left goes, and an output is one whole folder, whenever it is interrupted."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from forks import fork_context
from users import as_other, needs_root, shared_folder, succeeds

from megatron_lcl.convert.folder import new_folder, write_record
from megatron_lcl.data.corpus import files, owners, scratch
from megatron_lcl.data.corpus.cache_folders import locked
from megatron_lcl.errors import UserError


def test_what_is_repeated_is_not_after_the_end() -> None:
    """A run has then given its lock file back, which would look like another's."""
    began, done = threading.Event(), list[bool]()

    def act() -> None:
        began.set()
        time.sleep(0.02)
        done.append(True)

    with scratch.repeating(0.001, act):
        assert began.wait(60)
    num_done = len(done)
    assert num_done
    began.clear()
    assert not began.wait(0.05)
    assert len(done) == num_done


def test_a_name_that_cannot_be_taken_is_an_error(tmp_path: Path) -> None:
    """Only another process's folder may be there in its place."""
    for name in ("own", "other"):
        (tmp_path / name / "file").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        scratch.take_name(tmp_path / "own", tmp_path / "none" / "name")
    scratch.take_name(tmp_path / "own", tmp_path / "other")
    assert (tmp_path / "own").exists()


def test_temporary_folders_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once another process makes one of the same prefix; that of others stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = fork_context().Process()
    process.start()
    process.join()
    left = [tmp_path / f"{name}-{owners.machine()}-{process.pid}-{'0' * 32}" for name in ("ours", "theirs")]
    for folder in left:
        folder.mkdir()
    with scratch.temporary_folder("ours-") as folder, scratch.temporary_folder("ours-") as another:
        assert [path.exists() for path in left] == [False, True]
        assert (folder.parent, folder.stat().st_mode & 0o777, folder.exists()) == (tmp_path, 0o700, True)
    assert (folder.exists(), another.exists()) == (False, False)
    monkeypatch.setattr(scratch, "matching", lambda *_: as_listed(tmp_path))
    with scratch.temporary_folder("theirs-") as folder:
        assert folder.exists()


def test_a_file_that_a_killed_process_was_writing_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once another one writes into its folder, which is looked through once in a process."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()

    def killed(path: Path) -> None:
        os.link(path, second / path.name)

    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 2**30)  # no process has that number
        patched.setattr(files, "sync", killed)
        files.replace_bytes(first / ("x" * 255), b"new")
    assert [path.name for path in first.iterdir()] == ["x" * 255]
    (left,) = second.iterdir()
    theirs = [second / ".report.html.tmp", second / owners.own_name(".", left.suffix)]
    for path in theirs:
        path.touch()
    files.replace_bytes(second / "report.html", b"new")
    assert {*second.iterdir()} == {*theirs, second / "report.html"}
    monkeypatch.setattr(files, "left_over", lambda *_: pytest.fail("the folder may be large"))
    files.replace_bytes(second / "report.html", b"newer")
    monkeypatch.setattr(files, "left_over", lambda folder, *_: as_listed(folder))
    files.replace_bytes(tmp_path / "report.html", b"new")


def as_listed(folder: Path) -> list[Path]:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def test_a_folder_of_the_user_stays(tmp_path: Path) -> None:
    for name in ("scratch-of-bob-1", "scratch-2024", f"scratch-{owners.machine()}-x-{'0' * 32}"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, times=(1, 1))
    scratch.clear_dead(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


WRITES = """
import sys, time
from pathlib import Path
from megatron_lcl.data.corpus.scratch import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    print(folder.parent, flush=True)
    while True:  # a signal that comes before a sleep does not end it
        time.sleep(0.1)
"""
REMOVES = """
import os, shutil, signal, sys
from pathlib import Path
from megatron_lcl.data.corpus.scratch import whole_folder
def rmtree(folder, ignore_errors):
    (folder / "replaced" / "file").unlink()
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = rmtree
with whole_folder(Path(sys.argv[1]), lambda output: ""):
    pass
"""
REPLACES = """
import os, signal, sys
from pathlib import Path
from megatron_lcl.data.corpus.scratch import whole_folder
rename = Path.rename
def renamed(path, target):
    rename(path, target)
    os.kill(os.getpid(), int(sys.argv[2]))
Path.rename = renamed
with whole_folder(Path(sys.argv[1]), lambda output: "") as folder:
    (folder / "file").write_text("new")
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.timeout(60)
def test_a_killed_command_leaves_no_folder(tmp_path: Path, signum: int) -> None:
    output = tmp_path / "a [1]"
    (tmp_path / f".{output.name}.mine").mkdir()
    with subprocess.Popen([sys.executable, "-c", WRITES, output], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert (folder.parent, (folder / "new" / "file").exists()) == (tmp_path, True)
        process.send_signal(signum)
        assert process.wait() in (128 + signum, -signum)
    assert folder.exists() == (signum == signal.SIGKILL)
    with scratch.whole_folder(output):
        assert not folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {output.name, f".{output.name}.mine"}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.timeout(60)
def test_killed_while_one_folder_takes_the_place_of_another(tmp_path: Path, signum: int) -> None:
    """After the old one is gone, and before the new one is there, which comes all the same where it can."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "file").write_text("old")
    ended = subprocess.run([sys.executable, "-c", REPLACES, output, str(signum)], stderr=subprocess.DEVNULL)
    assert ended.returncode in (128 + signum, -signum)
    assert output.exists() == (signum != signal.SIGKILL)
    with pytest.raises(UserError, match="is not empty"), scratch.whole_folder(output):
        pytest.fail("the earlier one is seen before any work")
    assert (output / "file").read_text() == ("old" if signum == signal.SIGKILL else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with scratch.whole_folder(output, lambda _: "") as folder:
        (folder / "file").write_text("new")
    assert (output / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["between the renames, and again", "removing what was replaced"])
def test_an_interrupt_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, signum: signal.Signals
) -> None:
    """Also a second one, while the first one's damage would be repaired."""
    output, renamed = tmp_path / "out", []
    output.mkdir()
    (output / "file").write_text("old")
    rename, rmtree = Path.rename, shutil.rmtree

    def interrupted_rename(path: Path, target: Path) -> Path:
        if renamed:
            signal.raise_signal(signum)
        renamed.append(target)
        return rename(path, target)

    def interrupted_rmtree(path: Path, **options: Any) -> None:
        signal.raise_signal(signum)
        rmtree(path, **options)

    def fill(folder: Path) -> None:
        (folder / "file").write_text("new")
        if place.startswith("between"):
            monkeypatch.setattr(Path, "rename", interrupted_rename)
        else:
            monkeypatch.setattr(shutil, "rmtree", interrupted_rmtree)

    with pytest.raises((KeyboardInterrupt, SystemExit)), scratch.whole_folder(output, lambda _: "") as folder:
        fill(folder)
    assert (output / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.timeout(60)
def test_killed_while_what_was_replaced_is_removed(tmp_path: Path) -> None:
    """What is left of it does not come back when the new one is removed."""
    output = tmp_path / "out"
    output.mkdir()
    for name in ("file", "other"):
        (output / name).write_text("old")
    assert subprocess.run([sys.executable, "-c", REMOVES, output]).returncode == -signal.SIGKILL
    assert not [*output.iterdir()]
    output.rmdir()
    with scratch.whole_folder(output):
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", [None, "new/below/file", "elsewhere"])
def test_an_error_names_the_output(tmp_path: Path, place: str | None) -> None:
    """Where it would name none, or one that is gone when it is read."""

    def failing(folder: Path) -> None:
        named = {None: None, "elsewhere": "elsewhere"}.get(place, str(folder.parent / str(place)))
        raise OSError(errno.ENOSPC, "full", named)

    with pytest.raises(OSError, match="full") as raised, scratch.whole_folder(tmp_path / "out") as folder:
        failing(folder)
    assert raised.value.filename == ("elsewhere" if place == "elsewhere" else str(tmp_path / "out"))
    for error in (OSError("no system's"), ConnectionResetError(errno.ECONNRESET, "reset by peer")):
        with pytest.raises(OSError, match=r"no system's|reset") as raised, scratch.whole_folder(tmp_path / "out"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("earlier", [False, True], ids=["in an empty folder", "in an export that is replaced"])
def test_what_is_put_there_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    """Between the last look and the rename."""
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    if earlier:
        write_record(output, "hf", {})

    def renamed(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        (output / "file").write_text("another's")
        return path.rename(target)

    with (
        pytest.raises((OSError, UserError), match="written to by something else meanwhile" if earlier else "not empty"),
        new_folder(output, "hf"),
    ):
        monkeypatch.setattr(Path, "rename", renamed)
    assert (output / "file").read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_a_link_the_folder_is_written(tmp_path: Path) -> None:
    """On its disk, which may be the larger one."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with scratch.whole_folder(tmp_path / "out") as folder:
        assert folder.is_relative_to(tmp_path / "disk")
        (folder / "file").touch()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "file").exists()


def test_what_cannot_be_replaced_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "disk" / "here")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "big")
    for output in (Path(), Path(".."), tmp_path / "disk" / "here", tmp_path / "big"):
        with pytest.raises(UserError, match="cannot be replaced; name a folder in it"), scratch.whole_folder(output):
            pytest.fail("refused too late")
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_what_a_killed_command_left_is_of_its_output_alone(tmp_path: Path) -> None:
    """Not of one whose name is the beginning of that output's."""
    left = tmp_path / f".run.v2.{'f' * 32}-1-1-{'0' * 32}"
    (left / "replaced").mkdir(parents=True)
    for path in (left / "replaced", left):
        os.utime(path, times=(1, 1))
    with scratch.whole_folder(tmp_path / "run"):
        pass
    assert (left / "replaced").exists()
    with scratch.whole_folder(tmp_path / "run.v2"):
        assert not left.exists()


@needs_root
def test_what_another_users_killed_command_left_stops_nobody() -> None:
    process = fork_context().Process()
    process.start()
    process.join()

    def use() -> None:
        with scratch.whole_folder(folder / "out"):
            pass

    with shared_folder(0o3777) as folder:
        (folder / f".out.{owners.machine()}-{process.pid}-{'0' * 32}").mkdir(mode=0o700)
        assert succeeds(as_other(use))


def put(output: Path, fill: Callable[[Path], None]) -> None:
    with scratch.scratch_folder(output.parent) as folder:
        (folder / "new").mkdir()
        fill(folder / "new")
        scratch.put_in_place(folder / "new", output)


def replace(output: Path, fill: Callable[[Path], None]) -> None:
    output.mkdir()
    with scratch.whole_folder(output) as folder:
        fill(folder)


def export(output: Path, fill: Callable[[Path], None]) -> None:
    with new_folder(output, "hf") as folder:
        fill(folder)


@pytest.mark.parametrize("write", [put, replace, export])
def test_a_folder_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Callable[[Path], None]], None]
) -> None:
    """With all that is in it, however it was written, and then its name: a power failure leaves none, or all."""
    done: list[str] = []

    def fill(folder: Path) -> None:
        (folder / "below").mkdir()
        for name in ("a", "below/b"):
            (folder / name).write_text(name)
        (folder / "nowhere").symlink_to("not there")

    def noted(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(f"{old.name} -> {new.name}")

    rename = os.rename
    monkeypatch.setattr(os, "rename", noted)
    monkeypatch.setattr(os, "fsync", lambda file: done.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    write(tmp_path / "out", fill)
    renamed = done.index("new -> out")
    before = [each for each in done[:renamed] if "->" not in each]
    assert (sorted(before), before[-1], done[renamed + 1 :]) == (["a", "b", "below", "new"], "new", [tmp_path.name])


@needs_root
@pytest.mark.parametrize("lock", [scratch.waiting_for_others, locked])
def test_a_lock_file_of_another_user(lock: Callable[[Path], AbstractContextManager[None]]) -> None:
    """Who may only read it waits for that user all the same, and who may not even that goes on."""

    def use() -> None:
        with lock(folder / "x.lock"):
            pass

    with shared_folder(0o3777) as folder, open(folder / "x.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "x.lock").chmod(0o644)
        process = as_other(use)
        process.join(0.5)
        assert process.is_alive()
        (folder / "x.lock").chmod(0o600)
        assert succeeds(as_other(use))
        fcntl.flock(held, fcntl.LOCK_UN)
        assert succeeds(process)
    with shared_folder(0o755) as folder:

        def refused() -> None:
            with pytest.raises(PermissionError, match=r"x\.lock"):
                use()

        assert succeeds(as_other(refused))


UNGUARDED = """
import sys
from multiprocessing import get_context
from pathlib import Path
from megatron_lcl.data.corpus.scratch import waiting_for_others
with waiting_for_others(Path(sys.argv[1])):
    process = get_context("spawn").Process(target=print)
    process.start()
    process.join()
    print(process.exitcode)
"""


def test_who_holds_a_lock_is_not_waited_for_by_the_process_that_it_waits_for(tmp_path: Path) -> None:
    """A script that starts processes outside of `if __name__ == "__main__":` runs in each of them again."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "1\n", done.stderr
    assert "each of them runs the script's lines again; put the call there" in done.stderr
