"""How benchmarks end where a user can mend what is wrong: one line that says it, and exit code 2, before anything is
measured."""

from __future__ import annotations

import errno
import importlib
import multiprocessing.dummy
import os
import runpy
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from processes import Ends

from megatron_lcl.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """Runs a program as Python does, but in this process; its exit code and what it has said on stderr."""

    def run(name: str, *arguments: str) -> tuple[Any, str]:
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("memory_estimate nonsense", "'nonsense' is none of: retain; recompute; "),
        ("plan_step_time nonsense", "'nonsense' is none of: 384 wide, retain; "),
        ("export_memory --formats nonsense", "invalid choice: 'nonsense'"),
        ("object_storage --libraries foo", "invalid choice: 'foo'"),
        ("object_storage --peers NOWHERE", "'NOWHERE' is no program: give the Python of an environment"),
        ("fetch_speed --img2dataset NOWHERE", "'NOWHERE' is no program"),
        ("importers --datatrove NOWHERE", "'NOWHERE' is no program"),
        ("store_load --processes abc", "'abc' is no whole number above 0"),
        ("gloo_groups --processes 16,abc", "'abc' is no whole number above 0"),
        ("gloo_groups --processes 3", "--processes 3 cannot be divided into groups of two: give even numbers"),
        ("optimizer_step --steps 0", "'0' is no whole number above 0"),
        ("packing_efficiency NOWHERE", "'NOWHERE' is no file"),
        ("packing_scale NOWHERE", "'NOWHERE' is no file"),
        ("packing_scale --documents 150000 NOWHERE", "150000 documents are no multiple of 100,000"),
        ("loader_speed first-batch NOWHERE --documents 50000", "50000 documents are no multiple of 100,000"),
        ("loader_speed first-batch NOWHERE", "loader_speed.py: NOWHERE: No such file or directory\n"),
        ("loader_speed throughput NOWHERE", "loader_speed.py: "),
        ("train_step NOWHERE", "'NOWHERE' is no file"),
        ("html_extraction NOWHERE", "'NOWHERE' is neither a folder nor one of: gimp-help-en"),
        ("decontaminate --evaluation NOWHERE --others .", "'NOWHERE' is no folder"),
        ("corpus_writer --rounds 0", "'0' is no whole number above 0"),
        ("generation_peers nonsense", "unrecognized arguments: nonsense"),
    ],
)
def test_wrong_arguments(
    command: str, said: str, end: Callable[..., tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = end(*command.split())
    assert code == 2
    assert said in line
    assert "Traceback" not in line


def test_a_kernel_for_a_device_that_is_not_known(end: Callable[..., tuple[Any, str]]) -> None:
    pytest.importorskip("triton")
    code, line = end("kernel_resources", "70")
    assert (code, "'70' is none of: 80; 90; 100\n" in line) == (2, True)


@pytest.mark.parametrize("name", ["memory_estimate", "plan_step_time", "kernel_resources"])
def test_without_arguments_all_are_measured(
    name: str, load_program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "kernel_resources":
        pytest.importorskip("triton")
    program = load_program(name)
    measured: list[Any] = []
    found = {"memory_estimate": (1e9,) * 4, "plan_step_time": (1.0, [1.0] * 3), "kernel_resources": ()}[name]
    function = "resources" if name == "kernel_resources" else "run"
    monkeypatch.setattr(program, function, lambda of: (measured.append(of), found)[1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", [""])
    assert program.main() == 0
    assert measured == list(program.SHARED if name == "kernel_resources" else program.SETTINGS)


def test_runs_without_steps(end: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    code, line = end("steps_to_loss", str(tmp_path), str(tmp_path))
    assert (code, f"{tmp_path} has no metrics.jsonl with lines of steps" in line) == (2, True)


@pytest.mark.parametrize(
    ("command", "peer"),
    [
        ("corpus_tokenizer --texts texts.jsonl", "open_clip.tokenizer"),
        ("corpus_writer --pieces 8", "megatron.core.datasets.indexed_dataset"),
        ("contrastive_against_open_clip", "open_clip.loss"),
    ],
)
def test_a_peer_that_is_not_installed(
    command: str,
    peer: str,
    end: Callable[..., tuple[Any, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text_list": ["a b c"]}\n')
    monkeypatch.setitem(sys.modules, peer, None)
    code, line = end(*command.split())
    assert code == 2
    assert peer in line
    assert 'pip install -e ".[dev,benchmarks]"' in line
    assert line.count("\n") == 1


def raises(error: Exception) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_what_a_user_can_mend_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["/a/folder/program.py"])
    exit_with = importlib.import_module("claims").exit_with
    for error, said in (
        (UserError("too\nmany"), "too many"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.jsonl"), "a.jsonl: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            exit_with(raises(error))
        assert (ended.value.code, capsys.readouterr().err) == (2, f"program.py: {said}\n")
    for error in (ValueError("a fault"), ConnectionResetError(errno.ECONNRESET, "reset")):
        with pytest.raises(type(error)):
            exit_with(raises(error))
    with pytest.raises(ModuleNotFoundError):
        exit_with(raises(ModuleNotFoundError("a fault", name="megatron_lcl.nothing")))
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: 1)
    assert ended.value.code == 1


@pytest.mark.timeout(60)
def test_a_process_that_ends_without_a_result_is_not_waited_for(
    load_program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packing = load_program("packing_scale")
    monkeypatch.setattr(packing, "build", Ends())
    with pytest.raises(BrokenProcessPool):
        packing.run(tmp_path, tmp_path, 100_000, 2048)


def test_duplicates_are_joined_without_peers(
    load_program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load_program("duplicates")
    monkeypatch.setattr(program, "find_spec", lambda module: None)
    monkeypatch.setattr(program, "get_context", lambda kind: multiprocessing.dummy)
    monkeypatch.setattr(sys, "argv", ["", "--rows", "500", "--rounds", "1", "--documents", "2"])
    assert program.main() == 0
    said = capsys.readouterr().out
    for peer in ("DuckDB", "Polars", "Ray Data", "datasketch", "rensa"):
        assert f"\n{peer} is left out" in f"\n{said}"
    assert said.count('pip install -e ".[benchmarks]"') == 5
    assert [line.split()[:2] for line in said.splitlines() if line.strip().startswith("500 ")] == [["500", "numpy"]]
    assert said.splitlines()[-1].startswith("ours ")
