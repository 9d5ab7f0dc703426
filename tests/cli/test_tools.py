"""The scripts in tools/ run from a checkout that is not installed, from any folder, and hide no module of Python's."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_lcl import cli

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def start(checkout: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Python in a folder, with all packages that are installed but ours (-S: no links to checkouts either)."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}
    environment["HOME"] = str(folder)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-S", *words], cwd=folder, env=environment, **pipes)  # type: ignore


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and the scripts."""
    checkout = tmp_path_factory.mktemp("a checkout")
    for part in ("megatron_lcl", "tools"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    return checkout


def test_their_names_are_nobody_elses() -> None:
    """A script's folder comes first on its path."""
    assert len(SCRIPTS) >= 8
    assert not {*SCRIPTS} & sys.stdlib_module_names
    installed = {path.name.removesuffix(".py") for path in Path(sysconfig.get_path("purelib")).iterdir()}
    assert not {*SCRIPTS} & installed


@pytest.mark.slow
def test_each_starts_from_another_folder(checkout: Path, tmp_path: Path) -> None:
    without = start(checkout, tmp_path, "-c", "import megatron_lcl")
    assert "No module named 'megatron_lcl'" in without.communicate(timeout=60)[1]
    started = {name: start(checkout, tmp_path, f"{checkout}/tools/{name}.py", "--help") for name in SCRIPTS}
    for name, process in started.items():
        said, faults = process.communicate(timeout=120)
        assert process.returncode == 0, faults
        assert said.startswith(f"usage: megatron-lcl {name.partition('_')[0]} ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_is_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose process ends with it: `main` without arguments, so that Ctrl-C at the end has no traceback."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(cli, "main", lambda: 3)
    with pytest.raises(SystemExit, match=r"^3$"):
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    assert sys.argv == [name, name.partition("_")[0], "--help"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_worker_process_that_imports_one_runs_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As multiprocessing's `spawn` does, with the command's own arguments."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    assert "main" in runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__mp_main__")
