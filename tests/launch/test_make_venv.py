"""launch/common.sh makes the checkout's environment: with a stand-in for Python, which notes what it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[2] / "launch" / "common.sh"
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m venv "*)
    echo "venv" >>"$ASKED"
    [ -z "${{FAULT:-}}" ] || {{ mkdir -p "$3" && echo "Warning" && echo "Error: $FAULT" >&2; exit 1; }}
    mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" "$3/pip" && cp "$0" "$3/bin/python" ;;
  "-m pip --version") [ -e "${{0%/bin/python}}/pip" ] ;;
  *"--editable "*) echo "$*" | sed 's/.*\\[/install [/' >>"$ASKED" ;;
  "-m pip install "*) ;;
  *"import ensurepip"*) [ -z "${{BARE:-}}" ] ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A copy of what `make_venv` reads, and its environment's folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.venv, self.asked = folder / "checkout", folder / "my venv", folder / "asked"
        (self.root / "launch").mkdir(parents=True)
        (self.root / "launch" / "common.sh").write_text(COMMON.read_text())
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.python = folder / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def make(self, extras: str, **environment: str) -> list[str]:
        """What was asked of Python."""
        result = self.run(extras, environment)
        assert result.returncode == 0, result.stderr
        return self._asked_of_python()

    def refused(self, **environment: str) -> str:
        """The one line that is said, with exit code 2."""
        result = self.run("hf", environment)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        return line

    def run(self, extras: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """The script's end, whatever it is."""
        ours = {"PYTHON": str(self.python), "VENV": str(self.venv), "ASKED": str(self.asked)}
        command = f"set -eu; source '{self.root}/launch/common.sh'; make_venv {extras}"
        return subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **ours, **(environment or {})},
        )

    def _asked_of_python(self) -> list[str]:
        lines = self.asked.read_text().splitlines() if self.asked.exists() else []
        self.asked.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_each_set_of_extras_is_installed_once(checkout: Checkout) -> None:
    assert checkout.make("hf") == ["venv", "install [hf]"]
    assert checkout.make("dev") == ["install [dev]"]
    assert checkout.make("hf") == checkout.make("dev") == []
    (checkout.root / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    assert checkout.make("hf") == ["install [hf]"]
    assert checkout.make("dev") == ["install [dev]"]


def test_an_installation_names_its_log_and_is_quiet_otherwise(checkout: Checkout) -> None:
    log = checkout.venv / "install.log"
    first, second = checkout.run("hf"), checkout.run("hf")
    assert first.stderr == f"installing into {checkout.venv} … (log: {log})\n"
    assert log.is_file()
    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")


def test_another_python_needs_an_installation_of_its_own(checkout: Checkout) -> None:
    checkout.make("hf")
    python = checkout.venv / "bin" / "python"  # as when the system's Python, to which it is a link, is upgraded
    newer = "import sys; sys.version_info = (9, 1); exec(sys.stdin.read())"
    python.write_text(PYTHON.replace("  *) exec", f'  "- "*) exec {sys.executable} -c "{newer}" "$2" ;;\n  *) exec'))
    assert checkout.make("hf") == ["install [hf]"]
    assert checkout.make("hf") == []


def test_an_environment_of_another_python_is_not_taken_for_the_one_asked_for(checkout: Checkout) -> None:
    checkout.make("hf")
    other = checkout.python.with_name("python-3.99")
    other.write_text(PYTHON.replace("  *) exec", "  *%d.%d*) echo 3.99 ;;\n  *) exec"))
    other.chmod(0o755)
    line = checkout.refused(PYTHON=str(other))
    assert line.startswith(str(checkout.venv))
    assert "not 3.99" in line


def test_other_peoples_folders_are_left_alone(checkout: Checkout) -> None:
    checkout.venv.mkdir()
    (checkout.venv / "thesis.tex").write_text("mine")
    for faults in ({}, {"FAULT": "no"}, {"BARE": "1"}):
        assert "holds other files and is no virtual environment" in checkout.refused(**faults)
    assert [path.name for path in checkout.venv.iterdir()] == ["thesis.tex"]


def test_the_real_error_is_said(checkout: Checkout) -> None:
    full = checkout.refused(FAULT="[Errno 28] No space left on device")
    assert full == f"no virtual environment at {checkout.venv}: Error: [Errno 28] No space left on device"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"  # of this Python, be it the distribution's own or another
    assert checkout.refused(BARE="1").endswith(f"apt-get install python{version}-venv")


def test_what_was_interrupted_is_completed(checkout: Checkout) -> None:
    checkout.make("hf")
    (checkout.venv / "pip").unlink()
    (checkout.venv / "installed").unlink()  # Ctrl-C before pip was unpacked
    assert checkout.make("hf") == ["venv", "install [hf]"]
    python = checkout.venv / "bin" / "python"
    python.unlink()
    python.symlink_to(checkout.root / "gone")  # the system's Python was removed
    assert checkout.make("hf") == ["venv"]
