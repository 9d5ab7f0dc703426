"""The maps of docs/architecture.md and CONTRIBUTING.md: every file that they name is there, and the tests shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = (ROOT, ROOT / "megatron_lcl", ROOT / "docs")
FILE = re.compile(r"`((?:[\w.-]+/)+|(?:[\w.-]+/)*[\w-]+\.(?:py|md|sh|toml|yaml|html))`")


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page: str) -> None:
    missing = []
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        folder = ROOT
        for name in FILE.findall(line):
            found = next((place / name for place in (*PLACES, folder) if (place / name).exists()), None)
            if found is None and "/" not in name:  # a file of the folder that the line is about
                found = next(ROOT.glob(f"megatron_lcl/**/{name}"), None)
            if found is None:
                missing.append(name)
            else:
                folder = found.parent
    assert missing == []


def test_tests_that_are_selected_by_name_exist() -> None:
    shown = re.findall(r"pytest (tests/\S+) -k (\w+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert shown
    for folder, word in shown:
        files = "".join(file.read_text(encoding="utf-8") for file in (ROOT / folder).glob("test_*.py"))
        assert re.search(rf"def test_\w*{word}", files), (folder, word)
