"""Standard streams that are closed, full, or read by nobody: what a command does, and its exit code, stay the same."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
from data.writers import write_jsonl

from megatron_lcl.cli import command, main
from megatron_lcl.data.corpus.document import Document, Text
from megatron_lcl.data.prepare.preprocess import preprocess


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, in `corpus` a corpus of them, and in `damaged` that one with a file cut."""
    folder = tmp_path_factory.mktemp("documents")
    write_jsonl([Document((Text(f"text number {i} of some"),)) for i in range(9)], folder / "in")
    preprocess("jsonl", folder / "in", folder / "corpus", vocab_size=400)
    shutil.copytree(folder / "corpus", folder / "damaged")
    os.truncate(folder / "damaged" / "tokens-00000.bin", 4)
    return folder


def full() -> TextIO:
    return open("/dev/full", "w", buffering=1)


def unread() -> TextIO:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


def code_with(name: str, stream: TextIO, words: str) -> int:
    """A command's exit code where a standard stream is this one, which is closed afterwards: that fails where something
    is left in it that could not be written, and Python would fail so, too, when it ends."""
    with stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, name, stream)
        code = main(words.split())
        assert getattr(sys, name) is stream
        return code


PREPROCESS = "preprocess --format jsonl --input in --vocab-size 400 --output"


@pytest.mark.parametrize("stream", [full, unread])
def test_bars_that_cannot_be_written_end_no_work(
    stream: Callable[[], TextIO], documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(documents)
    assert code_with("stderr", stream(), f"{PREPROCESS} {tmp_path}/made") == 0
    assert code_with("stderr", stream(), f"export-corpus corpus --output {tmp_path}/exported") == 0
    assert code_with("stderr", stream(), "verify damaged") == 1
    made = {file.name for file in (tmp_path / "made").iterdir()}
    assert made == {file.name for file in (documents / "corpus").iterdir()}
    assert any((tmp_path / "exported").iterdir())


def test_a_result_that_nobody_reads_changes_no_exit_code(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `| head`: also a fault that was found is one."""
    monkeypatch.chdir(documents)
    assert code_with("stdout", unread(), "inspect corpus") == 0
    assert code_with("stdout", unread(), f"{PREPROCESS} {tmp_path}/made") == 0
    assert (tmp_path / "made" / "corpus.json").exists()
    assert code_with("stdout", unread(), "verify damaged") == 1


def test_another_pipe_that_breaks_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one to a process that has ended."""

    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(command, "check_on_disk", broken)
    with pytest.raises(BrokenPipeError):
        main(["verify", "corpus"])


def test_a_result_on_a_full_disk_is_an_error(documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_with("stdout", full(), f"inspect {documents}/corpus") == 2
    assert capsys.readouterr().err == "megatron-lcl inspect: No space left on device\n"


def test_names_of_files_that_are_not_utf8_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some\udcfcwhere").mkdir()
    Path("some\udcfcwhere", "corpus.json").write_text("{}")
    monkeypatch.setattr(sys, "stdout", shown := io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert main(["verify", "some\udcfcwhere"]) == 1
    assert shown.buffer.getvalue().startswith(rb"some\udcfcwhere/corpus.json ")  # type: ignore[attr-defined]


def test_streams_that_are_closed(documents: Path, tmp_path: Path) -> None:
    """As where a daemon starts commands. Nothing else is opened in their place, which children would write to."""
    look = (
        "import subprocess, sys\nfrom megatron_lcl.cli.streams import lasting_streams\n"
        "with lasting_streams(), open(sys.argv[1], 'w') as file:\n"
        "    print('\\udcfc', file=sys.stderr)\n"
        "    subprocess.run(['sh', '-c', 'cat; echo one; echo two >&2'], check=True)\n"
        "    print(file.fileno(), file=file)\n"
    )
    (tmp_path / "look.py").write_text(look)
    lcl = f"{sys.executable} -m megatron_lcl"
    script = f"""
        {lcl} --version >&-; echo $?
        {lcl} --version 2>&- >/dev/null; echo $?
        {lcl} verify corpus >&- & a=$!
        {lcl} verify damaged 2>&- >/dev/null & b=$!
        {lcl} {PREPROCESS} {tmp_path}/made <&- >&- 2>&- & c=$!
        {sys.executable} {tmp_path}/look.py {tmp_path}/found <&- >&- 2>&-; echo $?
        for process in $a $b $c; do wait $process; echo $?; done"""
    paths = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=documents,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=120,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == ([*"000010"], "")
    assert (tmp_path / "made" / "corpus.json").exists()
    assert int((tmp_path / "found").read_text()) > 2
