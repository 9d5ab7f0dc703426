"""launch/install.py: pip's settings reach uv, and pip installs where uv cannot."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "launch" / "install.py"
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def install() -> Any:
    spec = importlib.util.spec_from_file_location("install", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configured(tmp_path: Path, text: str, **variables: str) -> str:
    """What the real pip lists, with a configuration file of this text."""
    (tmp_path / "pip.conf").write_text(text)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = {**kept, "HOME": str(tmp_path), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **variables}
    command = [sys.executable, "-m", "pip", "config", "list"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def test_what_pip_is_told_uv_is_told(install: Any, tmp_path: Path) -> None:
    text = """
[global]
index-url = https://of.the/site
find-links = /wheels
    /more
constraint = /of/all
[install]
constraint = /of/installations
[list]
format = columns
"""
    listed = configured(tmp_path, text, PIP_FIND_LINKS="/mine", PIP_TIMEOUT="7", PIP_NO_INPUT="1")
    ours = install.uv_variables(listed)
    wanted = {
        "UV_DEFAULT_INDEX": "https://of.the/site",
        "UV_FIND_LINKS": "/mine",
        "UV_CONSTRAINT": "/of/installations",
        "UV_HTTP_TIMEOUT": "7",
    }
    assert {name: ours[name] for name in wanted} == wanted
    assert install.uv_variables(configured(tmp_path, text))["UV_FIND_LINKS"] == "/wheels,/more"


@pytest.mark.parametrize("setting", ["no-binary = torch", "pre = true", "platform = any", "no-index = true"])
def test_a_setting_that_uv_is_not_told_is_for_pip(install: Any, tmp_path: Path, setting: str) -> None:
    assert install.uv_variables(configured(tmp_path, f"[global]\n{setting}\n")) is None
    assert install.uv_variables(configured(tmp_path, f"[freeze]\n{setting}\n")) is not None


@pytest.fixture
def runs(install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """runs(setting, *codes): the exit code, and what was installed by what, if the commands end with these codes."""

    def run(listed: str, *codes: int) -> tuple[int, list[str]]:
        asked: list[str] = []
        rest = iter(codes)

        def stands_in(words: list[str], env: Any = None, **_: Any) -> Done:
            if words[-2:] == ["config", "list"]:
                return Done(words, 0, listed)
            by = "uv" if Path(words[0]).name == "uv" else "pip"
            asked.append(f"{by} {words[-1]}")
            if by == "uv":
                assert (env["UV_CONSTRAINT"], env["HOME"]) == ("/bounds", os.environ["HOME"])
                assert words[words.index("--cache-dir") + 1].startswith(str(tmp_path)), "where files can be linked"
            if "--target" in words:
                Path(words[words.index("--target") + 1]).mkdir(parents=True)
            return Done(words, next(rest))

        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        monkeypatch.setattr(subprocess, "run", stands_in)
        code = install.main(["--editable", "here[dev]"])
        assert not (tmp_path / "installing").exists()
        return code, asked

    return run


def test_pip_installs_where_uv_does_not(runs: Callable[..., tuple[int, list[str]]]) -> None:
    bounds, ours, theirs = "global.constraint='/bounds'\n", "uv here[dev]", ["pip wheel", "pip here[dev]"]
    assert runs(bounds, 0, 0) == (0, ["pip uv", ours])
    assert runs(bounds, 1, 0, 0) == (0, ["pip uv", *theirs])  # not to be had
    assert runs(bounds, 0, 2, 0, 0) == (0, ["pip uv", ours, *theirs])
    assert runs(f"{bounds}global.pre='1'\n", 0, 0) == (0, theirs)
    assert runs(bounds, 0, 2, 0, 3) == (3, ["pip uv", ours, *theirs])
    assert runs(bounds, 1, 4) == (4, ["pip uv", theirs[0]])
