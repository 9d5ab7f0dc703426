"""`launch/test.sh` ends with the time that all of it took, and with pytest's exit code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_last_line_is_the_time_of_the_whole_and_the_code_is_that_of_pytest(tmp_path: Path) -> None:
    """With programs that do nothing in place of all that it runs."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "test.sh", tmp_path / "launch")
    (tmp_path / "launch" / "common.sh").write_text(f"root={tmp_path} venv={tmp_path}\nmake_venv() {{ SECONDS=125; }}\n")
    (tmp_path / "bin").mkdir()
    for name in ("python", "mypy", "ruff", "shellcheck", "lint-imports", "slurmctld", "chromium"):
        program = tmp_path / "bin" / name
        program.write_text('#!/bin/sh\ncase "$*" in *--durations*-k\\ few) echo 1 failed; exit 3;; esac\n')
        program.chmod(0o755)
    done = subprocess.run(
        ["bash", tmp_path / "launch" / "test.sh", "-k", "few"],
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(r"1 failed\n2:\d\d minutes in all, .* 25 on two idle cores\n", done.stdout)
